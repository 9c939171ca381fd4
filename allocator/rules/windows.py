"""Windows: front blocks that leave."""

from __future__ import annotations

from hypothesis import strategies as st

from allocator.rules.base import CHUNKS, INDEX, SALTS, TOKEN_BITS, ManagerMachine, symbols_up_to
from allocator.rules.operation import operation
from allocator.shadow import PromptSpec

LONG = symbols_up_to(6)


class WindowRules(ManagerMachine):
    """Sequences that let go of what their window has passed. One program in three has a window."""

    def choose_window(self, drawn: int) -> int | None:
        """Return a window of 2 to 6 tokens, or none."""
        return drawn - 9 if drawn > 10 else None

    @operation(
        when=lambda self: any(self.complete(s) for s in self.stories),
        index=INDEX,
        count=st.integers(1, 12),
        bits=TOKEN_BITS,
        in_batch=st.booleans(),
    )
    def slide(self, index: int, count: int, bits: int | None, in_batch: bool) -> None:
        """Let a sequence, alone or in the batch, decode token by token as far as a window moves on."""
        sequence = self.live(index, self.complete)
        assert sequence is not None
        self.decode_on(sequence, count, bits, in_batch)
        self.did("slide")

    @operation(symbols=LONG, salt=SALTS, chunk=CHUNKS, count=st.integers(1, 6), in_batch=st.booleans())
    def serve(self, symbols: list[int], salt: str, chunk: int, count: int, in_batch: bool) -> None:
        """Admit a prompt of whole blocks, complete it chunk by chunk, and decode from there at once."""
        prompt = self.learn(PromptSpec("runs", symbols).make(self.size))
        if not self.admit_prompt(prompt, salt, chunk):
            return
        sequence = self.complete_newest(chunk)
        if sequence is None:
            return
        self.decode_on(sequence, count, None, in_batch)
        self.did("serve")
