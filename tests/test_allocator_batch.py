"""Batch: lockstep costs a look at those whose turn it is, and gives what stepping one by one gives."""

from __future__ import annotations

import numpy as np
import pytest
from different_cases import different_examples
from hypothesis import given
from hypothesis import strategies as st

from allocator.batch import Batch
from allocator.content import TokenContent
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def running(manager: KVCacheManager, lengths: list[int]) -> list[KVSequence]:
    """Admit one sequence a length; each says something else."""
    return [manager.admit(TokenContent([i] * n), n) for i, n in enumerate(lengths)]


def batch_of(manager: KVCacheManager, sequences: list[KVSequence]) -> Batch:
    batch = manager.batch()
    for sequence in sequences:
        batch.add(sequence)
    return batch


@given(lengths=lengths, size=st.sampled_from([1, 2, 4, 8]), steps=st.lists(st.integers(1, 9), max_size=4))
def test_steps_at_once_are_steps_one_by_one(lengths: list[int], size: int, steps: list[int]) -> None:
    managers = [KVCacheManager(400, size) for _ in range(3)]
    groups = [running(manager, lengths) for manager in managers]
    together, single, loose = (
        (batch_of(m, g) for m, g in zip(managers[:2], groups[:2], strict=True)),
        None,
        groups[2],
    )
    together, single = together
    for count in steps:
        slots = managers[0].append(together, None, count).reshape(len(lengths), count)
        for tick in range(count):
            assert managers[1].append(single).tolist() == slots[:, tick].tolist()
            managers[2].append(loose)
        tables = [
            manager.block_tables(group).tolist() for manager, group in zip(managers, groups, strict=True)
        ]
        assert tables[0] == tables[1]
        assert [len(s.table) for s in loose] == [len(s.table) for s in together]
        assert managers[0].stats() == managers[1].stats() == managers[2].stats()
    for manager in managers:
        manager.check_invariants()


