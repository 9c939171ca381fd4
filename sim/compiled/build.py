"""Compile allocator and simulator with mypyc: the very modules that are in the sources, nothing is written twice."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path

from rich.console import Console

from sim.compiled.packages import PACKAGES, digest, find, folder, is_complete, seal

_ALLOCATOR = """
admission batch births blocks chunk_history coasting content content_base decoding lifetimes manager matching pool
prefilling prefix retaining ring sequence sharing state stats swapping tables
"""
_SIM = """
arrivals cost recorder replica request stretch
scheduler/admission scheduler/alike scheduler/job scheduler/places scheduler/plan scheduler/preemption
scheduler/scheduler
"""
MODULES = [f"allocator/{name}.py" for name in _ALLOCATOR.split()] + [
    f"sim/{name}.py" for name in _SIM.split()
]
"""What is compiled: where a replay spends its time, but for policies. Those are the users', and what is wrong with
one is told best where everything is interpreted.
"""

_MONTH_S = 30 * 24 * 3600
_SETUP = """
from mypyc.build import mypycify
from setuptools import setup
setup(name="modules", ext_modules=mypycify({}, opt_level="2", debug_level="0"))
"""
_CLASS = re.compile(
    r"^\n((?:@.*\n)*class (\w+)(?!.*\((?:Protocol|NamedTuple)\)).*:$)", re.MULTILINE
)  # and the empty line before, so that lines keep their numbers
_IMPORTS = "from __future__ import annotations"
_MORE_IMPORTS = "; import _abc; from abc import ABCMeta; from mypy_extensions import mypyc_attr"


def compiled_packages(root: Path, console: Console) -> Path:
    """Return a folder with the packages of `root`, compiled; compile them if nobody has.

    Raises ValueError where mypy, setuptools or a C compiler is missing, the modules do not compile, or the folder
    cannot be written.
    """
    for name in ("mypy", "setuptools"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"{name} is not installed, and compiling needs it: pip install mypy setuptools"
            ) from None
    target = find(root)
    if target is not None:
        return target
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        raise ValueError(f"{compiler} is not installed, and compiling needs a C compiler (CC names another)")
    try:
        return _build(root, console)
    except OSError as error:
        raise ValueError(f"the cache ({folder()}) cannot be written: {error.strerror}") from None


def _build(root: Path, console: Console) -> Path:
    kept = folder()
    kept.mkdir(parents=True, exist_ok=True)
    notice = "compiling the allocator and the simulator, once: a minute or two"
    if not console.is_terminal:
        console.print(notice)
    with tempfile.TemporaryDirectory(dir=kept, prefix="build-") as scratch, console.status(notice):
        made = Path(scratch) / "packages"
        for package in PACKAGES:
            shutil.copytree(root / package, made / package, ignore=shutil.ignore_patterns("__pycache__"))
        target = kept / digest(made)  # of what was copied: somebody may be editing
        for module in MODULES:
            path = made / module
            path.write_text(opened(path.read_text()))
        _compile(made)
        shutil.rmtree(made / "build")
        shutil.rmtree(made / ".mypy_cache", ignore_errors=True)
        seal(made)
        if not is_complete(target):  # somebody else may have been faster
            if target.exists():
                target.rename(Path(scratch) / "damaged")
            made.rename(target)
    _clear_out(kept)
    return target


def _clear_out(kept: Path) -> None:
    """Remove what nobody has used for a month: packages of sources that are no more, 6 MB each."""
    for each in kept.iterdir():
        with contextlib.suppress(OSError):  # somebody else may do the same
            if each.stat().st_mtime < time.time() - _MONTH_S:
                shutil.rmtree(each)


def opened(source: str) -> str:
    """Return a module's source with every class as open as an interpreted one.

    mypyc's classes are closed to subclasses that are not compiled, unless they say otherwise. And what it makes of an
    abstract class goes on using its base's register of subclasses: what is an instance of one would be one of all.
    A decorator that mypyc does not know makes a class an interpreted one; that for help() is left out.
    """
    names: list[str] = []

    def decorated(found: re.Match[str]) -> str:
        names.append(found[2])
        return f"@mypyc_attr(allow_interpreted_subclasses=True)\n{found[1]}"

    text = source.replace(_IMPORTS, _IMPORTS + _MORE_IMPORTS, 1).replace("@with_field_docs\n", "\n")
    text = _CLASS.sub(decorated, text)
    registers = "".join(f"if isinstance({name}, ABCMeta):\n    _abc._abc_init({name})\n" for name in names)
    return f"{text}\n{registers}"


def _compile(folder: Path) -> None:
    options = ["--ignore-missing-imports", *MODULES]
    with subprocess.Popen(
        [sys.executable, "-c", _SETUP.format(options), "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ
        | {"TMPDIR": str(folder.parent)},  # what the compiler leaves when it is killed goes, too
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:  # interrupted: the C compiler that was started must not go on
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        lines = [line for line in output.splitlines() if line.strip()]
        wrong = next((line for line in lines if "error:" in line), lines[-1] if lines else "no word of why")
        raise ValueError(f"allocator and sim do not compile: {wrong.strip()}")
