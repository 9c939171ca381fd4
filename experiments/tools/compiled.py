"""Run a command with the inner loops of allocator and simulator compiled: the same results, sooner.

    python -m experiments.tools.compiled sim.replay TRACE --out results/run
    python -m experiments.tools.compiled experiments.bench.simulator

mypyc turns the very modules that are in the sources into C; nothing is written twice. The first run takes some minutes
for that, and needs mypy, setuptools and a C compiler (`pip install -e '.[compiled]'`); what it makes is kept in
$XDG_CACHE_HOME/paged-kv-lab (or ~/.cache) and found again by the content of the sources, so that whoever edits them
never runs what was compiled before.

What you write yourself, an eviction policy for example, is interpreted as ever, and need not know; every compiled class
can be subclassed. What is compiled cannot be patched, traced or profiled line by line, and says less clearly what is
wrong with an argument of a wrong type: write and test without.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import answer_interrupts

    answer_interrupts()

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

import allocator
from kernels.toolkit import cache_dir
from sim.build_info import SOURCES_VARIABLE
from sim.command_line import run_command

_ALLOCATOR = """
admission batch blocks chunk_history coasting content content_base decoding lifetimes manager matching pool prefilling
prefix retaining ring sequence sharing state stats swapping tables
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

_PACKAGES = ("allocator", "sim")
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


def sources() -> Path:
    """Return the folder in which the packages are that run now."""
    return Path(allocator.__file__).resolve().parent.parent


def digest(root: Path) -> str:
    """Return what the compiled modules depend on, in 32 hexadecimal digits."""
    how = Path(__file__).read_bytes()
    found = hashlib.sha256(repr((sys.version, metadata.version("mypy"), how)).encode())
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_bytes()
            found.update(f"{path.relative_to(root)} {len(text)}\n".encode() + text)
    return found.hexdigest()[:32]


def compiled_packages(root: Path, console: Console) -> Path:
    """Return a folder with the packages of `root`, compiled; compile them if nobody has.

    Raises ValueError where mypy, setuptools or a C compiler is missing, or the modules do not compile.
    """
    for name in ("mypyc", "setuptools"):
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed, and compiling needs it: pip install mypy setuptools")
    target = cache_dir() / f"modules-{digest(root)}"
    if target.is_dir():
        return target
    with (
        tempfile.TemporaryDirectory(dir=cache_dir(), prefix="build-") as scratch,
        console.status("compiling the allocator and the simulator, once: some minutes"),
    ):
        folder = Path(scratch) / "modules"
        for package in _PACKAGES:
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        for module in MODULES:
            path = folder / module
            path.write_text(opened(path.read_text()))
        _compile(folder)
        shutil.rmtree(folder / "build")
        shutil.rmtree(folder / ".mypy_cache", ignore_errors=True)
        if not target.is_dir():  # somebody else may have been faster
            folder.rename(target)
    return target


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


def environment(target: Path, root: Path) -> dict[str, str]:
    """Return the environment in which a command, and all processes it starts, finds the compiled packages first."""
    # Without PYTHONSAFEPATH, Python would look in the current folder before; users' own modules are there, too.
    paths = [str(target), os.getcwd(), str(root), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",
        SOURCES_VARIABLE: str(root),
    }


def main(arguments: list[str]) -> None:
    """Compile if need be, and become the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    module, *rest = arguments
    try:
        known = not module.startswith("-") and find_spec(module) is not None
    except (ImportError, ValueError):
        known = False
    if not known:
        raise ValueError(f"module ({module}) must be one that python -m can run, for example sim.replay")
    root = sources()
    target = compiled_packages(root, Console(stderr=True))
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *rest], environment(target, root))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
