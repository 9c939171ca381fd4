"""Quotas of tenants, in scenarios small enough to follow by hand; the fuzz machines do the rest."""

from __future__ import annotations

import pickle

import pytest

from allocator.content import TokenContent, UniqueContent
from allocator.manager import KVCacheManager, OutOfBlocks, QuotaExceeded


def test_a_tenant_is_stopped_where_another_goes_on() -> None:
    manager = KVCacheManager(20, 4, quotas={"small": 3})
    first = manager.admit(UniqueContent(8), 8, tenant="small")
    other = manager.admit(UniqueContent(8), 8, tenant="large")
    free = manager.admit(UniqueContent(8), 8)
    manager.append([first, other, free])
    assert manager.tenant_blocks("small") == manager.tenant_blocks("large") == 3
    manager.append([first, other, free], None, 3)
    with pytest.raises(QuotaExceeded, match=r"tenant \('small'\) needs 1 blocks, its quota leaves 0"):
        manager.append([first, other, free])
    assert [s.num_tokens for s in (first, other, free)] == [12, 12, 12]
    manager.append([other, free])
    manager.release(first)
    assert manager.tenant_blocks("small") == 0


def test_admission_is_refused_as_can_admit_says() -> None:
    manager = KVCacheManager(20, 4, quotas={"a": 3})
    content = UniqueContent(13)
    match = manager.lookup(content)
    assert manager.can_admit(match, 12, "a")
    assert not manager.can_admit(match, 13, "a")
    assert manager.can_admit(match, 13, "b")
    with pytest.raises(OutOfBlocks):
        manager.admit(content, 13, tenant="a")
    sequence = manager.admit(content, 12, tenant="a")
    with pytest.raises(QuotaExceeded):
        manager.extend(sequence, 1)
    manager.set_quota("a", 4)
    manager.extend(sequence, 1)
    manager.check_invariants()


def test_a_shared_block_counts_for_every_table() -> None:
    manager = KVCacheManager(20, 4, quotas={"a": 5})
    content = TokenContent([1] * 8)
    first = manager.admit(content, 8, tenant="a")
    second = manager.admit(TokenContent([1] * 9), 1, tenant="a")
    assert second.hit_blocks == 2
    assert manager.tenant_blocks("a") == 5
    with pytest.raises(QuotaExceeded):
        manager.fork(first)
    manager.truncate(second, 4)
    (child,) = manager.fork(first)
    assert child.tenant is first.tenant
    assert manager.tenant_blocks("a") == 5
    with pytest.raises(QuotaExceeded):
        manager.append([child])
    manager.reorder_beams([first, child], [1, 1])  # a fork and an end, and never more than before
    manager.check_invariants()


def test_a_batch_is_stopped_as_a_whole() -> None:
    manager = KVCacheManager(40, 4, quotas={"a": 5})
    batch = manager.batch()
    for length, tenant in ((4, "a"), (7, "a"), (4, "b")):
        batch.add(manager.admit(UniqueContent(length), length, tenant=tenant))
    manager.append(batch)  # a: 1 + 2 blocks, and one more for the first
    assert manager.tenant_blocks("a") == 4
    with pytest.raises(QuotaExceeded):
        manager.advance(batch, 4)
    assert [s.num_tokens for s in batch] == [5, 8, 5]
    manager.advance(batch, 3)
    assert manager.tenant_blocks("a") == 5
    manager.check_invariants()


def test_a_quota_below_what_is_used_only_stops_growth() -> None:
    manager = KVCacheManager(20, 4)
    sequence = manager.admit(UniqueContent(9), 9, tenant="a")
    manager.set_quota("a", 1)
    manager.append([sequence])
    with pytest.raises(QuotaExceeded):
        manager.append([sequence], None, 3)
    manager.set_quota("a", None)
    manager.append([sequence], None, 3)


def test_bad_quotas_are_named() -> None:
    with pytest.raises(ValueError, match=r"quota \(-1\) must be at least 0"):
        KVCacheManager(4, 4, quotas={"a": -1})


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(QuotaExceeded("a", 3, 1)))
    assert (error.tenant, error.needed, error.available) == ("a", 3, 1)
