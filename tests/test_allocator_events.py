"""The event log: what it says word for word, the states it gives back, and its arrays."""

from __future__ import annotations

import numpy as np
import pytest
from different_cases import different_programs

from allocator import event_log
from allocator.config import CacheConfig
from allocator.content import TokenContent
from allocator.events import (
    COLUMNS,
    EVICTABLE,
    FREE,
    GONE,
    IN_TRANSFER,
    KINDS,
    REFERENCED,
    UNCACHED,
    CacheState,
    EventLog,
    Replayer,
    SequenceState,
    rebuild,
)
from allocator.fuzz import EventsMachine, TierEventsMachine, WindowEventsMachine, WindowTierEventsMachine
from allocator.manager import KVCacheManager

# Rebuilding the state after every step takes four times as long as what the other machines check.
TestEvents = different_programs(EventsMachine, share=0.25)
TestTierEvents = different_programs(TierEventsMachine, share=0.25)
TestWindowEvents = different_programs(WindowEventsMachine, share=0.25)
TestWindowTierEvents = different_programs(WindowTierEventsMachine, share=0.25)


def scenario() -> KVCacheManager:
    """Return a manager that has done a little of everything; seven blocks of two tokens."""
    manager = KVCacheManager(7, 2, events=True)
    first = manager.admit(TokenContent([1, 2, 3, 4, 5]), 5)
    manager.now = 10
    batch = manager.batch()
    batch.add(first)
    manager.append(batch, [6])
    manager.append(batch, [7])
    (second,) = manager.fork(first)
    batch.add(second)
    manager.now = 20
    manager.advance(batch, 2)
    manager.pending_copies()
    manager.release(first)
    manager.now = 30
    third = manager.admit(TokenContent([1, 2, 3, 4, 9]), 1)
    fourth = manager.admit(TokenContent([8, 8, 8, 8]), 2)
    manager.release(second)
    manager.prefill(fourth, 2)
    manager.truncate(fourth, 1)
    manager.append([fourth], [7])
    manager.fork(third)
    return manager


GOLDEN = """\
     0      0  created     tokens_per_block 2, num_blocks 7
     1      0  admitted    sequence 0, prompt_tokens 5
     2      0  taken       sequence 0, tokens 5, blocks [0, 1, 2]
     3      0  stored      sequence 0, parent -1, position 0, blocks [0, 1]
     4     10  joined      sequence 0, batch 0
     5     10  stored      sequence 0, parent 1, position 2, blocks [2]
     6     10  advanced    batch 0, tokens 1
     7     10  taken       sequence 0, tokens 0, blocks [3]
     8     10  advanced    batch 0, tokens 1
     9     10  forked      sequence 1, parent 0
    10     10  joined      sequence 1, batch 0
    11     20  copied      sequence 0, tokens 1, blocks [3, 4]
    12     20  stored      sequence 0, parent 2, position 3, blocks [4]
    13     20  stored      sequence 1, parent 2, position 3, blocks [3]
    14     20  taken       sequence 0, tokens 0, blocks [5]
    15     20  taken       sequence 1, tokens 0, blocks [6]
    16     20  advanced    batch 0, tokens 2
    17     20  executed    copies 1
    18     20  left        sequence 0, batch 0
    19     20  freed       sequence 0
    20     30  admitted    sequence 2, prompt_tokens 5
    21     30  hit         sequence 2, tokens 4, blocks [0, 1]
    22     30  taken       sequence 2, tokens 1, blocks [5]
    23     30  admitted    sequence 3, prompt_tokens 4
    24     30  evicted     blocks [4]
    25     30  taken       sequence 3, tokens 2, blocks [4]
    26     30  stored      sequence 3, parent -1, position 0, blocks [4]
    27     30  left        sequence 1, batch 0
    28     30  freed       sequence 1
    29     30  taken       sequence 3, tokens 2, blocks [6]
    30     30  stored      sequence 3, parent 4, position 1, blocks [6]
    31     30  truncated   sequence 3, tokens 1
    32     30  detached    sequence 3, blocks 1
    33     30  evicted     blocks [3]
    34     30  copied      sequence 3, tokens 1, blocks [4, 3]
    35     30  detached    sequence 3, blocks 0
    36     30  taken       sequence 3, tokens 1
    37     30  stored      sequence 3, parent -1, position 0, blocks [3]
    38     30  forked      sequence 4, parent 2"""


