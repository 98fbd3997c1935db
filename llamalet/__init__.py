"""llamalet: run small Llama models from a raw binary, in Python, without PyTorch.

from llamalet import Model
print("".join(Model.load("out/model.bin").generate("Once upon a time")))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamalet.runtime import Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    """Import `Model` when it is first asked for, so that `llamalet.config` and its like stay cheap."""
    if name == "Model":
        from llamalet.runtime import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
