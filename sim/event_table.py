"""events.parquet: the cache's event log as a table, and back.

    from allocator.events import rebuild
    from sim.event_table import read_events

    log = read_events(Path("results/events.parquet"))
    state = rebuild(log, log.at_time(3_600_000_000_000_000))     # how every block stood after an hour

Of several replicas, each cache has its log: `read_events(path, replica)`.

One row an event, in order; of several replicas, those of the first come first:

    replica     int32       whose cache it is; only where there are several
    now_ps      int64       when it happened: the start of its stretch (row of the timeline), or its end for what
                            finished then
    kind        enum        see allocator.event_log.KINDS, also for what `other` and `value` mean
    sequence    int32       number of the sequence, null where the event has none
    request_id  int32       whose sequence it is: a row of requests.parquet; null as above
    other       int32       null where its kind has none
    value       int32       null where its kind has none
    blocks      list[int32] the blocks concerned, in order
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from allocator.event_log import COLUMNS, FORKED, KINDS, EventLog
from sim.records import RunResult

_KIND = pl.Enum([kind.name for kind in KINDS])
_HAS_OTHER = np.array([bool(kind.other) for kind in KINDS])
_HAS_VALUE = np.array([bool(kind.value) for kind in KINDS])
_SCHEMA: dict[str, Any] = {
    "now_ps": pl.Int64,
    "kind": _KIND,
    "sequence": pl.Int32,
    "request_id": pl.Int32,
    "other": pl.Int32,
    "value": pl.Int32,
    "blocks": pl.List(pl.Int32),
}


def run_events(result: RunResult) -> pl.DataFrame | None:
    """Return the table of a whole run; None if it kept no events."""
    if not result.replicas:
        return None if result.events is None else event_frame(result.events, result.sequences)
    frames = [
        event_frame(part.events, part.sequences).select(pl.lit(number, pl.Int32).alias("replica"), pl.all())
        for number, part in enumerate(result.replicas)
        if part.events is not None
    ]
    return pl.concat(frames) if frames else None


def event_frame(log: EventLog, requests: dict[int, int]) -> pl.DataFrame:
    """Return the log as the table above; `requests` says which request each admitted sequence is of."""
    columns = log.columns()
    kind, sequence, other = columns["kind"], columns["sequence"], columns["other"]
    owners = _owners(columns, requests)
    has_sequence = sequence >= 0
    frame = pl.DataFrame(
        {
            "now_ps": columns["now"],
            "kind": kind,
            "sequence": sequence,
            "request_id": owners[sequence],  # of no sequence: the last owner, and nulled below
            "other": other,
            "value": columns["value"],
            "has_sequence": has_sequence,
            "has_other": _HAS_OTHER[kind],
            "has_value": _HAS_VALUE[kind],
        }
    )
    names = pl.Series([name.name for name in KINDS], dtype=_KIND)
    frame = frame.with_columns(
        kind=names.gather(frame["kind"].cast(pl.UInt32)),
        sequence=pl.when("has_sequence").then("sequence"),
        request_id=pl.when("has_sequence").then("request_id"),
        other=pl.when("has_other").then("other"),
        value=pl.when("has_value").then("value"),
        blocks=_lists(columns["blocks"], columns["num_blocks"]),
    )
    return frame.select(list(_SCHEMA))


def _owners(columns: dict[str, NDArray[np.integer[Any]]], requests: dict[int, int]) -> NDArray[np.int32]:
    """Return the request of each sequence, by its number: a fork is of its parent's."""
    owners = np.full(1 + int(columns["sequence"].max(initial=0)), -1, dtype=np.int32)
    owners[list(requests)] = list(requests.values())
    forks = columns["kind"] == FORKED
    for child, parent in zip(columns["sequence"][forks], columns["other"][forks], strict=True):
        owners[child] = owners[parent]
    return owners


def _lists(values: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> pl.Series:
    """Return a list column: the first lengths[0] values, the next lengths[1] values, and so on."""
    rows = np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths.astype(np.int64))
    filled = pl.DataFrame({"row": rows, "blocks": values}).group_by("row", maintain_order=True).agg("blocks")
    every = pl.DataFrame({"row": np.arange(len(lengths), dtype=np.uint32)})
    joined = every.join(filled, on="row", how="left", maintain_order="left")
    return joined["blocks"].fill_null(pl.Series([[]], dtype=pl.List(pl.Int32)))


def read_events(path: Path, replica: int | None = None) -> EventLog:
    """Return the log that an events.parquet holds, or that of one of its replicas.

    Raises ValueError, naming the file, if it is none; if it has several replicas and none is asked for, or if it has
    not the one asked for.
    """
    try:
        frame = pl.read_parquet(path)
        frame = _of_replica(frame, path, replica)
        frame = frame.select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"events ({path}) cannot be read: {str(error).splitlines()[0]}") from None
    columns = {
        "now": frame["now_ps"],
        "kind": frame["kind"].to_physical(),
        "sequence": frame["sequence"].fill_null(-1),
        "other": frame["other"].fill_null(-1),
        "value": frame["value"].fill_null(-1),
        "num_blocks": frame["blocks"].list.len(),
        "blocks": frame["blocks"].explode().drop_nulls(),
    }
    return EventLog.from_columns({name: columns[name].to_numpy() for name in COLUMNS})


def _of_replica(frame: pl.DataFrame, path: Path, replica: int | None) -> pl.DataFrame:
    if "replica" not in frame.columns:
        if replica is not None:
            raise ValueError(f"replica ({replica}) must be None: events ({path}) are those of a single cache")
        return frame
    known = frame["replica"].unique().sort().to_list()
    if replica not in known:
        raise ValueError(f"replica ({replica}) must be one of those in events ({path}): {known}")
    return frame.filter(pl.col("replica") == replica)
