"""Plan: what one step computes."""

from __future__ import annotations

from sim.scheduler.job import Job


class Plan:
    """What one step computes, beside one token for every decoding job.

    chunks          of each prefill chunk, in the order of scheduling: its tokens, and the keys that the last of them
                    attends to
    prefilling      the jobs of these chunks
    completed       those of them whose prompt is complete with its chunk
    prefill_tokens  of all chunks
    admitted        jobs that start, or come back from host memory
    preempted       jobs that had to go
    out_of_blocks   whether decoding or a prefill chunk found too few blocks
    copied          blocks that decoding jobs had to copy before they could write
    moved           blocks that move between GPU and host memory before anything is computed
    decoding        sequences that decode; the others of the batch wait while prompts are computed
    context         keys that those attend to
    window_keys     those of them in each of the cost's windows, if it has any
    resumes         whether they waited so before this step
    """

    __slots__ = (
        "admitted",
        "chunks",
        "completed",
        "context",
        "copied",
        "decoding",
        "moved",
        "out_of_blocks",
        "preempted",
        "prefill_tokens",
        "prefilling",
        "resumes",
        "window_keys",
    )

    def __init__(self) -> None:
        self.chunks: list[tuple[int, int]] = []
        self.prefilling: list[Job] = []
        self.completed: list[Job] = []
        self.admitted: list[Job] = []
        self.preempted: list[Job] = []
        self.prefill_tokens = self.copied = self.decoding = self.context = self.moved = 0
        self.window_keys: tuple[int, ...] = ()
        self.out_of_blocks = self.resumes = False

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to do, so that there is no step."""
        return not (self.decoding or self.chunks or self.admitted or self.preempted or self.moved)

    @property
    def is_quiet(self) -> bool:
        """Return whether the step only decodes, so that the next may be like it."""
        return not (
            self.chunks or self.admitted or self.preempted or self.copied or self.moved or self.resumes
        )