def test_the_log_reads_as_what_was_done() -> None:
    log = scenario().events
    assert log is not None
    assert str(log) == GOLDEN
    assert len(log) == len(GOLDEN.splitlines())
    assert list(log.lines(24, 26)) == GOLDEN.splitlines()[24:26]


def test_states_on_the_way() -> None:
    log = scenario().events
    assert log is not None
    x, e, r, t = FREE, EVICTABLE, REFERENCED, IN_TRANSFER

    shared = rebuild(log, 17)  # the fork has written, and its copy is still to be executed
    assert shared.states.tolist() == [r] * 7
    assert shared.references.tolist() == [2, 2, 2, 1, 1, 1, 1]
    assert shared.parents.tolist() == [-1, 0, 1, 2, 2, UNCACHED, UNCACHED]
    assert shared.sequences == {
        0: SequenceState(9, (0, 1, 2, 4, 5), (0, 1, 2, 4)),
        1: SequenceState(9, (0, 1, 2, 3, 6), (0, 1, 2, 3)),
    }
    assert shared.prefix(4) == [0, 1, 2, 4]
    with pytest.raises(ValueError, match=r"block \(5\) must be cached"):
        shared.prefix(5)

    ended = rebuild(log, 20)  # of the first sequence, one block is free and one evictable
    assert ended.states.tolist() == [r, r, r, r, e, x, r]
    assert ended.counts() == {"free": 1, "evictable": 1, "referenced": 5, "in transfer": 0}

    last = rebuild(log)
    assert last.states.tolist() == [r, r, e, r, r, r, e]  # block 4 is still to be copied from
    assert last.references.tolist() == [2, 2, 0, 1, 0, 2, 0]
    assert last.holds.tolist() == [2, 2, 0, 1, 1, 0, 0]
    assert rebuild(log, 0).states.size == 0
    assert t not in last.states


def test_a_block_freed_under_its_copy_is_in_transfer() -> None:
    manager = KVCacheManager(4, 2, events=True)
    parent = manager.admit(TokenContent([1]), 1)
    (child,) = manager.fork(parent)
    manager.append([child], [5])
    manager.release(parent)
    log = manager.events
    assert log is not None
    assert rebuild(log).states.tolist() == [IN_TRANSFER, REFERENCED, FREE, FREE]
    manager.pending_copies()
    assert rebuild(log).states.tolist() == [FREE, REFERENCED, FREE, FREE]


HOST_GOLDEN = """\
     0      0  created     tokens_per_block 2, num_blocks 4
     1      0  host        num_blocks 4
     2      0  admitted    sequence 0, prompt_tokens 5
     3      0  taken       sequence 0, tokens 5, blocks [0, 1, 2]
     4      0  stored      sequence 0, parent -1, position 0, blocks [0, 1]
     5      0  freed       sequence 0
     6      0  admitted    sequence 1, prompt_tokens 3
     7      0  taken       sequence 1, tokens 3, blocks [2, 3]
     8      0  stored      sequence 1, parent -1, position 0, blocks [2]
     9      0  admitted    sequence 2, prompt_tokens 1
    10      0  offloaded   blocks [1, 0]
    11      0  evicted     blocks [1]
    12      0  taken       sequence 2, tokens 1, blocks [1]
    13      0  swapped_out sequence 1, cached 1, blocks [2, 3, 1, 2]
    14      0  sent        list 0
    15      0  arrived     list 0
    16      0  freed       sequence 2
    17      0  onboarded   blocks [0, 1]
    18      0  admitted    sequence 3, prompt_tokens 5
    19      0  hit         sequence 3, tokens 4, blocks [0, 1]
    20      0  taken       sequence 3, tokens 1, blocks [3]
    21      0  sent        list 1
    22      0  arrived     list 1
    23      0  host_freed  blocks [0]
    24      0  freed       sequence 3
    25      0  swapped_in  sequence 1, cached 0, blocks [2, 3]
    26      0  host_freed  blocks [1]
    27      0  sent        list 2
    28      0  arrived     list 2"""


