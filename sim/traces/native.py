"""The project's own trace format: a Parquet file that holds all that a request can say, losslessly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from numpy.typing import NDArray

from allocator.field_docs import field_docs
from sim.request import MAX_GRANULARITY, MAX_TIME_PS, Request
from sim.traces.fields import FieldError, Row, listed, tokens
from sim.traces.formats import Rows, TraceFormat
from sim.traces.lines import open_error
from sim.traces.trace import TraceError

MAGIC = b"PAR1"

STREAMED_REQUESTS = 2**20
"""Files of more requests than this, a million or so, are not kept in memory."""

BATCH_ROWS = 2**16
"""Rows that are held at once, when a file is written or read; fewer where they have many ids."""

_BATCH_IDS = 2**21
SAMPLE_ROWS = 1024
"""Rows from whose ids it is told how many rows to hold at once."""

SCHEMA: dict[str, pl.DataType] = {
    "arrival_ps": pl.Int64(),
    "prompt_tokens": pl.Int64(),
    "output_tokens": pl.Int64(),
    "num_samples": pl.Int64(),
    "beam_width": pl.Int64(),
    "parent": pl.Int64(),
    "think_ps": pl.Int64(),
    "priority": pl.Int64(),
    "salt": pl.String(),
    "granularity": pl.Int64(),
    "named_tokens": pl.Int64(),
    "chunk_ids": pl.List(pl.Int64()),
    "token_ids": pl.List(pl.Int32()),
}
"""Columns of the file, one row a request; each is a field of Request. Null ids: the trace has none."""

REQUIRED = ("arrival_ps", "prompt_tokens", "output_tokens")
"""Columns that a file must have; the others may be absent."""
LISTS = ("chunk_ids", "token_ids")
SCALARS = tuple(name for name in SCHEMA if name not in LISTS)


class NativeFormat(TraceFormat):
    """Parquet with the columns of SCHEMA, in any order; those not REQUIRED may be absent."""

    name = "native"
    describes = "Parquet, as convert and generate write it"
    arrival_field = "arrival_ps"
    from_first_arrival = False
    keys_are_rows = True

    @classmethod
    def explained(cls) -> str:
        docs = field_docs(Request)
        described = [f"{name} ({_type_text(name)}): {docs[name]}" for name in SCHEMA]
        required, optional = described[: len(REQUIRED)], described[len(REQUIRED) :]
        parts = [
            f"{cls.describes}, a row a request, in order of arrival. Columns that it must have:",
            *required,
            "Columns that may be absent:",
            *optional,
        ]
        return "\n\n".join(" ".join(part.split()) for part in parts)

    def is_large(self, path: Path) -> bool:
        with _parquet_errors(path):
            return _count(_scan(path)) > STREAMED_REQUESTS

    def rows(self, path: Path) -> Rows:
        row = 0
        for frame in _batches(path):
            chunks, token_ids = (_slices(frame, name) for name in ("chunk_ids", "token_ids"))
            columns = [frame[name].to_list() for name in SCALARS]
            for place, values in enumerate(zip(*columns, strict=True)):
                try:
                    found: Row | FieldError = _parse(row, values, chunks(place), token_ids(place))
                except FieldError as error:
                    found = error
                row += 1
                yield row, found


def _type_text(name: str) -> str:
    """Return what a column holds, and what stands for it where it is absent."""
    dtype = SCHEMA[name]
    if isinstance(dtype, pl.List):
        return f"list of {dtype.inner}, or null"
    return str(dtype) if name in REQUIRED else f"{dtype}; {_DEFAULTS[name]!r} if absent"


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Raise what polars and the operating system say about a file as TraceError."""
    try:
        yield
    except OSError as error:
        raise open_error(path, error) from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise TraceError(f"{path}: must be a Parquet file: {' '.join(str(error).split())}") from None


def _scan(path: Path) -> pl.LazyFrame:
    """Return the file's columns, cast to SCHEMA, with defaults in place of the absent ones; nothing is read yet."""
    with path.open("rb") as file:
        whole = file.read(4) == MAGIC and file.seek(0, os.SEEK_END) >= 12
        if whole:
            file.seek(-4, os.SEEK_END)
            whole = file.read(4) == MAGIC
    if not whole:
        raise TraceError(f"{path}: must be a whole Parquet file: it does not begin and end with PAR1")
    # The name is no pattern, and its folders hold no columns.
    scan = pl.scan_parquet(path.absolute(), glob=False, hive_partitioning=False)
    schema = scan.collect_schema()
    columns = []
    for name, dtype in SCHEMA.items():
        if name not in schema:
            if name in REQUIRED:
                raise TraceError(f"{path}: field {name!r} is missing among the columns ({listed(schema)})")
            columns.append(pl.lit(_DEFAULTS.get(name), dtype=dtype).alias(name))
            continue
        found = schema[name]
        if not (found == dtype or (dtype.is_integer() and found.is_integer())):
            raise TraceError(f"{path}: field {name!r} ({found}) must be a column of {dtype}")
        columns.append(pl.col(name).cast(dtype, strict=False))
    return scan.select(columns)


