"""Where the compiled packages are, and which commands run them: those that are started once they have been made.

Imports nothing beyond the standard library, as every command asks this first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path

import allocator

PACKAGES = ("allocator", "sim")
SOURCES_VARIABLE = "PAGED_KV_LAB_SOURCES"
"""Environment variable: the folder of the sources that what runs was compiled from."""
INTERPRETED_VARIABLE = "PAGED_KV_LAB_INTERPRETED"
"""Environment variable: set to anything, commands run the sources even where they have been compiled."""


def sources() -> Path:
    """Return the folder of the packages' sources, be what runs them or compiled from them."""
    given = os.environ.get(SOURCES_VARIABLE)
    return Path(given) if given else Path(allocator.__file__).resolve().parent.parent


def folder() -> Path:
    """Return where compiled packages are kept: $XDG_CACHE_HOME (or ~/.cache)/paged-kv-lab/compiled."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "paged-kv-lab" / "compiled"


def digest(root: Path) -> str:
    """Return what the compiled packages of `root` depend on, in 32 hexadecimal digits: themselves, mypy, and Python."""
    found = hashlib.sha256(repr((sys.version, EXTENSION_SUFFIXES[0], metadata.version("mypy"))).encode())
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_bytes()
            found.update(f"{path.relative_to(root)} {len(text)}\n".encode() + text)
    return found.hexdigest()[:32]


def find(root: Path) -> Path | None:
    """Return the folder of the compiled packages of `root`, as it is now; None if nobody has compiled them."""
    if not folder().is_dir():  # as a rule, and quickly said
        return None
    try:
        found = folder() / digest(root)
    except (OSError, metadata.PackageNotFoundError):
        return None
    if not found.is_dir():
        return None
    with contextlib.suppress(OSError):  # a folder that is only read is as good
        os.utime(found)  # so that what nobody uses any more can be told
    return found


def environment(target: Path, root: Path) -> dict[str, str]:
    """Return the environment in which a command, and all processes it starts, finds the compiled packages first."""
    # Without PYTHONSAFEPATH, Python would look in the current folder before; users' own modules are there, too.
    paths = [str(target), os.getcwd(), str(root), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",
        SOURCES_VARIABLE: str(root),
    }


def prefer_compiled(command: ModuleSpec | None) -> None:
    """Start a command over with the compiled packages, if there are any of these very sources.

    To be called by a module that is run, with its __spec__, ahead of its imports. One that runs within another, a
    profiler or a debugger, stays as it is: those are to see the sources.
    """
    if os.environ.get(INTERPRETED_VARIABLE) or os.environ.get(SOURCES_VARIABLE) or not _was_called(command):
        return
    root = sources()
    target = find(root)
    if target is not None:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment(target, root))


def _was_called(command: ModuleSpec | None) -> bool:
    """Return whether Python was called with -m for this module."""
    given = sys.orig_argv[1:]
    if command is None or "-m" not in given[:-1]:
        return False
    module = given[given.index("-m") + 1]
    return command.name in (module, f"{module}.__main__")
