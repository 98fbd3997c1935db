"""llamalet: run small Llama models in Python, without PyTorch.

from llamalet import Model
print("".join(Model.load("out/model.bin").generate("Once upon a time")))
"""

import importlib

TYPE_CHECKING = False  # true for type checkers; importing it from typing would take longer than the rest of this file
if TYPE_CHECKING:
    from llamalet.chat import Chat
    from llamalet.runtime import Model
    from llamalet.sampler import SamplingConfig
    from llamalet.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Chat", "Model", "SamplingConfig", "Tokenizer"]

HOMES = {
    "Chat": "llamalet.chat",
    "Model": "llamalet.runtime",
    "SamplingConfig": "llamalet.sampler",
    "Tokenizer": "llamalet.tokenizer",
}


def __getattr__(name: str) -> object:
    """Import a name when it is first used, so that importing `llamalet.config` stays cheap."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
