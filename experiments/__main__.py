"""List the questions that the experiments answer."""

from __future__ import annotations

import ast
from pathlib import Path

from rich.console import Console
from rich.table import Table

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
    table = Table.grid(padding=(0, 2))
    for name, question in questions():
        table.add_row(f"[bold]python -m experiments.{name}[/bold]", question)
    console = Console()
    console.print(table)
    console.print("Each explains its flags with --help.")


if __name__ == "__main__":
    main()
