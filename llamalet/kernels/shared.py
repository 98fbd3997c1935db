"""Kernels that are compiled once, however many others call them.

Numba puts a copy of a kernel into each kernel that calls it, with copies of all that it calls in turn, and LLVM
optimises every copy anew. A shared kernel is machine code of its own, and its callers contain a call of its name.
"""

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from llamalet.kernels import cache
from llamalet.kernels.jit import OPTIONS


def shared_kernel(function: Callable[..., Any]) -> Any:
    """Return what other kernels call this kernel by; Python cannot call it."""
    compiled = njit(no_cpython_wrapper=True, **OPTIONS)(function)

    def call(typing_context: Any, *args: Any) -> Any:
        kinds = tuple(types.unliteral(arg) for arg in args)
        symbol, result = define(compiled, kinds)

        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            # What is called when the caller is loaded from the cache.
            reload = functools.partial(define_named, function.__module__, function.__name__, kinds)
            context.active_code_library._reload_init.add(reload)
            callee_type = context.call_conv.get_function_type(result, kinds)
            callee = cgutils.get_or_insert_function(builder.module, callee_type, symbol)
            status, value = context.call_conv.call_function(builder, callee, result, kinds, args)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return value

        return result(*kinds), build

    context, signature = inspect.signature(call), inspect.signature(function)
    parameters = [context.parameters["typing_context"], *signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__name__, call.compiled = function.__name__, compiled  # type: ignore[attr-defined]
    return intrinsic(call)


def define(compiled: Any, kinds: tuple[Any, ...]) -> tuple[str, Any]:
    """Compile a kernel for arguments of these types, unless it has been, and define its name for LLVM.

    Returns:
        The name, and the type of the result.
    """
    function = compiled.py_func
    # Numba's own names number the kinds of records as they occur, so another process has other names.
    types_hash = hashlib.sha256(str(kinds).encode()).hexdigest()[:16]
    symbol = f"{function.__module__}.{function.__name__}.{types_hash}"
    if kinds not in compiled.overloads:
        if not compiled.signatures:
            cache.enable(compiled)
        compiled.compile(kinds)
    code = compiled.overloads[kinds]
    if llvmlite.binding.address_of_symbol(symbol) is None:
        address = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
        llvmlite.binding.add_symbol(symbol, address)
    return symbol, code.signature.return_type


def define_named(module: str, name: str, kinds: tuple[Any, ...]) -> None:
    """Do what `define` does for a shared kernel, given its place."""
    define(getattr(importlib.import_module(module), name).compiled, kinds)
