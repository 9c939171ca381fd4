"""Request traces: the public ones in their own formats, and a native format that holds all of them.

`python -m sim.traces describe FILE` says what a trace is made of; `convert FILE OUT` writes it as native Parquet.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.traces.reader import FORMATS, read_trace
    from sim.traces.trace import Trace, TraceError
    from sim.traces.writer import write_trace

__all__ = ["FORMATS", "Trace", "TraceError", "read_trace", "write_trace"]

_HOMES = {
    "FORMATS": "reader",
    "Trace": "trace",
    "TraceError": "trace",
    "read_trace": "reader",
    "write_trace": "writer",
}


def __getattr__(name: str) -> Any:
    """Import a name where it is first used: `python -m sim.traces` must answer Ctrl-C before polars is there."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