def test_what_goes_to_the_host_and_comes_back() -> None:
    manager = KVCacheManager(4, 2, events=True, num_host_blocks=4)
    manager.release(manager.admit(TokenContent([1, 2, 3, 4, 5]), 5))
    second = manager.admit(TokenContent([6, 7, 8]), 3)
    third = manager.admit(TokenContent([9]), 1)  # the first one's second block goes to the host
    manager.swap_out(second)
    manager.transfers_done(manager.pending_swaps())
    manager.release(third)
    fourth = manager.admit(TokenContent([1, 2, 3, 4, 5]), 1)  # and comes back
    manager.transfers_done(manager.pending_swaps())
    manager.release(fourth)
    manager.swap_in(second)
    manager.transfers_done(manager.pending_swaps())
    log = manager.events
    assert log is not None
    assert str(log) == HOST_GOLDEN

    x, e, r, t = FREE, EVICTABLE, REFERENCED, IN_TRANSFER
    leaving = rebuild(log, 14)  # both transfers are still to be executed
    assert leaving.states.tolist() == [e, r, t, t]
    assert leaving.host_states.tolist() == [t, r, r, x]
    assert leaving.host_parents.tolist() == [0, -1, UNCACHED, UNCACHED]
    assert leaving.host_copies.tolist() == [-1, 2, -1, -1]
    assert leaving.swapped == {1: SequenceState(3, (1, 2), (1,))}

    arrived = rebuild(log, 17)
    assert arrived.states.tolist() == [e, x, e, x]
    assert arrived.host_states.tolist() == [e, r, r, x]
    assert arrived.host_counts() == {"free": 1, "evictable": 1, "referenced": 2, "in transfer": 0}

    assert rebuild(log).host_counts()["free"] == 4
    assert rebuild(log).sequences == {1: SequenceState(3, (2, 3), (2,))}
    assert rebuild(EventLog.from_columns(log.columns())) == CacheState.of(manager)


WINDOW_GOLDEN = """\
     0      0  created     tokens_per_block 2, num_blocks 4
     1      0  window      sink_blocks 1, tokens 3
     2      0  admitted    sequence 0, prompt_tokens 6
     3      0  taken       sequence 0, tokens 6, blocks [0, 1, 2]
     4      0  placed      sequence 0, parent -1, place 0, blocks [0]
     5      0  placed      sequence 0, parent 0, place 1, blocks [1]
     6      0  placed      sequence 0, parent 1, place 2, blocks [2]
     7      0  passed      sequence 0, sink_blocks 1, blocks 1
     8      0  taken       sequence 0, tokens 1, blocks [3]
     9      0  admitted    sequence 1, prompt_tokens 1
    10      0  evicted     blocks [1]
    11      0  taken       sequence 1, tokens 1, blocks [1]"""


def test_blocks_that_a_window_has_passed() -> None:
    manager = KVCacheManager(4, 2, CacheConfig(window=3, num_sinks=2), events=True)
    first = manager.admit(TokenContent([1, 2, 3, 4, 5, 6]), 6)
    manager.append([first])
    manager.admit(TokenContent([7]), 1)
    log = manager.events
    assert log is not None
    assert str(log) == WINDOW_GOLDEN
    passed = rebuild(log, 9)
    assert passed.states.tolist() == [REFERENCED, EVICTABLE, REFERENCED, REFERENCED]
    assert passed.sequences == {0: SequenceState(7, (0, 2, 3), (0, 2), left=1)}
    assert rebuild(log).parents.tolist() == [-1, UNCACHED, GONE, UNCACHED]
    assert rebuild(log).prefix(2) == [2]