def _count(scan: pl.LazyFrame) -> int:
    """Return how many rows the footer tells of."""
    return int(scan.select(pl.len()).collect().item())


def batch_rows(rows: int, ids: int) -> int:
    """Return how many rows to hold at once where the first `rows` of them have `ids` ids."""
    return max(1, min(BATCH_ROWS, _BATCH_IDS * rows // max(ids, 1)))


def _batches(path: Path) -> Iterator[pl.DataFrame]:
    """Yield the file's rows in order, some thousands at a time."""
    with _parquet_errors(path):
        scan = _scan(path)
        count = _count(scan)
        ids = pl.sum_horizontal(pl.col(name).list.len().sum() for name in LISTS)
        head = scan.head(SAMPLE_ROWS).select(pl.len().alias("rows"), ids.alias("ids")).collect()
        rows = batch_rows(head["rows"].item(), head["ids"].item())
        batches = scan.collect_batches(chunk_size=rows, maintain_order=True)
        found = 0
        while (batch := next(batches, None)) is not None:
            found += len(batch)
            yield batch
        if found != count:  # polars may end as if the file did where a thread of its own has panicked
            raise TraceError(
                f"{path}: must be a whole Parquet file: its footer tells of {count} rows, and {found} can be read"
            )


_DEFAULTS: dict[str, Any] = {
    "num_samples": 1,
    "beam_width": 1,
    "parent": -1,
    "think_ps": 0,
    "priority": 0,
    "salt": "",
    "granularity": 0,
    "named_tokens": 0,
}


def _slices(frame: pl.DataFrame, name: str) -> Callable[[int], NDArray[Any] | None]:
    """Return a function from row to its ids, a view into one array, or None where they are null."""
    column = frame[name]
    present = column.is_not_null().to_numpy()
    ends = column.list.len().fill_null(0).cast(pl.Int64).cum_sum().to_numpy()
    flat = column.filter(column.list.len() > 0).explode()
    if flat.null_count():  # a null among the ids: shows up as a negative id
        flat = flat.fill_null(-1)
    values = flat.to_numpy()

    def take(row: int) -> NDArray[Any] | None:
        if not present[row]:
            return None
        return values[int(ends[row - 1]) if row else 0 : int(ends[row])]

    return take


def _parse(
    row: int, values: tuple[Any, ...], chunks: NDArray[Any] | None, token_ids: NDArray[Any] | None
) -> Row:
    """Read one row: the values of SCALARS, and the ids. Raises FieldError."""
    if None in values:
        raise FieldError(SCALARS[values.index(None)], "(null) must not be null")
    arrival_ps, prompt, output, samples, beams, parent, think_ps, priority, salt, granularity, named = values
    tokens("prompt_tokens", prompt)
    tokens("output_tokens", output)
    if not 0 <= arrival_ps <= MAX_TIME_PS:
        raise FieldError("arrival_ps", f"({arrival_ps}) must be in 0..{MAX_TIME_PS}")
    if not 0 <= think_ps <= MAX_TIME_PS:
        raise FieldError("think_ps", f"({think_ps}) must be in 0..{MAX_TIME_PS}")
    if not -1 <= parent < row:
        raise FieldError("parent", f"({parent}) must be -1 or an earlier row than {row}")
    tokens("beam_width", beams)
    if beams > 1 and samples > 1:
        raise FieldError("num_samples", f"({samples}) must be 1 with beam_width {beams}")
    if beams > 1 and named > prompt:
        raise FieldError("named_tokens", f"({named}) must be at most {prompt} with beam_width {beams}")
    if chunks is not None and token_ids is not None:
        raise FieldError("token_ids", "must be null where chunk_ids are given")
    if (chunks is None) != (granularity == 0):
        raise FieldError("granularity", f"({granularity}) must be at least 1 with chunk_ids, and 0 without")
    if chunks is None and token_ids is None:
        if named:
            raise FieldError("named_tokens", f"({named}) must be 0 without ids")
    elif not prompt <= named <= prompt + output:
        raise FieldError("named_tokens", f"({named}) must be in {prompt}..{prompt + output}")
    if chunks is not None:
        if not 1 <= granularity <= MAX_GRANULARITY:
            raise FieldError("granularity", f"({granularity}) must be in 1..{MAX_GRANULARITY}")
        _check_ids("chunk_ids", chunks, -(-named // granularity))
    if token_ids is not None:
        _check_ids("token_ids", token_ids, named)
    return Row(
        arrival_ps,
        prompt,
        output,
        chunk_ids=chunks,
        granularity=granularity,
        token_ids=token_ids,
        named_tokens=named,
        num_samples=tokens("num_samples", samples),
        beam_width=beams,
        key=row,
        parent_key=None if parent == -1 else parent,
        think_ps=think_ps,
        priority=priority,
        salt=salt,
    )


def _check_ids(field: str, ids: NDArray[Any], count: int) -> None:
    if len(ids) != count:
        raise FieldError(field, f"({len(ids)} ids) must have {count}")
    if len(ids) and ids.min() < 0:
        raise FieldError(field, f"({ids.min()}) must hold no negative id")
