"""Write what a run leaves: a folder that is either whole or visibly not.

A result folder is whole if and only if it has a summary.json. Everything is first written into a staging folder
inside it; publishing removes the summary of an earlier result, moves the files over one by one, and puts the new
summary last. Whatever interrupts a run therefore leaves the earlier result untouched, or no summary.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import polars as pl

from sim.event_table import run_events
from sim.records import Columns, RunResult
from sim.stored import StoredColumns

MANIFEST, SUMMARY = "manifest.json", "summary.json"
REQUESTS, TIMELINE, EVENTS = "requests.parquet", "timeline.parquet", "events.parquet"
PERFETTO = "timeline.perfetto-trace"
FIGURES = "figures"
FIGURE_FILES = tuple(
    f"{FIGURES}/{name}.{ending}"
    for name in ("utilization", "latency", "block_map")
    for ending in ("png", "svg")
)
RUN_FILES = (MANIFEST, SUMMARY, REQUESTS, TIMELINE, EVENTS, PERFETTO, *FIGURE_FILES)
"""All that a run may leave."""

_STAGING_PREFIX = ".unfinished-"
_ROW_GROUP = 1 << 18


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write JSON as text that diffs well. Raises ValueError for NaN or infinity: absent figures are null."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_columns(columns: Columns, path: Path) -> None:
    """Write columns of equal length as Parquet, rows in order.

    The bytes depend on nothing but the columns and the version of polars: no time, no name, one thread's order.
    Raises OSError where the file cannot be written.
    """
    if isinstance(columns, StoredColumns) and columns.num_rows > _ROW_GROUP:
        _write_stored(columns, path)
    else:
        write_frame(_frame(columns), path)


def _frame(columns: Columns) -> pl.DataFrame:
    return pl.DataFrame({name: pl.Series(name, column) for name, column in columns.items()})


def _write_stored(columns: StoredColumns, path: Path) -> None:
    """Write columns that are too long for memory: in parts, which are then joined."""
    with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=path.parent) as folder:
        parts = []
        for number, part in enumerate(columns.parts()):
            parts.append(Path(folder) / f"{number:08}.parquet")
            write_frame(_frame(part), parts[-1])
        try:
            pl.scan_parquet(parts, glob=False).sink_parquet(
                path, compression="zstd", compression_level=3, row_group_size=_ROW_GROUP, maintain_order=True
            )
        except pl.exceptions.ComputeError as error:
            raise OSError(errno.EIO, str(error).rpartition("IO error: ")[2], str(path)) from None


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Write a table as Parquet, as `write_columns` does."""
    try:
        frame.write_parquet(path, compression="zstd", compression_level=3, row_group_size=_ROW_GROUP)
    except pl.exceptions.ComputeError as error:  # a full disk, wrapped in words on Parquet
        raise OSError(errno.EIO, str(error).rpartition("IO error: ")[2], str(path)) from None


def check_replaceable(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError if something in the folder keeps files of these names, relative paths, from being written."""
    for name in names:
        path = folder / name
        if path.is_dir():
            raise ValueError(
                f"out ({folder}) cannot be written: {path} is a folder, and must be a file or absent"
            )
        if path.parent.exists() and not path.parent.is_dir():
            raise ValueError(f"out ({folder}) cannot be written: {path.parent} must be a folder or absent")


class ResultFolder:
    """The folder a run's files go to, as a context: enter before the run, `publish` after it.

    Entering creates the folder and a staging folder within, so that a place that cannot be written is found out
    before anything is computed; it raises ValueError, naming the folder and the reason. So is something in the way
    of the files to be written, `names`, and another run that writes there: the folder is locked until it is left.
    Leaving without having published removes the staging folder, and the folders that entering made. What a run
    that was killed could not remove goes when the next one enters.

    A folder that already holds a result is overwritten: its own files are replaced, figures and tables that the
    new run does not write are removed, and files of any other name are left alone.
    """

    def __init__(self, path: Path, names: Iterable[str] = RUN_FILES) -> None:
        self.path = path
        self._names = tuple(names)
        self._lock: int | None = None
        self._made: list[Path] = []
        self._staging: Path | None = None

    @property
    def staging(self) -> Path:
        """Where to write; raises ValueError outside the context."""
        if self._staging is None:
            raise ValueError(f"out ({self.path}) is not open")
        return self._staging

    def __enter__(self) -> ResultFolder:
        try:
            for folder in (*reversed(self.path.parents), self.path):
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            self._lock = _locked(self.path)
            check_replaceable(self.path, self._names)
            if self._lock is not None:  # else another run may be at work here
                for left in self.path.glob(f"{_STAGING_PREFIX}*/"):
                    shutil.rmtree(left, ignore_errors=True)
            self._staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=self.path))
        except OSError as error:
            self._leave()
            raise ValueError(f"out ({self.path}) cannot be written: {error.strerror}") from None
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        staging = self._staging
        self._leave()
        if isinstance(value, OSError) and staging is not None and _of_writing(value, staging):
            raise ValueError(f"out ({self.path}) cannot be written: {value.strerror or value}") from None

    def _leave(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        while self._made:
            try:
                self._made.pop().rmdir()  # refuses a folder with anything in it
            except OSError:
                self._made.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a folder for what is needed only while the run lasts; it is not published."""
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=self.staging) as folder:
            yield Path(folder)

    def write_tables(self, result: RunResult) -> None:
        """Stage requests.parquet and timeline.parquet, and events.parquet if the run kept its events."""
        write_columns(result.requests, self.staging / REQUESTS)
        write_columns(result.timeline, self.staging / TIMELINE)
        events = run_events(result)
        if events is not None:
            write_frame(events, self.staging / EVENTS)

    def write_manifest(self, document: dict[str, Any]) -> None:
        """Stage manifest.json."""
        write_json(document, self.staging / MANIFEST)

    def write_summary(self, document: dict[str, Any]) -> None:
        """Stage summary.json."""
        write_json(document, self.staging / SUMMARY)

    def publish(self) -> list[Path]:
        """Move what was staged into place and return the paths, summary.json last."""
        names = sorted(
            (found.relative_to(self.staging) for found in self.staging.rglob("*") if found.is_file()),
            key=lambda name: (name == Path(SUMMARY), name == Path(MANIFEST), name),
        )
        try:
            (self.path / SUMMARY).unlink(missing_ok=True)
            for stale in self._earlier_files():
                if stale.relative_to(self.path) not in names:
                    stale.unlink()
            for name in names:
                (self.path / name).parent.mkdir(exist_ok=True)
                os.replace(self.staging / name, self.path / name)
        except OSError as error:
            raise ValueError(f"out ({self.path}) cannot be written: {error}") from None
        return [self.path / name for name in names]

    def _earlier_files(self) -> list[Path]:
        """Files that only a result has, left here by an earlier run."""
        names = dict.fromkeys((*RUN_FILES, *self._names))
        return [self.path / name for name in names if (self.path / name).is_file()]


def _locked(folder: Path) -> int | None:
    """Lock a folder and return the descriptor that holds the lock; None where the file system has no locks.

    The lock is on the folder itself: it leaves no file, and ends with the process, however that ends. Raises
    ValueError if another run holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"out ({folder}) is being written by another run") from None
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return descriptor


def _of_writing(error: OSError, staging: Path) -> bool:
    """Return whether an error arose in writing to `staging`, as one without a name did, but for a closed pipe."""
    if error.filename is None:
        return not isinstance(error, BrokenPipeError)
    return staging in Path(os.fsdecode(error.filename)).parents
