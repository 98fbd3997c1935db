"""How the kernels are compiled: numba's options, the same for all, and how often LLVM optimizes them.

Numba compiles a function that others call to optimized machine code, then puts it into each caller and optimizes it
there again, as often as calls are deep. Here it stays as it is until LLVM has all of a kernel that is called by its
address, so that everything is optimized once. That halves the time of the first start.
"""

from typing import Any

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from llamalet.kernels import processor

processor.add_missing_features()

# What LLVM may do to float arithmetic in a sum: reorder it, fuse multiplications into additions, use approximate
# functions. It must not assume that there are no NaNs and infinities (fastmath=True does), which would hide a broken
# model. Elsewhere results are exact: LLVM emits aliasing and non-aliasing versions of a storing loop, and both must
# give the same bits.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz", "afn"}


class KernelCode(JITCodeLibrary):
    """The code of a kernel that has an address: optimized once, with all that it calls in it."""

    def _optimize_functions(self, ll_module: Any) -> None:
        """Do not optimize functions before those that they call are there; only say where data lies in them."""
        ll_module.data_layout = self._codegen._data_layout

    def _finalize_final_module(self) -> None:
        """Make machine code, once there is that of the kernels that are called by name (shared.py)."""
        for define in self._reload_init:
            define()
        super()._finalize_final_module()


class OptimizedCode(KernelCode):
    """The code of a kernel that only others contain: optimized, but without machine code of its own."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Return 0: Python cannot call it."""
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> "OptimizedCode":
        """What numba tells the address of the function's environment, which has none here."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Do not set it: kernels do not use their environment."""


class CalleeCode(OptimizedCode):
    """The same, left to be optimized in its callers."""

    def _optimize_final_module(self) -> None:
        """Leave it as it is."""


def _compiler(library: type[JITCodeLibrary]) -> type[Compiler]:
    """Return numba's compiler, with another place for the code."""

    class KernelCompiler(Compiler):
        def define_pipelines(self) -> Any:
            """Return numba's own pipeline."""
            self.state.library = library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
            self.state.library.enable_object_caching()
            return super().define_pipelines()

    return KernelCompiler


# No reference counting: the kernels own no memory, and counting would make the threads wait for each other at every
# row. A compiled function inherits its caller's options, so each is set here even where it is the default.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",  # x / 0 is infinite; Python's error would keep loops from being vectorized
    "no_cfunc_wrapper": True,
    "_nrt": False,
    "pipeline_class": _compiler(KernelCode),
}
PART = OPTIONS | {"no_cpython_wrapper": True, "pipeline_class": _compiler(CalleeCode)}
kernel = njit(**OPTIONS)
# For functions that only kernels call: Python cannot, and no code is made for that.
inner_kernel = njit(**PART)
# For functions with few callers, or that take a whole workspace, which numba would copy word by word for a call.
inlined_kernel = njit(inline="always", **OPTIONS)
# For sums alone, such as `dot`: compiled and vectorized by itself before LLVM inlines it, which fixes its order.
summing_kernel = njit(**PART | {"fastmath": FAST_MATH, "pipeline_class": _compiler(OptimizedCode)})
# For loops that come out faster if they are optimized before their callers are, too.
loop_kernel = njit(**PART | {"pipeline_class": _compiler(OptimizedCode)})
