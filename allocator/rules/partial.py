"""Hits that end within a block."""

from __future__ import annotations

from hypothesis import strategies as st

from allocator.content import TokenContent
from allocator.oracle import MAX_LIVE
from allocator.rules.base import CHUNKS, INDEX, SALTS, ManagerMachine, symbols_up_to
from allocator.rules.operation import operation
from allocator.shadow import Prompt, PromptSpec

HALVES = st.builds(
    PromptSpec,
    kind=st.sampled_from(["tokens", "chunks"]),
    symbols=symbols_up_to(7).map(lambda symbols: [each for each in symbols for _ in (0, 1)]),
    cut=st.integers(0, 3),
    named=st.booleans(),
    granularity=st.sampled_from([1, 2]),
)
"""Prompts made of pairs of equal tokens (or of chunks): they agree on half a block, often."""


class PartialRules(ManagerMachine):
    """Hits that end within a block: prompts that agree on a block's first tokens."""

    @operation(when=lambda self: len(self.stories) < MAX_LIVE, prompt=HALVES, salt=SALTS, chunk=CHUNKS)
    def admit_halves(self, prompt: PromptSpec, salt: str, chunk: int) -> None:
        """Admit a prompt that others share parts of blocks with."""
        self.admit_prompt(self.learn(prompt.make(self.size)), salt, chunk)
        self.did("admit halves")

    @operation(
        when=lambda self: any(isinstance(p.content, TokenContent) for p in self.prompts),
        index=INDEX,
        keep=st.integers(1, 15),
        more=st.integers(0, 5),
        fill=st.booleans(),
        salt=SALTS,
        chunk=CHUNKS,
    )
    def admit_branch(self, index: int, keep: int, more: int, fill: bool, salt: str, chunk: int) -> None:
        """Admit a prompt that begins like a known one and goes on with tokens of its own.

        With `fill`, it leaves a prompt that is cached within its first block, and may go on until it takes about
        all the blocks there are.
        """
        known = [p for p in self.prompts if all(isinstance(token, int) for token in p.tokens)]
        if fill and self.settled and self.size > 1:
            known = [p for p in known if self.longest_hit(p, salt)[0] > 1] or known
            keep, chunk = 1 + keep % (self.size - 1), 99
            if more > 2:
                more = max((self.manager.available_blocks - (more > 4)) * self.size - keep, 0)
        if not known:
            return
        tokens = [int(str(token)) for token in known[index % len(known)].tokens[:keep]]
        tokens += [2 + more % 6] * more
        self.admit_prompt(self.learn(Prompt(TokenContent(tokens), tuple(tokens))), salt, chunk)
        self.did("admit a branch")
