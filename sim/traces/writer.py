"""write_trace: put requests into a native Parquet file, however many there are."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, takewhile
from threading import Event
from typing import IO, Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from sim.request import Request
from sim.target import check_target
from sim.traces.native import LISTS, SAMPLE_ROWS, SCALARS, SCHEMA, batch_rows


def write_trace(trace: Iterable[Request], path: str | os.PathLike[str]) -> int:
    """Write a trace as native Parquet, to be read back request by request as it is; return how many requests.

    The requests are walked through once, and only some thousands of them are held at a time. The file appears
    whole or not at all: it is written beside its place, then moved there. Raises OSError, with the file's name,
    where `check_target` does and when the disk is full, and whatever the walk raises.
    """
    target = check_target(path)
    partial = target.with_name(
        f".unfinished-{secrets.token_hex(8)}"
    )  # a short name fits where the target's does
    try:
        with partial.open("xb", buffering=0) as file:
            count = _write(trace, file)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write(trace: Iterable[Request], file: io.FileIO) -> int:
    """Write requests batch by batch, a row group each; return how many.

    polars runs in a thread of its own, as the main one does not see Ctrl-C while it waits inside polars.
    """
    stopped = Event()
    requests = takewhile(lambda _: not stopped.is_set(), trace)
    count = 0
    head = list(islice(requests, SAMPLE_ROWS))
    rows = batch_rows(len(head), sum(request.named_tokens // max(request.granularity, 1) for request in head))

    def frames(*_: object) -> Iterator[pl.DataFrame]:
        nonlocal count
        all_requests = chain(head, requests)
        while batch := list(islice(all_requests, rows)):
            count += len(batch)
            yield _frame(batch)

    sink = _Sink(file)
    source = register_io_source(frames, schema=SCHEMA, is_pure=False)

    def write() -> None:
        target = cast(IO[bytes], sink)
        source.sink_parquet(target, row_group_size=rows, maintain_order=True, engine="streaming")

    try:
        with ThreadPoolExecutor(1) as executor:
            try:
                executor.submit(write).result()
            except BaseException:
                stopped.set()  # and the thread is waited for
                raise
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        if sink.failed is not None:
            raise sink.failed from None
        raise
    return count


class _Sink(io.RawIOBase):
    """A file that remembers why it could not be written, which polars does not tell."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.failed: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.failed = error
            raise
        return size


def _frame(batch: list[Request]) -> pl.DataFrame:
    columns = {name: [getattr(request, name) for request in batch] for name in SCALARS}
    frame = pl.DataFrame(columns, schema={name: SCHEMA[name] for name in SCALARS})
    lists = [_list_column(name, [getattr(request, name) for request in batch]) for name in LISTS]
    return frame.with_columns(lists).select(list(SCHEMA))


def _list_column(name: str, arrays: list[NDArray[Any] | None]) -> pl.Series:
    """Return arrays as one column; a list of arrays handed to polars as it is would take ten times as long."""
    present = [(row, array) for row, array in enumerate(arrays) if array is not None]
    if not present:
        return pl.Series(name, [None] * len(arrays), dtype=SCHEMA[name])
    rows = np.repeat(np.array([row for row, _ in present]), np.array([len(array) for _, array in present]))
    flat = pl.DataFrame({"row": rows, name: np.concatenate([array for _, array in present])})
    lists = flat.group_by("row", maintain_order=True).agg(name)
    every = pl.DataFrame({"row": np.arange(len(arrays))})
    return every.join(lists, on="row", how="left", maintain_order="left")[name].cast(SCHEMA[name])
