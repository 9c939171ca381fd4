"""Hits across requests."""

from __future__ import annotations

from allocator.oracle import MAX_LIVE
from allocator.rules.base import CHUNKS, INDEX, PROMPTS, SALTS, ManagerMachine
from allocator.rules.operation import operation
from allocator.shadow import PromptSpec


class ReuseRules(ManagerMachine):
    """Hits across requests: matches that grow stale, preempted sequences that come back."""

    @operation(prompt=PROMPTS, again=INDEX, salt=SALTS)
    def lookup(self, prompt: PromptSpec, again: int, salt: str) -> None:
        """Look a prompt up and keep the match for later; ask what those kept before have to say by now."""
        for kept, its_salt, earlier in self.matches:
            self.compare_matches(earlier, self.manager.lookup(kept.content, its_salt), 1 + again)
        old = self.prompts and again % 4
        made = self.prompts[again % len(self.prompts)] if old else self.learn(prompt.make(self.size))
        before = self.snapshot()
        match = self.manager.lookup(made.content, salt)
        assert self.snapshot() == before, "a lookup changed something"
        self.check_match(made, salt, match)
        self.matches = [*self.matches[-3:], (made, salt, match)]
        self.did("lookup")

    @operation(when=lambda self: self.matches and len(self.stories) < MAX_LIVE, index=INDEX, chunk=CHUNKS)
    def admit_with_match(self, index: int, chunk: int) -> None:
        """Admit with a match that may be stale by now."""
        prompt, salt, match = self.matches[index % len(self.matches)]
        self.admit_prompt(prompt, salt, chunk, match)
        self.did("admit with a match")

    @operation(when=lambda self: self.stories, index=INDEX)
    def preempt(self, index: int) -> None:
        """Release a sequence that is to be computed again."""
        sequence = self.live(index)
        if sequence is not None:
            self.end_step_of(sequence)
            story = self.stories.pop(sequence)
            prompt = self.learn(story.resumed(sequence.content()))
            self.manager.release(sequence)
            self.waiting = [*self.waiting[-3:], (prompt, story.salt)]
            self.did("preempt")

    @operation(when=lambda self: self.waiting and len(self.stories) < MAX_LIVE, chunk=CHUNKS)
    def readmit(self, chunk: int) -> None:
        """Admit the sequence preempted last again."""
        prompt, salt = self.waiting[-1]
        if self.admit_prompt(prompt, salt, chunk, readmission=True):
            self.waiting.pop()
        self.did("readmit")
