"""Jobs far back in the queue: packed, they wait as they did, come back as they were, and take little memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from different_cases import different_examples
from engine_cases import Scenario, assert_identical, scenarios
from hypothesis import example, given
from hypothesis import strategies as st

from allocator.config import BuildConfig
from sim.request import Request
from sim.scheduler.job import Job
from sim.scheduler.waiting import FirstCome

UNPACKED = "sim.scheduler.waiting.UNPACKED"
PART = "sim.scheduler.backlog._PART"


def _job(row: int) -> Job:
    ids = np.arange(row, row + 3) if row % 3 else None
    request = Request(
        row, 7 * row, 3, 5, ids, 1 if row % 3 else 0, None, 3 if row % 3 else 0, salt=str(row % 2)
    )
    job = Job(request, request.num_sequences)
    job.arrival_ps, job.final_blocks = 9 * row, row + 1
    return job


def _says(job: Job) -> tuple[object, ...]:
    request = job.request
    ids = None if request.chunk_ids is None else request.chunk_ids.tolist()
    fields = (request.arrival_ps, request.prompt_tokens, request.output_tokens, request.salt, ids)
    return (request.request_id, job.arrival_ps, job.final_blocks, job.preemptions, *fields)


@given(
    st.lists(st.sampled_from(["arrive", "arrive", "arrive", "start", "start", "preempt", "come back"])),
    st.integers(1, 6),
    st.integers(1, 4),
)
@example(["arrive"] * 4 + ["start", "come back"], 1, 1)
def test_the_queue_is_what_a_list_would_be(operations: list[str], unpacked: int, part: int) -> None:
    """Also where a job that has been running arrives, as in a replica that decodes only, and cannot be packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNPACKED, unpacked)
        patch.setattr(PART, part)
        queue, plain = FirstCome(), list[Job]()
        started: list[Job] = []
        whole = 0  # jobs that waited when all had to be unpacked for one that cannot be packed
        for row, operation in enumerate(operations):
            if operation == "arrive":
                queue.append(_job(row))
                plain.append(_job(row))
            elif operation == "start" and plain:
                started.append(queue.pop_first())
                assert _says(started[-1]) == _says(plain.pop(0))
            elif operation in ("preempt", "come back") and started:
                job = started.pop()
                job.preemptions += 1
                if operation == "preempt":
                    queue.put_back(job)
                    plain.insert(0, job)
                else:
                    queue.append(job)
                    plain.append(job)
                    assert not queue.packed
                    whole = len(plain)
            assert len(queue) + queue.packed == len(plain)
            assert bool(queue) == bool(plain)
            preempted = len(started) + sum(job.preemptions > 0 for job in queue)
            assert len(queue) <= max(unpacked, whole) + part + preempted
            few = queue.first_few(unpacked // 2)
            assert [_says(job) for job in few] == [_says(job) for job in plain[: len(few)]]
            assert len(few) == min(unpacked // 2, len(plain))


@different_examples(1)
@given(scenarios(), st.integers(1, 3), st.integers(1, 3))
def test_runs_are_the_same_with_a_backlog(scenario: Scenario, unpacked: int, part: int) -> None:
    plain = scenario.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNPACKED, unpacked)
        patch.setattr(PART, part)
        patch.setattr("sim.scheduler.protection.PROTECTED", 1)
        with_backlog = scenario.run()
        patch.setattr(UNPACKED, 1000)
        assert_identical(with_backlog, scenario.run() if scenario.engine.protect_waiting_hits else plain)


def test_few_of_those_who_wait_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request runs at a time, and all others arrive at once."""
    monkeypatch.setattr(UNPACKED, 64)
    monkeypatch.setattr(PART, 32)
    most = 0
    append = FirstCome.append

    def count(queue: FirstCome, job: Job) -> None:
        nonlocal most
        append(queue, job)
        if job.request.request_id % 50 == 0:
            most = max(most, sum(type(each) is Job for each in gc.get_objects()))

    monkeypatch.setattr(FirstCome, "append", count)
    requests = [Request(row, 0, 4, 2) for row in range(600)]
    scenario = Scenario(requests, BuildConfig(1, 16, 64, tokens_per_block=4), 4)
    gc.freeze()  # what there is already is not looked through
    try:
        assert (scenario.run().requests["status"] == "finished").all()
    finally:
        gc.unfreeze()
    assert 64 <= most < 64 + 32 + 32 + 10
