"""Tables whose figures are never cut."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_uncut(table: Table, console: Console) -> None:
    """Print a table as wide as it is: a terminal that is too narrow wraps the lines, and cut figures are of no use."""
    needed = Measurement.get(console, console.options.update(width=1000), table).maximum
    Console(file=console.file, width=max(needed, console.width)).print(table)
