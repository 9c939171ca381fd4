"""The docstrings of dataclasses show what the source says below each field: in help(), and as before in --help."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pydoc
import re
from pathlib import Path

import pytest

from allocator.config import CacheConfig
from allocator.field_docs import field_docs, with_field_docs
from sim.options import parse
from sim.request import Request
from sim.workload import WorkloadConfig

ROOT = Path(__file__).parent.parent
FIELD = re.compile(r'^    (\w+): [^\n]*\n    """(.*?)"""$', re.MULTILINE | re.DOTALL)


def _documented() -> list[type]:
    """Return the classes that are decorated, by what the sources say."""
    found = []
    for package in ("allocator", "sim"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for name in re.findall(r"^@with_field_docs\n@dataclass.*\nclass (\w+)", path.read_text(), re.M):
                found.append(getattr(importlib.import_module(module), name))
    return found


KINDS = _documented()


def test_every_configuration_is_documented() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert names >= {"BuildConfig", "CacheConfig", "ClusterConfig", "EngineConfig", "GPUSpec", "MemoryBudget"}
    assert names >= {"ReadOptions", "Request", "StepBatch", "TimingConfig", "WorkloadConfig", "WorkloadShape"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_help_shows_what_stands_below_each_field(kind: type) -> None:
    source = inspect.getsource(kind)
    below = {name: " ".join(text.split()) for name, text in FIELD.findall(source)}
    assert below
    doc = inspect.getdoc(kind)
    assert doc is not None
    own, _, listed = doc.partition("\n\nAttributes:\n")
    assert " ".join(own.split()) in " ".join(source.split())  # as it is written
    entries = {}
    for entry in re.split(r"\n(?=    \w)", listed):
        name, colon, said = entry.strip().partition(": ")
        assert colon
        entries[name] = said
    names = [each.name for each in dataclasses.fields(kind)]
    assert list(entries) == [name for name in names if name in entries]
    for name, text in below.items():
        assert " ".join(entries[name].split()) == text
    shown = re.sub(r"[\s|]+", " ", pydoc.plain(pydoc.render_doc(kind)))
    for text in below.values():
        assert text.replace("|", "").replace("  ", " ") in shown


def test_inherited_fields_come_first_and_instances_say_the_same() -> None:
    docs = field_docs(WorkloadConfig)
    assert next(iter(docs)) == "workload_seed"
    assert list(docs)[-1] == "num_requests"
    assert WorkloadConfig().__doc__ == WorkloadConfig.__doc__
    assert Request.__doc__ is not None
    assert "Attributes:\n    request_id: " in Request.__doc__


def test_the_flags_keep_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    shown = " ".join(re.sub(r"[│|]", " ", capsys.readouterr().out).split())
    for text in field_docs(CacheConfig).values():
        assert " ".join(text.split()) in shown
    assert "Attributes" not in shown


def test_without_a_source_the_docstring_is_as_it_was() -> None:
    space: dict[str, object] = {"with_field_docs": with_field_docs, "__name__": "nowhere"}
    text = 'from dataclasses import dataclass\n@with_field_docs\n@dataclass\nclass Made:\n    """Made."""\n    x: int\n'
    exec(compile(text, "nowhere.py", "exec", dont_inherit=True), space)
    assert space["Made"].__doc__ == "Made."