def test_every_prefix_of_the_log_can_be_rebuilt_and_gone_on_from() -> None:
    log = scenario().events
    assert log is not None
    going = Replayer()
    for upto in range(len(log) + 1):
        going.apply(log, upto)
        assert going.state() == rebuild(log, upto)
    assert going.num_events == len(log)


def test_lengths_follow_the_batch() -> None:
    manager = KVCacheManager(50, 4, events=True)
    batch = manager.batch()
    sequences = [manager.admit(TokenContent([n] * 3), 3) for n in range(3)]
    manager.append(sequences[:1])
    for sequence in sequences[:2]:
        batch.add(sequence)
    manager.advance(batch, 5)
    batch.add(sequences[2])
    manager.advance(batch, 7)
    batch.remove(sequences[0])
    manager.advance(batch, 1)
    log = manager.events
    assert log is not None
    lengths = [state.num_tokens for state in rebuild(log).sequences.values()]
    assert lengths == [sequence.num_tokens for sequence in sequences] == [16, 16, 11]


def test_columns_and_back() -> None:
    manager = scenario()
    log = manager.events
    assert log is not None
    columns = log.columns()
    assert {name: column.dtype for name, column in columns.items()} == {
        name: np.dtype(kind) for name, kind in COLUMNS.items()
    }
    assert columns["now"].tolist() == [int(line[7:13]) for line in GOLDEN.splitlines()]
    assert int(columns["num_blocks"].sum()) == len(columns["blocks"])
    again = EventLog.from_columns(columns)
    assert str(again) == GOLDEN
    assert rebuild(again) == CacheState.of(manager)
    assert again.new_sequence() == 5
    assert again.new_batch() == 1


def test_an_empty_log_is_one() -> None:
    empty = EventLog()
    assert len(EventLog.from_columns(empty.columns())) == 0
    assert rebuild(empty).counts() == {"free": 0, "evictable": 0, "referenced": 0, "in transfer": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, r"columns \(now, .*\) must have kind"),
        ({"kind": np.array([0, 99], np.uint8)}, r"now \(3 rows\) must be as long as kind \(2\)"),
        ({"kind": np.array([0, 99, 1])}, r"kind \(99\) must be below \d+"),
        ({"kind": np.array([0, 999, 1])}, r"kind \(0 to 999\) must fit uint8"),
        ({"value": np.array([0.5, 1, 2])}, r"value \(float64, 1 dimensions\) must be a column of integers"),
        ({"num_blocks": np.array([0, 0, 2])}, r"blocks \(1\) must be as many as num_blocks says \(2\)"),
        ({"blocks": np.array([-1])}, r"blocks \(-1\) must not be negative"),
        ({"num_blocks": np.array([0, 2, -1])}, r"num_blocks \(-1\) must not be negative"),
    ],
)
def test_what_is_no_log_is_refused(change: dict[str, np.ndarray | None], message: str) -> None:
    manager = KVCacheManager(4, 2, events=True)
    manager.admit(TokenContent([1]), 1)
    assert manager.events is not None
    columns = {**manager.events.columns(), **change}
    with pytest.raises(ValueError, match=message):
        EventLog.from_columns({name: column for name, column in columns.items() if column is not None})


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (24, "kind", event_log.UNSTORED, None),  # says the same of a block that nobody holds
        (24, "blocks", 2, r"event 24 \(evicted\): \[2\] must not be held"),
        (33, "blocks", 6, r"event 34 \(copied\): \[3\] must be free"),
        (24, "blocks", 0, r"event 24 \(evicted\): \[0\] must not be held"),
        (24, "blocks", 5, r"event 24 \(evicted\): \[5\] must be cached"),
        (5, "other", 0, r"event 5 \(stored\): 0 must be the last block of the sequence's prefix, 1"),
        (5, "value", 3, r"event 5 \(stored\): 3 must be the length of its prefix, 2"),
        (21, "blocks", 5, r"event 21 \(hit\): \[5, 1\] must be cached"),
        (37, "blocks", 6, r"event 37 \(stored\): \[6\] must not be cached already"),
        (19, "sequence", 7, r"event 19 \(freed\) cannot follow those before it: there is no 7"),
        (20, "sequence", 1, r"event 20 \(admitted\): sequence 1 must not run already"),
        (34, "blocks", 6, r"event 34 \(copied\): 6 must be the last block of its table"),
        (3, "blocks", 8, r"event 3 \(stored\) cannot follow those before it: there is no "),
        (19, "sequence", -1, r"event 19 \(freed\) cannot follow those before it: there is no -1"),
    ],
)
def test_a_log_that_contradicts_itself_is_refused(
    row: int, column: str, value: int, message: str | None
) -> None:
    manager = scenario()
    assert manager.events is not None
    columns = manager.events.columns()
    place = int(columns["num_blocks"][:row].sum()) if column == "blocks" else row
    columns[column][place] = value
    changed = EventLog.from_columns(columns)
    if message is None:
        assert rebuild(changed) == CacheState.of(manager)
    else:
        with pytest.raises(ValueError, match=message):
            rebuild(changed)


