"""llamalet: run small Llama models from a raw binary, in Python, without PyTorch.

from llamalet import Model
print("".join(Model.load("out/model.bin").generate("Once upon a time")))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamalet.chat import Chat
    from llamalet.runtime import Model
    from llamalet.tokenizer import Tokenizer

__all__ = ["Chat", "Model", "Tokenizer"]

HOMES = {"Chat": "llamalet.chat", "Model": "llamalet.runtime", "Tokenizer": "llamalet.tokenizer"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for, so that `llamalet.config` and its like stay cheap."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
