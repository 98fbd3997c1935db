"""Which model, and how it runs: what every command has."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamalet.command import nothing_to_lose
from llamalet.convert.formats import Check
from llamalet.errors import note
from llamalet.runtime import BACKENDS, Model

OUT = Path("out")
DEMO_MODEL = Path(__file__).parent / "assets" / "demo.bin"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How the model runs."""

    tokenizer: str | None = None
    """the tokenizer's file; the one inside the model or beside it if not given"""
    dtype: str | None = None
    """what the weights become: f32, bf16, q8 or q4; they keep their width if not given"""
    threads: int | None = None
    """number of threads; one for each physical core if not given"""
    backend: str = BACKENDS[0]
    """numba, or numpy, which is slow and needs no compiler"""
    kv: Literal["f32", "bf16", "q8"] | None = None
    """how the KV cache keeps numbers: f32, bf16 or q8; f32 for a float32 model, else bf16, if not given"""
    verify: bool | None = None
    """verify the checksums of a large .bin or a checkpoint too; --no-verify skips even a small .bin's"""

    def load(self, path: str | Path, check: Check | None = None) -> Model:
        """Open the model at a path; `check` looks at it before what takes long."""
        with nothing_to_lose():
            return Model.load(
                path, dtype=self.dtype, tokenizer=self.tokenizer, backend=self.backend, threads=self.threads,
                kv=self.kv, verify=self.verify, check=check,
            )  # fmt: skip


def choose_model() -> Path:
    """Return the newest .bin under out/, or the demo model if there is none."""
    found = [path for path in OUT.rglob("*.bin") if not path.name.endswith(".tokenizer.bin")]
    if not found:
        note(f"no model named and no .bin under {OUT}/: taking the demo model {DEMO_MODEL}")
        return DEMO_MODEL
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime))
    note(f"no model named: taking the newest under {OUT}/, {newest} of {made}")
    return newest