def test_events_up_to_a_time() -> None:
    log = scenario().events
    assert log is not None
    assert [log.at_time(now) for now in (0, 9, 10, 19, 20, 29, 30, 99)] == [4, 4, 11, 11, 20, 20, 39, 39]
    assert EventLog.from_columns(log.columns()).at_time(19) == 11


def test_events_are_read_within_bounds() -> None:
    log = scenario().events
    assert log is not None
    with pytest.raises(ValueError, match="events 3 to 40 must lie within the 39 of the log"):
        list(log.events(3, 40))
    assert [event.blocks.tolist() for event in log.events(24, 26)] == [[4], [4]]
    assert [event.blocks.tolist() for event in log.events(2, 4)] == [[0, 1, 2], [0, 1]]


def test_without_reuse_and_without_paging() -> None:
    manager = KVCacheManager(4, 2, CacheConfig(enable_block_reuse=False), events=True)
    one, two = (manager.admit(TokenContent([1, 2, 3]), 3) for _ in range(2))
    manager.release(one)
    assert manager.events is not None
    assert rebuild(manager.events) == CacheState.of(manager)
    assert rebuild(manager.events).states.tolist() == [FREE, FREE, REFERENCED, REFERENCED]
    manager.release(two)
    assert rebuild(manager.events).counts()["free"] == 4

    whole = KVCacheManager.contiguous(3, 100, events=True)
    sequence = whole.admit(TokenContent([1] * 90), 90)
    whole.append([sequence], None, 10)
    assert whole.events is not None
    assert next(whole.events.lines()).endswith("tokens_per_block 100, num_blocks 3")
    assert rebuild(whole.events) == CacheState.of(whole)


def test_a_refused_call_logs_nothing_and_off_is_the_default() -> None:
    manager = KVCacheManager(2, 2, events=True)
    manager.admit(TokenContent([1, 2, 3]), 3)
    assert manager.events is not None
    before = len(manager.events)
    with pytest.raises(Exception, match="1 blocks needed"):
        manager.admit(TokenContent([4]), 1)
    assert len(manager.events) == before
    assert KVCacheManager(2, 2).events is None


def test_the_names_of_the_kinds_are_those_of_the_constants() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for number, kind in enumerate(KINDS):
        assert getattr(event_log, kind.name.upper()) == number
