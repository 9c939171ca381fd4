"""`python -m sim.traces`: describe a trace, convert it to the native format, or generate a synthetic one.

Everything beyond the standard library is imported late, so that Ctrl-C is answered in one line however early it
comes.
"""

from __future__ import annotations

import sys

from sim.command_line import answer_interrupts, run_command

_PROGRAM = "python -m sim.traces"
_DESCRIPTION = "Describe a trace, convert it to the native format, or generate a synthetic one."


def _run(arguments: list[str]) -> None:
    from sim.traces.commands import run

    run(_PROGRAM, _DESCRIPTION, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: _run(given))


if __name__ == "__main__":
    answer_interrupts()
    import sim.traces.commands  # noqa: F401 - takes the better part of a second

    sys.exit(main())
