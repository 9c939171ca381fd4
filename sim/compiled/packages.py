"""Where the compiled packages are, and which commands run them: those that are started once they have been made.

Imports next to nothing, as every command asks this first, before it answers Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from typing import NoReturn

import allocator

PACKAGES = ("allocator", "sim")
SOURCES_VARIABLE = "PAGED_KV_LAB_SOURCES"
"""Environment variable: the folder of the sources that what runs was compiled from."""
INTERPRETED_VARIABLE = "PAGED_KV_LAB_INTERPRETED"
"""Environment variable: set to 1, commands run the sources even where they have been compiled."""
_CONTENTS = "contents"
"""File in the folder of compiled packages: what belongs there, and how large it is."""


def sources() -> Path:
    """Return the folder of the packages' sources, be what runs them or compiled from them."""
    given = os.environ.get(SOURCES_VARIABLE)
    return Path(given) if given else Path(allocator.__file__).resolve().parent.parent


def folder() -> Path:
    """Return where compiled packages are kept: $XDG_CACHE_HOME (or ~/.cache)/paged-kv-lab/compiled.

    Compiled kernels are beside it, but neither package may know the other.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "paged-kv-lab" / "compiled"


def digest(root: Path) -> str:
    """Return what the compiled packages of `root` depend on, in 32 hexadecimal digits: themselves, mypy, and Python.

    Raises PackageNotFoundError, a ModuleNotFoundError, without mypy.
    """
    import hashlib
    from importlib import metadata

    found = hashlib.sha256(repr((sys.version, EXTENSION_SUFFIXES[0], metadata.version("mypy"))).encode())
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_bytes()
            found.update(f"{path.relative_to(root)} {len(text)}\n".encode() + text)
    return found.hexdigest()[:32]


def find(root: Path) -> Path | None:
    """Return the folder of the compiled packages of `root`, as it is now; None if nobody has compiled them.

    None, too, where something of theirs has gone missing since.
    """
    if not folder().is_dir():  # as a rule, and quickly said
        return None
    try:
        found = folder() / digest(root)
    except (OSError, ModuleNotFoundError):
        return None
    if not is_complete(found):
        return None
    with suppress(OSError):  # a folder that is only read is as good
        os.utime(found)  # so that what nobody uses any more can be told
    return found


def is_complete(target: Path) -> bool:
    """Return whether there are compiled packages, and all that was there when they were sealed."""
    try:
        return (target / _CONTENTS).read_text() == _contents(target)
    except OSError:
        return False


def _contents(target: Path) -> str:
    """Return the names and sizes of all files of compiled packages, a line each."""
    lines = []
    for package in PACKAGES:
        for place, _, names in os.walk(target / package):
            if not place.endswith("__pycache__"):
                lines += [os.path.join(place, name) for name in names]
    lines += [str(path) for path in target.glob("*.so")]
    return "".join(sorted(f"{os.path.relpath(line, target)} {os.stat(line).st_size}\n" for line in lines))


def seal(target: Path) -> None:
    """Note what belongs to compiled packages: they are complete."""
    (target / _CONTENTS).write_text(_contents(target))


def environment(target: Path, root: Path) -> dict[str, str]:
    """Return the environment in which Python, called with -P, finds the compiled packages first.

    Then the current folder, where users' own modules are, unless Python was told not to look there. Raises ValueError
    where a folder cannot stand in PYTHONPATH, or the current one is no more.
    """
    try:
        paths = [str(target), *([] if sys.flags.safe_path else [os.getcwd()]), str(root)]
    except OSError as error:
        raise ValueError(f"the current folder cannot be read: {error.strerror}") from None
    for path in paths:
        if os.pathsep in path:
            raise ValueError(f"the name of the folder ({path}) must not contain {os.pathsep!r}")
    paths.insert(-1, os.environ.get("PYTHONPATH", ""))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        SOURCES_VARIABLE: str(root),
    }


def become(arguments: list[str], target: Path, root: Path) -> NoReturn:
    """Run Python anew with these arguments and the compiled packages. Raises ValueError as `environment` does."""
    found = environment(target, root)
    os.execve(sys.executable, [sys.executable, "-P", *arguments], found)


def prefer_compiled(command: ModuleSpec | None) -> None:
    """Start a command over with the compiled packages, if there are any of these very sources.

    To be called by a module that is run, with its __spec__, ahead of its imports. One that runs within another, a
    profiler or a debugger, stays as it is: those are to see the sources.
    """
    told_not_to = os.environ.get(INTERPRETED_VARIABLE, "0") not in ("", "0")
    if told_not_to or os.environ.get(SOURCES_VARIABLE) or not _was_called(command):
        return
    root = sources()
    target = find(root)
    if target is not None:
        with suppress(ValueError):
            become(sys.orig_argv[1:], target, root)


def _was_called(command: ModuleSpec | None) -> bool:
    """Return whether Python was called with -m for this module."""
    given = sys.orig_argv[1:]
    if command is None or "-m" not in given[:-1]:
        return False
    module = given[given.index("-m") + 1]
    return command.name in (module, f"{module}.__main__")
