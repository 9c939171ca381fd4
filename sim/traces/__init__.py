"""Request traces: the public ones in their own formats, and a native format that holds all of them.

`python -m sim.traces describe FILE` says what a trace is made of; `convert FILE OUT` writes it as native Parquet.
"""

from sim.traces.native import write_trace
from sim.traces.reader import FORMATS, read_trace
from sim.traces.trace import Trace, TraceError

__all__ = ["FORMATS", "Trace", "TraceError", "read_trace", "write_trace"]