@given(lengths=lengths, size=st.sampled_from([1, 2, 4, 8]), ticks=st.integers(1, 30), ahead=st.integers(0, 9))
def test_growth_is_what_advancing_takes(lengths: list[int], size: int, ticks: int, ahead: int) -> None:
    manager = KVCacheManager(500, size)
    batch = batch_of(manager, running(manager, lengths))
    if ahead:
        manager.advance(batch, ahead)
    expected = sum(-(-(s.num_tokens + ticks) // size) - len(s.table) for s in batch)
    assert batch.growth(ticks) == manager.blocks_to_advance(batch, ticks) == expected
    before = manager.available_blocks
    manager.advance(batch, ticks)
    assert before - manager.available_blocks == expected


@given(lengths=lengths, size=st.sampled_from([1, 2, 4, 8]), ahead=st.integers(0, 9))
def test_ticks_until_fill(lengths: list[int], size: int, ahead: int) -> None:
    manager = KVCacheManager(500, size)
    batch = batch_of(manager, running(manager, lengths))
    if ahead:
        manager.advance(batch, ahead)
    assert batch.ticks_until_fill() == min(size - s.num_tokens % size for s in batch)


def test_no_members_no_fill() -> None:
    manager = KVCacheManager(4, 4)
    batch = manager.batch()
    assert batch.ticks_until_fill() == batch.growth(5) == 0
    assert manager.append(batch, None, 3).shape == (0,)


def test_members_are_a_sequence_in_order_of_addition() -> None:
    manager = KVCacheManager(40, 4)
    sequences = running(manager, [3, 8, 5])
    batch = batch_of(manager, sequences[::-1])
    assert list(batch) == sequences[::-1]
    assert (batch[0], batch[-1], batch[1:]) == (sequences[2], sequences[0], sequences[1::-1])
    assert len(batch) == 3
    batch.remove(sequences[1])
    assert sequences[1] not in batch
    assert list(batch) == [sequences[2], sequences[0]]


def test_lengths_stay_right_through_joining_and_leaving() -> None:
    manager = KVCacheManager(40, 4)
    one, two = running(manager, [3, 6])
    batch = batch_of(manager, [one])
    manager.append(batch, None, 2)
    batch.add(two)
    manager.append(batch, None, 3)
    batch.remove(one)
    manager.append(batch)
    assert (one.num_tokens, two.num_tokens) == (8, 10)
    manager.append([one])
    manager.release(two)
    assert (one.num_tokens, len(batch), two.batch) == (9, 0, None)
    manager.check_invariants()


def test_a_refused_step_advances_nobody() -> None:
    manager = KVCacheManager(4, 2)
    batch = batch_of(manager, running(manager, [2, 3]))
    with pytest.raises(OutOfBlocks):
        manager.append(batch, None, 4)
    assert [s.num_tokens for s in batch] == [2, 3]
    assert manager.append(batch).tolist() == [6, 5]


def test_a_member_that_is_forked_copies_before_it_writes() -> None:
    manager = KVCacheManager(8, 4)
    (parent,) = running(manager, [6])
    batch = batch_of(manager, [parent])
    manager.append(batch)
    (child,) = manager.fork(parent)
    batch.add(child)
    manager.append(batch)
    assert manager.pending_copies().tolist() == [[1, 2, 3]]
    assert [s.table.tolist() for s in batch] == [[0, 2], [0, 1]]


def test_bad_input_is_named() -> None:
    manager = KVCacheManager(16, 4)
    sequence = manager.admit(TokenContent([1] * 6), 4)
    batch = manager.batch()
    with pytest.raises(ValueError, match="must have its prompt of 6 complete"):
        batch.add(sequence)
    with pytest.raises(ValueError, match="must be in the batch to leave it"):
        batch.remove(sequence)
    manager.extend(sequence, 2)
    batch.add(sequence)
    with pytest.raises(ValueError, match="must leave its batch before it joins another"):
        manager.batch().add(sequence)
    with pytest.raises(ValueError, match="append to the batch"):
        manager.append([sequence])
    with pytest.raises(ValueError, match="must be out of its batch"):
        manager.truncate(sequence, 2)
    manager.release(sequence)
    with pytest.raises(ValueError, match="must not have been released"):
        batch.add(sequence)


def said(sequence: KVSequence) -> list[int]:
    """Return a sequence's token ids, −1 where nobody named them."""
    ids = np.frombuffer(sequence.content()._ids, np.int32)  # type: ignore[attr-defined]
    return np.maximum(ids, -1).tolist()


_STEPS = ["name"] * 6 + ["swap"] * 3 + ["read", "blank", "several", "fork"]


@different_examples(2)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    size=st.sampled_from([1, 2, 4, 8]),
    steps=st.lists(st.tuples(st.sampled_from(_STEPS), st.integers(0, 5)), min_size=15, max_size=60),
    kept=st.sampled_from([1, 5, 256]),
)
def test_a_batch_says_what_its_members_would_say_alone(
    lengths: list[int], size: int, steps: list[tuple[str, int]], kept: int
) -> None:
    """Token ids wait in the batch until there is no room for more, or somebody asks: nobody can tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allocator.ring._STEPS", kept)
        _check_what_is_said(lengths, size, steps)


def _check_what_is_said(lengths: list[int], size: int, steps: list[tuple[str, int]]) -> None:
    together, alone = KVCacheManager(4000, size), KVCacheManager(4000, size)
    members, loose = running(together, lengths), running(alone, lengths)
    batch = batch_of(together, members)
    token = 0
    for step, index in steps:
        index %= len(members)
        pairs = {id(s): other for s, other in zip(members, loose, strict=True)}
        if step == "read":
            assert said(members[index]) == said(loose[index])
        elif step == "swap":  # leaves if it is in, and joins if it is out
            if members[index] in batch:
                batch.remove(members[index])
            else:
                batch.add(members[index])
        elif step == "fork":
            members += together.fork(members[index])
            loose += alone.fork(loose[index])
        else:
            count = 3 if step == "several" else 1
            tokens = None
            if step == "name":
                tokens = list(range(token, token + len(batch)))
                token += len(batch)
            mine = together.append(batch, tokens, count)
            theirs = alone.append([pairs[id(s)] for s in batch], tokens, count)
            assert mine.shape == theirs.shape
            for manager in (together, alone):
                manager.pending_copies()
    assert [said(s) for s in members] == [said(s) for s in loose]
    for s, other in zip(members, loose, strict=True):
        positions = np.arange(s.num_tokens)
        assert s.slots(0, s.num_tokens).tolist() == [s.table[p // size] * size + p % size for p in positions]
        assert s.num_tokens == other.num_tokens
        named = [token for token in said(s) if token >= 0]
        hits = [manager.lookup(TokenContent(named)).hit_blocks for manager in (together, alone)]
        assert hits[0] == hits[1]
    assert together.stats() == alone.stats()
    together.check_invariants()


def test_slots_follow_their_members_through_joining_and_leaving() -> None:
    manager = KVCacheManager(8000, 4)
    sequences = running(manager, [n % 9 + 1 for n in range(200)])
    batch = manager.batch()
    for i, sequence in enumerate(sequences):
        batch.add(sequence)
        if i % 3 == 2:
            batch.remove(sequences[i - 1])
        expected = manager.append(batch)
        assert expected.tolist() == [s.table[-1] * 4 + (s.num_tokens - 1) % 4 for s in batch]


@pytest.mark.parametrize("tokens", [[1, -1], [1, 2**31], [[1], [2**40]], [1], [1, 2, 3], [[1, 2], [3, 4]]])
def test_token_ids_that_do_not_fit_change_nothing(tokens: list[int]) -> None:
    manager = KVCacheManager(16, 4)
    batch = batch_of(manager, running(manager, [6, 3]))
    manager.append(batch, [7, 8])
    before = manager.stats()
    with pytest.raises(ValueError, match="tokens"):
        manager.append(batch, tokens)
    assert manager.stats() == before
    assert [said(s)[-1] for s in batch] == [7, 8]


def test_beams_that_change_places_get_the_slots_of_their_new_blocks() -> None:
    manager = KVCacheManager(8, 4)
    beams = [manager.admit(TokenContent([symbol] * 5), 5) for symbol in (1, 2)]
    batch = manager.batch()
    for beam in beams:
        batch.add(beam)
    assert manager.append(batch, [7, 8]).tolist() == [5, 13]
    manager.reorder_beams(beams, [1, 0])
    slots = manager.append(batch, [7, 8])
    assert slots.tolist() == [14, 6] == [int(beam.slots(6, 7)[0]) for beam in beams]


def test_beams_that_change_places_cache_what_they_say_now() -> None:
    """The batch still has the ids of what each beam said before."""
    manager = KVCacheManager(8, 4)
    beams = [manager.admit(TokenContent([symbol]), 1) for symbol in (1, 2)]
    batch = batch_of(manager, beams)
    for _ in range(6):
        manager.append(batch, [7, 8])
    manager.reorder_beams(beams, [1, 0])
    manager.append(batch, [5, 6])
    for said in ([2, 8, 8, 8, 8, 8, 8, 5], [1, 7, 7, 7, 7, 7, 7, 6]):
        assert manager.lookup(TokenContent([*said, 0])).hit_blocks == 2


def test_who_joins_a_batch_that_was_empty_has_a_place_for_its_slots() -> None:
    manager = KVCacheManager(8, 4)
    batch = manager.batch()
    assert manager.append(batch).tolist() == []
    batch.add(*running(manager, [4]))
    manager.advance(batch)
    assert manager.append(batch).tolist() == [5]
