"""List the questions that the experiments answer."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from sim.command_line import run_command

FOLDER = Path(__file__).parent


def questions() -> list[tuple[str, str]]:
    """Return (module, question) for each experiment: the first line of its docstring.

    Files whose name starts with an underscore are parts of an experiment. Nothing is imported.
    """
    found = []
    for file in sorted(FOLDER.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found.append((file.stem, docstring.partition("\n")[0]))
    return found


def main() -> None:
    """Print the questions, one line each."""
    found = questions()
    width = max(len(name) for name, _ in found)
    for name, question in found:
        print(f"{name:<{width}}  {question}")
    print("\nRun one with python -m experiments.NAME; --help explains its flags.")


if __name__ == "__main__":
    sys.exit(run_command(main))
