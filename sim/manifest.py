"""RunSpec: everything that decides the outcome of a run, and how it is written down and read back."""

from __future__ import annotations

import json
import platform
import subprocess
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from allocator.config import BuildConfig, CacheConfig, ModelSpec
from sim.build_info import is_compiled, source_file
from sim.cluster.config import ClusterConfig
from sim.hardware import GPUSpec
from sim.scheduler.config import EngineConfig
from sim.scheduler.retention import RetentionOptions
from sim.timing import TimingConfig
from sim.traces.reading import ReadOptions
from sim.workload import WorkloadConfig

SYNTHETIC = "synthetic"
_PACKAGES = ("paged-kv-lab", "numpy", "simpy", "polars", "matplotlib")

T = TypeVar("T")


@dataclass(frozen=True)
class TraceSource:
    """Which requests are replayed: a trace file, or a synthetic workload when `path` is "synthetic".

    Raises ValueError unless there is a workload exactly then.
    """

    path: str
    reading: ReadOptions = field(default_factory=ReadOptions)
    workload: WorkloadConfig | None = None

    def __post_init__(self) -> None:
        if self.path == SYNTHETIC and self.workload is None:
            raise ValueError(f"workload (null) must be given where the trace's path is {SYNTHETIC!r}")
        if self.path != SYNTHETIC and self.workload is not None:
            raise ValueError(f"path ({self.path}) must be {SYNTHETIC!r} where there is a workload")

    @property
    def seed(self) -> int | None:
        """The seed that made the requests; None for a trace file."""
        return None if self.workload is None else self.workload.workload_seed


@dataclass(frozen=True)
class RunSpec:
    """A run, entirely: the same RunSpec and the same trace bytes give the same result bytes."""

    trace: TraceSource
    model: ModelSpec
    gpu: GPUSpec
    build: BuildConfig
    cache: CacheConfig
    engine: EngineConfig
    timing: TimingConfig = field(default_factory=TimingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    retention: RetentionOptions = field(default_factory=RetentionOptions)


@dataclass(frozen=True)
class Manifest:
    """A RunSpec and the SHA-256 of the trace that it was run on."""

    spec: RunSpec
    trace_sha256: str

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.json. Raises ValueError naming the file and what is wrong with it."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            spec = _value(RunSpec, _member(found, "config"), "config")
            sha256 = _value(str, _member(found, "trace", "sha256"), "trace.sha256")
        except OSError as error:
            raise ValueError(f"manifest ({path}) cannot be read: {error.strerror}") from None
        except RecursionError:
            raise ValueError(f"manifest ({path}) is not one that a replay wrote: nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"manifest ({path}) is not one that a replay wrote: {error}") from None
        return cls(spec, sha256)

    def document(self, *, num_requests: int, skipped_rows: int, budget: dict[str, Any]) -> dict[str, Any]:
        """Return what manifest.json says: the config, and what came of it on this machine."""
        return {
            "config": asdict(self.spec),
            "seed": self.spec.trace.seed,
            "trace": {
                "path": self.spec.trace.path,
                "sha256": self.trace_sha256,
                "requests": num_requests,
                "skipped_rows": skipped_rows,
            },
            "memory_budget": budget,
            "git_revision": git_revision(),
            "compiled": is_compiled(),
            "versions": versions(),
        }


def _member(document: Any, *names: str) -> Any:
    """Return what `names` lead to in parsed JSON. Raises ValueError naming the first that is not there."""
    for depth, name in enumerate(names):
        if not isinstance(document, dict):
            raise ValueError(f"{'.'.join(names[:depth]) or 'it'} must be an object")
        if name not in document:
            raise ValueError(f"{'.'.join(names[: depth + 1])} is missing")
        document = document[name]
    return document


def _build(kind: type[T], data: Any, where: str) -> T:
    """Build a dataclass from parsed JSON, its nested dataclasses and tuples included.

    Raises ValueError for a field that is missing, unknown, or not of the type that the dataclass declares.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} ({_shown(data)}) must be an object")
    hints = typing.get_type_hints(kind)
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise ValueError(f"{where}.{name} is unknown to this version")
    missing = [name for name in known if name not in data]
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing")
    return kind(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in known})


_SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((float, int), "a number"),
    str: ((str,), "a text"),
}


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return parsed JSON as a value of the type `hint`. Raises ValueError, naming the field, if it is not one."""
    if isinstance(hint, types.UnionType):
        kinds = [option for option in typing.get_args(hint) if option is not types.NoneType]
        if value is None:
            return None
        assert len(kinds) == 1, f"{where}: one type, or null"
        return _value(kinds[0], value, where)
    if is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} ({_shown(value)}) must be a list")
        each = typing.get_args(hint)[0]
        return tuple(_value(each, item, f"{where}[{at}]") for at, item in enumerate(value))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{where} ({_shown(value)}) must be one of {', '.join(choices)}")
        return value
    accepted, rule = _SCALARS[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} ({_shown(value)}) must be {rule}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def git_revision() -> str | None:
    """Return the commit that this code is at, "-dirty" appended if it was changed; None outside a checkout."""
    here = source_file()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's checkout (a .venv, say): that revision is not ours.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that shape a result."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
