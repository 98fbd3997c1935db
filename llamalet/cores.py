"""The number of processor cores and of threads, for the runtime and for training; imports no numba."""

import ctypes
import os
import sys
from pathlib import Path

from llamalet.checks import checked
from llamalet.errors import ConfigError

# More would need more blocks than a ticket of kernels/threads.py can count.
MAX_THREADS = 1024


def physical_cores() -> int:
    """Return the number of cores that this process may use; hardware threads of one core count once.

    On macOS only the performance cores count.
    """
    if not hasattr(os, "sched_getaffinity"):
        return sysctl("hw.perflevel0.physicalcpu") or sysctl("hw.physicalcpu") or os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def sysctl(name: str) -> int:
    """Return a number that macOS has under this name; 0 if it has none, or this is another system."""
    if sys.platform != "darwin":
        return 0
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)  # a number of 4 bytes fills the lower half
    missing = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if missing else value.value


def thread_count(threads: int | None = None) -> int:
    """Return the number of threads to compute with.

    Args:
        threads: a number asked for; None takes NUMBA_NUM_THREADS or OMP_NUM_THREADS where set, else one thread for
            each physical core that this process may use.

    Raises:
        ConfigError: if a number is not positive or above MAX_THREADS.
    """
    if threads is not None:
        threads = int(checked("threads", threads, int))
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads={threads}: must be at least 1 and at most {MAX_THREADS}")
        return threads
    return threads_in("NUMBA_NUM_THREADS") or threads_in("OMP_NUM_THREADS") or physical_cores()


def threads_in(variable: str) -> int | None:
    """Return the number of threads that an environment variable asks for; None if it is not set.

    Raises:
        ConfigError: if it is not positive or above MAX_THREADS.
    """
    # OMP_NUM_THREADS may be a list, one number for each level of nesting.
    value = os.environ.get(variable, "").partition(",")[0].strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 9 and 1 <= int(value) <= MAX_THREADS):
        raise ConfigError(f"{variable}={value}: must be a positive number, at most {MAX_THREADS}")
    return int(value)
