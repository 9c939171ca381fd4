"""How far a tool is, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY_S = 10.0
"""Seconds between two lines."""


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yield a function to be told how many units are done, and in a few words what is being done now.

    Where stderr is no terminal, the first line comes at once, and further ones whatever has been told since: of a unit
    that takes minutes, it shows that it goes on.
    """
    console = Console(stderr=True)
    shown = _bar if console.is_terminal else _lines
    with shown(what, total, unit, console) as tell:
        yield tell


@contextmanager
def _bar(what: str, total: int, unit: str, console: Console) -> Iterator[Callable[[int, str], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, now: bar.update(
            task, completed=min(done, total), description=f"{what} {now}".rstrip()
        )


@contextmanager
def _lines(what: str, total: int, unit: str, _: Console) -> Iterator[Callable[[int, str], None]]:
    told = (0, "")
    over = threading.Event()

    def say() -> None:
        done, now = told
        text = f"{what}: {min(done, total):,} of {total:,} {unit}" + (f"; {now}" if now else "")
        print(text, file=sys.stderr, flush=True)

    def go_on() -> None:
        while not over.wait(EVERY_S):
            say()

    def tell(done: int, now: str) -> None:
        nonlocal told
        told = done, now

    say()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        over.set()
        thread.join()
