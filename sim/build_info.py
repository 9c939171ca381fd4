"""What code runs, and whether its inner loops are compiled (see sim.compiled)."""

from __future__ import annotations

from pathlib import Path

from sim import replica
from sim.compiled.packages import sources


def is_compiled() -> bool:
    """Return whether the inner loops of allocator and simulator are compiled."""
    return Path(replica.__file__).suffix != ".py"


def what_runs() -> str:
    """Return a sentence that says whether it is."""
    if is_compiled():
        return "Allocator and engine are compiled."
    return "Allocator and engine are interpreted; experiments.tools.compiled compiles them."


def source_file() -> Path:
    """Return a source file of what runs."""
    return sources() / "sim" / Path(__file__).name
