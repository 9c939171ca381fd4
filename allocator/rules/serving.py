"""Requests that come and go: what fills a cache, hits it, and empties it again."""

from __future__ import annotations

from hypothesis import strategies as st

from allocator.retention import RetentionConfig
from allocator.rules.base import symbols_up_to
from allocator.rules.operation import operation
from allocator.rules.retention import RETENTIONS, RetentionRules
from allocator.sequence import KVSequence
from allocator.shadow import PromptSpec

SERVED = st.builds(
    PromptSpec,
    kind=st.sampled_from(["runs", "runs", "tokens"]),
    symbols=symbols_up_to(5),
    cut=st.integers(0, 1),
)


class ServingRules(RetentionRules):
    """Requests that are admitted whole and released, one after the other."""

    def dismiss(self, sequence: KVSequence) -> None:
        """Release a sequence."""
        self.end_step_of(sequence)
        self.manager.release(sequence)
        del self.stories[sequence]
        self.check_all()

    @operation(
        prompts=st.lists(SERVED, min_size=1, max_size=4),
        retention=st.none() | RETENTIONS,
        wait=st.sampled_from([0, 0, 1, 3]),
    )
    def come_and_go(self, prompts: list[PromptSpec], retention: RetentionConfig | None, wait: int) -> None:
        """Serve some requests, once all but one of those that run have ended."""
        for sequence in list(self.stories)[:-1]:
            self.dismiss(sequence)
        for spec in prompts:
            prompt = self.learn(spec.make(self.size))
            known = len(self.stories)
            if not self.admit_prompt(prompt, "", prompt.num_tokens, retention=retention):
                break
            assert len(self.stories) == known + 1
            sequence = next(reversed(self.stories))
            self.check_all()
            self.dismiss(sequence)
            if wait and self.time_can_pass:
                self.let_time_pass(wait)
            self.did("come and go")
