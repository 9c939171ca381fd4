"""Placement: where each request of a cluster was served, and how its KV cache got from one replica to the other."""

from __future__ import annotations

import dataclasses
from array import array

import numpy as np

from sim.records import Columns, RunResult
from sim.request import Request
from sim.scheduler.job import Job
from sim.stored import StoredColumns

NOWHERE = -1
"""The replica of a turn that never arrives, as its predecessor was rejected, and of a transfer that was not needed."""

TRANSFER_COLUMNS = ("decode_replica", "transferred_blocks", "transfer_start_ps", "transfer_end_ps")
"""Of requests, where prefill and decode are apart. A transfer starts when its blocks have been taken, though it may
then wait for those before it; of a request that needs none, all are −1, and 0 blocks."""


class Placement:
    """What is known of each request beside what the replicas record, in the making."""

    def __init__(self, num_requests: int, prefill_replicas: int) -> None:
        self._prefill_replicas = prefill_replicas
        self._replica = array("i", [NOWHERE]) * num_requests
        self._transfers: dict[str, array[int]] = {}
        if prefill_replicas:
            for name in TRANSFER_COLUMNS:
                self._transfers[name] = array("q", [0 if name == "transferred_blocks" else -1]) * num_requests
        self._before: dict[int, tuple[int, int]] = {}

    def arrived(self, request: Request, replica: int) -> None:
        """Note to which replica a request was routed."""
        self._replica[request.request_id] = replica

    def handed_over(self, job: Job, replica: int) -> None:
        """Note where a job goes whose prompt is complete, and what it went through before."""
        self._transfers["decode_replica"][job.request.request_id] = replica
        if job.preemptions:
            self._before[job.request.request_id] = job.preemptions, job.recomputed_tokens

    def received(self, job: Job, num_blocks: int, now_ps: int) -> None:
        """Note that the transfer of a job's blocks, so many, starts."""
        self._transfers["transferred_blocks"][job.request.request_id] = num_blocks
        self._transfers["transfer_start_ps"][job.request.request_id] = now_ps

    def transferred(self, job: Job, now_ps: int) -> None:
        """Note that it is over."""
        self._transfers["transfer_end_ps"][job.request.request_id] = now_ps

    def completed(self, result: RunResult) -> RunResult:
        """Return a result with what is known of its requests, which are in trace order."""
        columns = {"replica": np.array(self._replica, dtype=np.int64)}
        for name, values in self._transfers.items():
            columns[name] = np.array(values, dtype=np.int64)
        if self._before:
            rows = list(self._before)
            for name, more in zip(
                ("preemptions", "recomputed_tokens"), zip(*self._before.values(), strict=True), strict=True
            ):
                columns[name] = np.array(result.requests[name], dtype=np.int64)
                columns[name][rows] += more
        requests: Columns
        if isinstance(result.requests, StoredColumns):
            requests = result.requests.with_columns(columns)
        else:
            requests = {**result.requests, **columns}
        return dataclasses.replace(result, requests=requests, prefill_replicas=self._prefill_replicas)
