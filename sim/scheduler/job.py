"""Job: one sequence of a request on its way through the engine."""

from __future__ import annotations

from allocator.content import Content
from allocator.manager import KVSequence, PrefixMatch
from sim.request import Request


class Job:
    """A sequence that waits, runs, is perhaps preempted and runs again, and finishes.

    A request begins as one job. When its prompt is computed and it wants several samples, the job is forked
    into one for each, which then live by themselves.

    target      tokens to be computed before the next token can be sampled: the prompt, and after a
                preemption what had been generated as well
    generated   tokens sampled so far
    sample      which of the request's samples it is, from 0; the first one goes on where the prompt's job was
    samples     sequences this job still stands for: all samples before the fork, 1 after
    written     tokens that had KV when the job was preempted: what it computes again is net of new hits
    """

    __slots__ = (
        "content",
        "cow_copies",
        "generated",
        "match",
        "preemptions",
        "recomputed_tokens",
        "request",
        "sample",
        "samples",
        "sequence",
        "target",
        "written",
    )

    def __init__(self, request: Request, samples: int, sample: int = 0) -> None:
        self.request = request
        self.sample = sample
        self.samples = samples
        self.target = request.prompt_tokens
        self.generated = 0
        self.written = 0
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.cow_copies = 0
        self.content: Content | None = None
        self.sequence: KVSequence | None = None
        self.match: PrefixMatch | None = None

    @property
    def final_tokens(self) -> int:
        """Return how many tokens have KV at the end: the last one sampled never gets any."""
        return self.request.prompt_tokens + self.request.output_tokens - 1

    @property
    def remaining_tokens(self) -> int:
        """Return how many tokens are still to be sampled."""
        return self.request.output_tokens - self.generated

    def final_blocks(self, tokens_per_block: int) -> int:
        """Return how many blocks all its samples hold at the end, full blocks of the prompt shared.

        Samples of one token are drawn when the prompt is computed, and share all of it.
        """
        end = -(-self.final_tokens // tokens_per_block)
        shared = end if self.request.output_tokens == 1 else self.request.prompt_tokens // tokens_per_block
        return shared + self.samples * (end - shared)

    def __repr__(self) -> str:
        return f"<Job of request {self.request.request_id}: {self.generated} of {self.request.output_tokens}>"
