"""Kernels that are compiled once, however many others call them.

Numba puts a copy of a kernel into each kernel that calls it, with copies of all that it calls in turn, and LLVM
optimizes every copy anew. A shared kernel is machine code of its own, and its callers contain a call of its name. So it
can be compiled at the same time as they, in another process: it must be there only when they become machine code.
"""

import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from llamalet.kernels import cache
from llamalet.kernels.jit import OPTIONS
from llamalet.kernels.second_process import DONE, SecondProcess, requests

RESULTS = {None: types.none, int: types.int64, float: types.float64}
"""Numba's types of what shared kernels may return, which their annotations say."""

SECOND_PROCESS = SecondProcess()


def shared_kernel(function: Callable[..., Any]) -> Any:
    """Return what other kernels call this kernel by; Python cannot call it."""
    compiled = njit(no_cpython_wrapper=True, **OPTIONS)(function)
    signature = inspect.signature(function)
    result = RESULTS[signature.return_annotation]

    def call(typing_context: Any, *args: Any) -> Any:
        kinds = tuple(types.unliteral(arg) for arg in args)
        place = function.__module__, function.__name__, kinds
        if kinds not in compiled.overloads:
            SECOND_PROCESS.ask(place)

        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            # What is called before the caller becomes machine code, and when it is loaded from the cache.
            context.active_code_library._reload_init.add(functools.partial(define_named, *place))
            callee_type = context.call_conv.get_function_type(result, kinds)
            callee = cgutils.get_or_insert_function(builder.module, callee_type, symbol_of(*place))
            status, value = context.call_conv.call_function(builder, callee, result, kinds, args)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return value

        return result(*kinds), build

    context = inspect.signature(call)
    parameters = [context.parameters["typing_context"], *signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__name__, call.compiled = function.__name__, compiled  # type: ignore[attr-defined]
    return intrinsic(call)


def symbol_of(module: str, name: str, kinds: tuple[Any, ...]) -> str:
    """Return LLVM's name for a shared kernel: numba's own number the kinds of records as a process meets them."""
    return f"{module}.{name}.{hashlib.sha256(str(kinds).encode()).hexdigest()[:16]}"


def define_named(module: str, name: str, kinds: tuple[Any, ...]) -> None:
    """Compile a shared kernel for arguments of these types, unless it has been, and define its name for LLVM."""
    compiled, symbol = getattr(importlib.import_module(module), name).compiled, symbol_of(module, name, kinds)
    if kinds not in compiled.overloads:
        if not compiled.signatures:
            cache.enable(compiled)
        SECOND_PROCESS.wait_for((module, name, kinds))
        compiled.compile(kinds)
    if llvmlite.binding.address_of_symbol(symbol) is None:
        code = compiled.overloads[kinds]
        assert code.signature.return_type == RESULTS[inspect.signature(compiled.py_func).return_annotation]
        llvmlite.binding.add_symbol(symbol, code.library.get_pointer_to_function(code.fndesc.llvm_func_name))


def serve() -> None:
    """Compile what the standard input asks for until it ends: the main function of the second process."""
    with cache.without_collecting():
        for request in requests(sys.stdin.buffer):
            define_named(*request)
            sys.stdout.buffer.write(DONE)
            sys.stdout.buffer.flush()
