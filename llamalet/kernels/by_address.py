"""Named tuples that kernels pass by their address.

Numba passes a tuple word by word, and an array has several words. So a workspace with dozens of arrays would be copied
at each call and into each variable, and LLVM would take longer to remove the copies than for all else.
"""

from typing import Any, TypeVar

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, register_model

from llamalet.kernels.llvm import I8

Class = TypeVar("Class", bound=type)

_inside: set[type] = set()


def by_address_inside(tuple_class: Class) -> Class:
    """Let fields of this class be passed by address too, if they are in a tuple that is."""
    _inside.add(tuple_class)
    return tuple_class


class ByAddress(types.Type):
    """Numba's type of the address of a named tuple, which has the tuple's fields as attributes."""

    def __init__(self, content: Any) -> None:
        self.content = content
        super().__init__(f"ByAddress({content}, {', '.join(content.fields)})")


@register_model(ByAddress)
class _AddressModel(PrimitiveModel):
    """An address is one word."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, I8.as_pointer())


@infer_getattr
class _FieldTypes(AttributeTemplate):
    """The types of the fields."""

    key = ByAddress

    def generic_resolve(self, kind: Any, name: str) -> Any:
        """Return the type of a field."""
        _, field = _field(kind, name)
        return field


def _field(kind: Any, name: str) -> tuple[int, Any]:
    """Return the number and the type of a field."""
    number = kind.content.fields.index(name)
    field = kind.content[number]
    return number, ByAddress(field) if getattr(field, "instance_class", None) in _inside else field


@lower_getattr_generic(ByAddress)
def _get_field(context: Any, builder: ir.IRBuilder, kind: Any, value: Any, name: str) -> Any:
    number, field = _field(kind, name)
    content = builder.bitcast(value, context.get_value_type(kind.content).as_pointer())
    place = cgutils.gep_inbounds(builder, content, 0, number)
    return builder.bitcast(place, I8.as_pointer()) if isinstance(field, ByAddress) else builder.load(place)


@intrinsic
def by_address(typing_context: Any, value: Any) -> Any:
    """Return the address of a copy of a named tuple, which lasts until the calling function returns."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(cgutils.alloca_once_value(builder, args[0]), I8.as_pointer())

    return ByAddress(value)(value), build
