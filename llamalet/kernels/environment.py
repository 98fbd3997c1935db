"""Imports numba safely: bad values of its variables would end in a traceback, or in LLVM ending the process."""

import os
import re
import warnings

from llamalet.cores import threads_in
from llamalet.errors import ConfigError, UsageError, note

UNREADABLE = re.compile(r"Environment variable '(\w+)' is defined but its associated value")
FEATURES = re.compile(r"([+-][\w.-]+(,[+-][\w.-]+)*)?")


def check_variables() -> None:
    """Raise a ConfigError about a variable that would keep numba from being imported, or the kernels from starting."""
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        threads_in(variable)
    features = os.environ.get("NUMBA_CPU_FEATURES", "")
    if not FEATURES.fullmatch(features):
        raise ConfigError(f"NUMBA_CPU_FEATURES={features}: must be names with + or - before them, as in +avx2,-avx512f")


def import_numba() -> bool:
    """Import numba; a variable that it cannot read is ignored, with a line on stderr.

    Returns:
        Whether numba compiles, which NUMBA_DISABLE_JIT can switch off.

    Raises:
        ConfigError: see check_variables.
        UsageError: if it cannot be imported.
    """
    check_variables()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import numba
        except (ImportError, OSError) as error:
            raise UsageError(
                f"numba cannot be imported ({error}); the runtime works without it: backend=numpy"
            ) from None
    for warning in caught:
        if found := UNREADABLE.match(str(warning.message)):
            note(f"llamalet: {found[1]}={os.environ.get(found[1])}: not a value that numba can read; ignored")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return not numba.config.DISABLE_JIT
