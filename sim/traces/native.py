"""The project's own trace format: a Parquet file that holds all that a request can say, losslessly."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from sim.request import MAX_GRANULARITY, MAX_TIME_PS, Request
from sim.traces.fields import FieldError, Row, listed, tokens
from sim.traces.formats import Rows, TraceFormat
from sim.traces.lines import open_error
from sim.traces.trace import Trace, TraceError

MAGIC = b"PAR1"

SCHEMA: dict[str, pl.DataType] = {
    "arrival_ps": pl.Int64(),
    "prompt_tokens": pl.Int64(),
    "output_tokens": pl.Int64(),
    "num_samples": pl.Int64(),
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


class NativeFormat(TraceFormat):
    """Parquet with the columns of SCHEMA, in any order; all but the first three may be absent."""

    name = "native"
    describes = "this project's own traces: Parquet, as `convert` and the workload generator write them"
    arrival_field = "arrival_ps"
    from_first_arrival = False

    def rows(self, path: Path) -> Rows:
        frame = _read(path)
        ids = {name: _slices(frame, name) for name in ("chunk_ids", "token_ids")}
        scalars = frame.drop("chunk_ids", "token_ids")
        for number, values in enumerate(scalars.iter_rows(named=True), start=1):
            try:
                yield (
                    number,
                    _parse(number - 1, values, {name: take(number - 1) for name, take in ids.items()}),
                )
            except FieldError as error:
                yield number, error


def _read(path: Path) -> pl.DataFrame:
    """Return the file's columns, cast to SCHEMA, with defaults in place of the absent ones."""
    try:
        with path.open("rb") as file:
            whole = file.read(4) == MAGIC and file.seek(0, os.SEEK_END) >= 12
            if whole:
                file.seek(-4, os.SEEK_END)
                whole = file.read(4) == MAGIC
            if not whole:
                raise TraceError(f"{path}: must be a whole Parquet file: it does not begin and end with PAR1")
            file.seek(0)
            frame = pl.read_parquet(file)  # by its name, polars would take it for a pattern of names
    except OSError as error:
        raise open_error(path, error) from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise TraceError(f"{path}: must be a Parquet file: {' '.join(str(error).split())}") from None
    columns = []
    for name, dtype in SCHEMA.items():
        if name not in frame.columns:
            if name in ("arrival_ps", "prompt_tokens", "output_tokens"):
                raise TraceError(
                    f"{path}: field {name!r} is missing among the columns ({listed(frame.columns)})"
                )
            columns.append(pl.lit(_DEFAULTS.get(name), dtype=dtype).alias(name))
            continue
        found = frame.schema[name]
        if not (found == dtype or (dtype.is_integer() and found.is_integer())):
            raise TraceError(f"{path}: field {name!r} ({found}) must be a column of {dtype}")
        columns.append(pl.col(name).cast(dtype, strict=False))
    return frame.select(columns)


_DEFAULTS: dict[str, Any] = {
    "num_samples": 1,
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


def _parse(row: int, values: dict[str, Any], ids: dict[str, NDArray[Any] | None]) -> Row:
    for name, value in values.items():
        if value is None:
            raise FieldError(name, "(null) must not be null")
    prompt = tokens("prompt_tokens", values["prompt_tokens"])
    output = tokens("output_tokens", values["output_tokens"])
    for name in ("arrival_ps", "think_ps"):
        if not 0 <= values[name] <= MAX_TIME_PS:
            raise FieldError(name, f"({values[name]}) must be in 0..{MAX_TIME_PS}")
    if not -1 <= values["parent"] < row:
        raise FieldError("parent", f"({values['parent']}) must be -1 or an earlier row than {row}")
    named, granularity = values["named_tokens"], values["granularity"]
    chunks, token_ids = ids["chunk_ids"], ids["token_ids"]
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
        values["arrival_ps"],
        prompt,
        output,
        chunk_ids=chunks,
        granularity=granularity,
        token_ids=token_ids,
        named_tokens=named,
        num_samples=tokens("num_samples", values["num_samples"]),
        key=row,
        parent_key=None if values["parent"] == -1 else values["parent"],
        think_ps=values["think_ps"],
        priority=values["priority"],
        salt=values["salt"],
    )


def _check_ids(field: str, ids: NDArray[Any], count: int) -> None:
    if len(ids) != count:
        raise FieldError(field, f"({len(ids)} ids) must have {count}")
    if len(ids) and ids.min() < 0:
        raise FieldError(field, f"({ids.min()}) must hold no negative id")


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return where `write_trace` would write, links followed, having found out that it can.

    Raises OSError when the folder cannot be written, or when what is there already is no regular file: a device,
    a pipe or a folder must not be replaced by a trace.
    """
    given, target = Path(path), Path(os.path.realpath(path))
    try:
        # Asked of the name as given: a link such as /dev/stdout may lead to what has no name.
        if given.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if given.exists() and not given.is_file():
            raise FileExistsError(errno.EEXIST, "it exists and is not a regular file")
        with TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return target


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace as native Parquet, to be read back request by request as it is.

    The file appears whole or not at all: it is written beside its place, then moved there. Raises OSError, with
    the file's name, where `check_target` does and when the disk is full.
    """
    target = check_target(path)
    frame = pl.DataFrame(
        {name: [_value(request, name) for request in trace.requests] for name in SCHEMA}, schema=SCHEMA
    )
    # Into memory first, as polars hides the cause of a failed write; a short name fits where the target's does.
    encoded = io.BytesIO()
    frame.write_parquet(encoded)
    partial = target.with_name(f".unfinished-{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            file.write(encoded.getbuffer())
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _value(request: Request, name: str) -> Any:
    value = getattr(request, name)
    return pl.Series(value) if isinstance(value, np.ndarray) else value
