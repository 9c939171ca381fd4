"""Job: one sequence of a request on its way through the engine."""

from __future__ import annotations

from allocator.content import Content
from allocator.manager import KVSequence, PrefixMatch
from allocator.windows import AttentionWindow
from sim.request import Request


class Job:
    """A sequence that waits, runs, is perhaps preempted and runs again, and finishes.

    A request begins as one job. When its prompt is computed and it wants several samples, the job is forked
    into one for each, which then live by themselves.

    final_tokens  tokens that have KV at the end: the last one sampled never gets any
    final_blocks  blocks that the job holds at the end, all its samples together; set once it has been looked at
    target        tokens to be computed before the next token can be sampled: the prompt, and after a
                  preemption what had been generated as well
    generated     tokens sampled so far
    sample        which of the request's samples it is, from 0; the first one goes on where the prompt's job was
    samples       sequences this job still stands for: all samples before the fork, 1 after
    swapped       its sequence waits in host memory, or in another replica
    written       tokens that had KV when the job was preempted: what it computes again is net of new hits
    last_ps       when its last token came, while it is preempted; else -1

    What the samples of a request come to together stands in the first one's job, their `origin`:

    left                                 samples that have not finished
    first_ps                             picoseconds; -1 until then
    arrival_ps, admit_ps                 the same; not set until then
    query_blocks, hit_blocks, hit_tokens
                                         at the first admission, and not set before
    preemptions, recomputed_tokens, cow_copies, blocks
                                         of a job while it runs; of the samples that finished, in the origin's
                                         `totals`, once there are several
    """

    final_blocks: int
    arrival_ps: int
    admit_ps: int
    query_blocks: int
    hit_blocks: int
    hit_tokens: int

    __slots__ = (
        "admit_ps",
        "arrival_ps",
        "content",
        "cow_copies",
        "final_blocks",
        "final_tokens",
        "first_ps",
        "generated",
        "hit_blocks",
        "hit_tokens",
        "last_ps",
        "left",
        "match",
        "origin",
        "preemptions",
        "query_blocks",
        "recomputed_tokens",
        "request",
        "sample",
        "samples",
        "sequence",
        "swapped",
        "target",
        "totals",
        "written",
    )

    def __init__(self, request: Request, samples: int, sample: int = 0, origin: Job | None = None) -> None:
        self.request = request
        self.sample = sample
        self.samples = self.left = samples
        self.origin = origin
        self.target = prompt = request.prompt_tokens
        self.final_tokens = prompt + request.output_tokens - 1
        self.generated = self.written = self.preemptions = self.recomputed_tokens = self.cow_copies = 0
        self.first_ps = self.last_ps = -1
        self.swapped = False
        self.sequence: KVSequence | None = None
        self.content: Content | None = None
        self.match: PrefixMatch | None = None
        self.totals: tuple[int, int, int, int] | None = None

    @property
    def remaining_tokens(self) -> int:
        """Return how many tokens are still to be sampled."""
        return self.request.output_tokens - self.generated

    def blocks_at_end(self, tokens_per_block: int, window: AttentionWindow | None = None) -> int:
        """Return how many blocks all its samples hold at the end, full blocks of the prompt shared.

        Samples of one token are drawn when the prompt is computed, and share all of it. Where a window lets go of
        blocks, it is the most that they hold while they decode, and they share no more than the sinks' blocks.
        """
        end = -(-self.final_tokens // tokens_per_block)
        leaves = window is not None and window.left(self.final_tokens)
        if window is not None and leaves:
            end = window.blocks_held(self.final_tokens)
        if self.samples == 1 or self.request.output_tokens == 1:
            return end
        shared = self.request.prompt_tokens // tokens_per_block
        if window is not None and leaves:
            shared = min(shared, window.sink_blocks)
        return shared + self.samples * (end - shared)

    def __repr__(self) -> str:
        return f"<Job of request {self.request.request_id}: {self.generated} of {self.request.output_tokens}>"
