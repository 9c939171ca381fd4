"""Where the code that runs comes from, and whether it is compiled (see experiments.tools.compiled)."""

from __future__ import annotations

import os
from pathlib import Path

from sim import replica

SOURCES_VARIABLE = "PAGED_KV_LAB_SOURCES"
"""Environment variable: the folder of the sources that what runs was compiled from."""


def is_compiled() -> bool:
    """Return whether the inner loops of allocator and simulator are compiled."""
    return Path(replica.__file__).suffix != ".py"


def what_runs() -> str:
    """Return a sentence that says whether it is."""
    if is_compiled():
        return "Allocator and engine are compiled."
    return "Allocator and engine are interpreted; experiments.tools.compiled runs them compiled."


def source_file() -> Path:
    """Return a source file of what runs."""
    here = Path(__file__).resolve()
    root = os.environ.get(SOURCES_VARIABLE)
    return Path(root, "sim", here.name) if root and is_compiled() else here
