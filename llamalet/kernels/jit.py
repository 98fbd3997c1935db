"""How the kernels are compiled: numba's options, the same for all."""

from typing import Any

from numba import njit

# What LLVM may do to float arithmetic in a sum: reorder it, fuse multiplications into additions, use approximate
# functions. It must not assume that there are no NaNs and infinities (fastmath=True does), which would hide a broken
# model. Elsewhere results are exact: LLVM emits aliasing and non-aliasing versions of a storing loop, and both must
# give the same bits.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz", "afn"}

# No reference counting: the kernels own no memory, and counting would make the threads wait for each other at every
# row. A compiled function inherits its caller's options, so each is set here even where it is the default.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",  # x / 0 is infinite; Python's error would keep loops from being vectorized
    "no_cfunc_wrapper": True,
    "_nrt": False,
}
kernel = njit(**OPTIONS)
# For functions that only kernels call: Python cannot, and no code is made for that.
inner_kernel = njit(no_cpython_wrapper=True, **OPTIONS)
# For functions with few callers, or that take a whole workspace, which numba would copy word by word for a call.
inlined_kernel = njit(inline="always", **OPTIONS)
# For sums alone, such as `dot`: compiled and vectorized by itself before LLVM inlines it, which fixes its order.
summing_kernel = njit(**OPTIONS | {"fastmath": FAST_MATH})
