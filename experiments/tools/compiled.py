"""Compile the inner loops of allocator and simulator: the same results, in half the time.

    python -m experiments.tools.compiled
    python -m experiments.tools.compiled sim.replay TRACE --out results/run

The first compiles them, once, in a minute or two; the second runs a command as well. It needs mypy, setuptools and a C
compiler (`pip install -e '.[compiled]'`). mypyc turns the very modules that are in the sources into C; nothing is
written twice. What it makes is kept in $XDG_CACHE_HOME/paged-kv-lab/compiled (or ~/.cache/...) and found again by the
content of the sources, so that whoever edits them never runs what was compiled before.

From then on every command that replays requests runs what is compiled, and says so in its manifest; but for the
fuzzer, which is to see every line, and for what runs in a debugger or a profiler. To run the sources all the same, set
PAGED_KV_LAB_INTERPRETED=1.

What you write yourself, an eviction policy for example, is interpreted as ever, and need not know; every compiled class
can be subclassed. What is compiled cannot be patched, traced or profiled line by line, and says less clearly what is
wrong with an argument of a wrong type.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import answer_interrupts

    answer_interrupts()

import sys
from importlib.util import find_spec

from rich.console import Console

from sim.command_line import run_command, when_ended
from sim.compiled.build import compiled_packages
from sim.compiled.packages import become, sources


def main(arguments: list[str]) -> None:
    """Compile if need be, and become the command, if one is given."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    module, rest = arguments[0] if arguments else None, arguments[1:]
    if module is not None and not _is_module(module):
        raise ValueError(f"module ({module}) must be one that python -m can run, for example sim.replay")
    root = sources()
    with when_ended("nothing is compiled"):
        target = compiled_packages(root, Console(stderr=True))
    if module is None:
        print(f"compiled in {target}: commands run it from now on, until the sources change")
        return
    become(["-m", module, *rest], target, root)


def _is_module(name: str) -> bool:
    try:
        return not name.startswith("-") and find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
