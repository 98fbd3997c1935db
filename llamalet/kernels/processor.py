"""What the processor can do that numba compiles for, under LLVM's names."""

import ctypes
import functools
import platform
import re
import sys

import llvmlite.binding
import numba
from numba.core.codegen import get_host_cpu_features
from numba.core.registry import cpu_target

from llamalet.cores import sysctl

# Where Linux says what an Arm processor can do: the vector of getauxval, and its bit for each feature.
# Source: arch/arm64/include/uapi/asm/hwcap.h, HWCAP_ASIMDDP and HWCAP2_I8MM.
AT_HWCAP, AT_HWCAP2 = 16, 26
LINUX_BITS = {"dotprod": (AT_HWCAP, 20), "i8mm": (AT_HWCAP2, 13)}

# The same on macOS: names for sysctlbyname.
MACOS_NAMES = {"dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}


def is_arm() -> bool:
    """Return whether this is a 64-bit Arm processor."""
    return platform.machine().lower() in ("aarch64", "arm64")


def add_missing_features() -> None:
    """Let numba compile for all that the kernels use of an Arm processor, also for what LLVM did not find.

    LLVM derives an Arm processor's features from its name, so its list lacks the dot products, and the code generator
    knows them only if it knows the name. Without them it ends the process at the first such instruction. This must be
    called before the first function is decorated: numba makes its code generator then.
    """
    config = numba.config
    if is_arm() and config.CPU_NAME is None and config.CPU_FEATURES is None:
        named = [f"+{feature}" for feature in sorted(dot_products())]
        config.CPU_FEATURES = ",".join(filter(None, [get_host_cpu_features(), *named]))


def features() -> frozenset[str]:
    """Return the features of the processor that numba compiles for."""
    config = numba.config
    if config.CPU_FEATURES is None and config.CPU_NAME not in (None, llvmlite.binding.get_host_cpu_name()):
        return frozenset({"neon"} if is_arm() else ())
    return _arm_features() if is_arm() else _x86_features(config.CPU_FEATURES)


def fuses() -> bool:
    """Return whether the processor multiplies and adds with one rounding; every 64-bit Arm processor does."""
    return not features().isdisjoint({"fma", "neon"})


@functools.cache
def _x86_features(named: str | None) -> frozenset[str]:
    """Return the features that are named, else those that LLVM finds."""
    if named is not None:
        return added_in(named)
    return frozenset(feature for feature, has in llvmlite.binding.get_host_cpu_features().items() if has)


@functools.cache
def _arm_features() -> frozenset[str]:
    """Return what numba's code generator was asked for; if it was made too early, that lacks the dot products."""
    _, _, asked_for = cpu_target.target_context.codegen().magic_tuple()
    return added_in(asked_for) | {"neon"}  # no 64-bit Arm processor lacks it


def added_in(named: str) -> frozenset[str]:
    """Return the features with a plus in a list like +neon,-sve."""
    return frozenset(re.findall(r"\+([\w.-]+)", named))


def dot_products() -> frozenset[str]:
    """Return which of dotprod and i8mm the operating system says that this Arm processor has."""
    if sys.platform == "darwin":
        return frozenset(feature for feature, name in MACOS_NAMES.items() if sysctl(name))
    if sys.platform != "linux":
        return frozenset()
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return frozenset(feature for feature, (vector, bit) in LINUX_BITS.items() if getauxval(vector) >> bit & 1)
