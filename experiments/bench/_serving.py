"""The seeded workloads of the allocator's head-to-head, and the loop that serves them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np

TOKENS_PER_BLOCK = 16
OUTPUT_TOKENS = 128
PREFIX_TOKENS = 512
VOCABULARY = 32_000

PROMPTS_SHA256 = {"standard": "e618c3e7d375496c", "hard": "05980dfd3aa3e0fe"}
"""How the SHA-256 of all prompts begins, as one row of int32, for seed 0 and 2,000 requests."""


@dataclass(frozen=True)
class Workload:
    """Requests to serve: token ids as lists, as they would arrive; the pool, and how many run at once."""

    name: str
    num_blocks: int
    max_running: int
    prompts: list[list[int]]
    outputs: list[list[int]]
    steps: list[list[int]]  # the ids that each step samples, one a running request, in order of admission

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def tokens(self) -> int:
        """Return all tokens, prompts and outputs."""
        return self.prompt_tokens + sum(map(len, self.outputs))

    def sha256(self) -> str:
        """Return the SHA-256 of all prompts as one row of int32."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(np.array(prompt, dtype=np.int32).tobytes())
        return digest.hexdigest()


def make_workload(hard: bool = False, seed: int = 0, requests: int = 2000) -> Workload:
    """Return the workload: lognormal lengths of mean 1,000, of which a share begins with one of some prefixes.

    Half share one of 20 prefixes, evenly, in 20,000 blocks with 64 running. Hard: 80% share one of 300, by rank
    to the power −0.7, in 6,000 blocks with 32 running, so that what is evicted decides.
    """
    prefixes, share = (300, 0.8) if hard else (20, 0.5)
    rng = np.random.default_rng(seed)
    sigma = 0.7
    lengths = np.clip(np.rint(rng.lognormal(np.log(1000) - sigma**2 / 2, sigma, requests)), 16, 8192)
    texts = rng.integers(1, VOCABULARY, (prefixes, PREFIX_TOKENS))
    shared = rng.random(requests) < share
    if hard:
        weights = np.arange(1, prefixes + 1) ** -sigma
        chosen = rng.choice(prefixes, requests, p=weights / weights.sum())
    else:
        chosen = rng.integers(0, prefixes, requests)
    prompts, outputs = [], []
    for length, index, is_shared in zip(lengths.astype(int), chosen, shared, strict=True):
        if is_shared:
            rest = rng.integers(1, VOCABULARY, max(length - PREFIX_TOKENS, 16))
            prompts.append(np.concatenate([texts[index], rest]).tolist())
        else:
            prompts.append(rng.integers(1, VOCABULARY, length).tolist())
        outputs.append(rng.integers(1, VOCABULARY, OUTPUT_TOKENS).tolist())
    blocks, running = (6_000, 32) if hard else (20_000, 64)
    name = "hard" if hard else "standard"
    return workload_of(name, blocks, running, prompts, outputs)


def workload_of(
    name: str, num_blocks: int, max_running: int, prompts: list[list[int]], outputs: list[list[int]]
) -> Workload:
    """Return a workload of some requests, with the ids laid out by step; each output has OUTPUT_TOKENS."""
    steps = []
    position = [0] * len(outputs)
    for event, members in schedule(len(prompts), max_running):
        if event == "append":
            steps.append([outputs[request][position[request]] for request in members])
            for request in members:
                position[request] += 1
    return Workload(name, num_blocks, max_running, prompts, outputs, steps)


def schedule(requests: int, max_running: int) -> Iterator[tuple[str, list[int]]]:
    """Yield what `serve` does, in order: ("admit" | "append" | "free", the requests concerned)."""
    running: deque[tuple[int, int]] = deque()  # request, and the step after which it is done
    arrived = step = 0
    while arrived < requests or running:
        while arrived < requests and len(running) < max_running:
            yield "admit", [arrived]
            running.append((arrived, step + OUTPUT_TOKENS))
            arrived += 1
        yield "append", [request for request, _ in running]
        step += 1
        while running and running[0][1] == step:
            yield "free", [running.popleft()[0]]


class Server(Protocol):
    """A cache manager behind the four calls that the loop makes."""

    def admit(self, prompt: list[int]) -> tuple[Any, int]:
        """Admit a request, its whole prompt at once; return a handle and the prompt tokens found in the cache."""

    def append(self, tokens: list[int]) -> object:
        """Give each running request, in order of admission, a token; return the slots, if it knows them."""

    def free(self, request: Any) -> None:
        """Free a request."""


@dataclass
class Run:
    """What serving a workload took (s), and what happened."""

    total_s: float = 0.0
    admit_s: float = 0.0
    append_s: float = 0.0
    free_s: float = 0.0
    hits: list[int] = field(default_factory=list)  # by request
    requests: list[Any] = field(default_factory=list)  # handles, by request
    slots: list[Any] = field(default_factory=list)  # by step


def serve(server: Server, workload: Workload) -> Run:
    """Admit in order while there is room for more to run, give each a token, free the finished; until all are done.

    Everything is on the clock, from the first list of ids to the last free.
    """
    run = Run()
    waiting = deque(workload.prompts)
    running: deque[tuple[Any, int]] = deque()  # handle, and the step after which it is done
    start = perf_counter()
    for step, tokens in enumerate(workload.steps, start=1):
        if waiting and len(running) < workload.max_running:
            before = perf_counter()
            while waiting and len(running) < workload.max_running:
                request, hit = server.admit(waiting.popleft())
                run.requests.append(request)
                run.hits.append(hit)
                running.append((request, step + OUTPUT_TOKENS - 1))
            run.admit_s += perf_counter() - before
        run.slots.append(server.append(tokens))
        if running[0][1] == step:
            before = perf_counter()
            while running and running[0][1] == step:
                server.free(running.popleft()[0])
            run.free_s += perf_counter() - before
    run.total_s = perf_counter() - start
    run.append_s = run.total_s - run.admit_s - run.free_s  # and what the loop takes
    return run
