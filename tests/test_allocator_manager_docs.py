"""help(KVCacheManager) says all that a caller has to know: every method, and which errors it raises when."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from allocator.content import TokenContent
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks

PUBLIC = {name: getattr(KVCacheManager, name) for name in dir(KVCacheManager) if not name.startswith("_")}
CALLS: dict[str, Callable[[KVCacheManager, KVSequence], object]] = {
    "append": lambda manager, sequence: manager.append([sequence]),
    "advance": lambda manager, sequence: manager.advance([sequence], 2),
    "blocks_to_swap_in": lambda manager, sequence: manager.blocks_to_swap_in(sequence),
    "blocks_to_swap_out": lambda manager, sequence: manager.blocks_to_swap_out(sequence),
    "extend": lambda manager, sequence: manager.extend(sequence, 1),
    "fork": lambda manager, sequence: manager.fork(sequence),
    "is_arriving": lambda manager, sequence: manager.is_arriving(sequence),
    "prefill": lambda manager, sequence: manager.prefill(sequence, 1),
    "reclaimable_blocks": lambda manager, sequence: manager.reclaimable_blocks(sequence),
    "release": lambda manager, sequence: manager.release(sequence),
    "remaining_blocks": lambda manager, sequence: manager.remaining_blocks(sequence, 9),
    "reorder_beams": lambda manager, sequence: manager.reorder_beams([sequence], [0]),
    "swap_in": lambda manager, sequence: manager.swap_in(sequence),
    "swap_out": lambda manager, sequence: manager.swap_out(sequence),
    "truncate": lambda manager, sequence: manager.truncate(sequence, 1),
}
"""What takes a sequence, and must have a running one, or one that is swapped out."""
UNCHECKED = {"block_tables", "context_lens", "prefill_slots", "room", "blocks_to_advance", "catch_up"}
"""What takes a sequence and only reads it, or is for callers that know."""


def doc(name: str) -> str:
    member = PUBLIC[name]
    return " ".join((inspect.getdoc(member.fget if isinstance(member, property) else member) or "").split())


def takes_sequences(name: str) -> bool:
    member = PUBLIC[name]
    if isinstance(member, property):
        return False
    return bool({"sequence", "sequences"} & set(inspect.signature(member).parameters))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_member_is_explained(name: str) -> None:
    assert doc(name).endswith((".", "?")), f"{name} has no docstring"
    overview = inspect.getdoc(KVCacheManager) or ""
    assert name in overview or name == "contiguous", f"the overview leaves {name} out"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_arrays_have_their_type_and_shape(name: str) -> None:
    member = PUBLIC[name]
    if not isinstance(member, property) and "NDArray" in str(inspect.signature(member).return_annotation):
        assert "int32 [" in doc(name) or "int64 [" in doc(name)


def running(**options: Any) -> tuple[KVCacheManager, KVSequence]:
    manager = KVCacheManager(8, 2, num_host_blocks=8, **options)
    content = TokenContent([1, 2, 3, 4])
    return manager, manager.admit(content, 4)


def test_these_are_all_that_take_sequences() -> None:
    assert {name for name in PUBLIC if takes_sequences(name)} == set(CALLS) | UNCHECKED


@pytest.mark.parametrize("name", CALLS)
def test_a_sequence_that_is_not_running_is_refused_as_documented(name: str) -> None:
    manager, sequence = running()
    _, stranger = running()
    manager.release(sequence)
    before = manager.stats()
    for other in (sequence, stranger):
        with pytest.raises(ValueError, match="must"):
            CALLS[name](manager, other)
    assert manager.stats() == before
    manager.check_invariants()
    said = doc(name)
    for refers, to in {"what `append` does": "append", "what `extend` does": "extend"}.items():
        said += doc(to) if refers in said else ""
    assert "ValueError" in said


@pytest.mark.parametrize("name", ["append", "advance", "extend", "admit", "swap_in", "swap_out"])
def test_what_takes_blocks_says_so(name: str) -> None:
    assert "OutOfBlocks" in doc(name) or "what `append` does" in doc(name)


def test_a_refused_call_names_what_it_needed() -> None:
    manager, sequence = running()
    with pytest.raises(OutOfBlocks, match="50 blocks needed, 6 free or evictable"):
        manager.append([sequence], num_tokens=100)
