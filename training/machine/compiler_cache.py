"""The folder where torch.compile keeps its results. Uses only the standard library, because it comes before torch."""

import atexit
import getpass
import os
import re
import shutil
import tempfile

from llamalet.errors import note

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def ensure_folder() -> None:
    """Take a temporary folder if torch's own cannot be written to, which would end the import of its compiler."""
    folder = os.environ.get(VARIABLE) or _default_folder()
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "not writable", folder)
    except OSError as error:
        os.environ[VARIABLE] = temporary = tempfile.mkdtemp(prefix="llamalet-compiler-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        note(f"torch's compiler cache: {error.filename}: {error.strerror}; taking a temporary folder")


def _default_folder() -> str:
    """Return torch's choice. Source: torch/_inductor/runtime/cache_dir_utils.py."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
