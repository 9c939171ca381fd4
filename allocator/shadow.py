"""ShadowKV: what every slot of the pool would hold if the kernels ran, as identities instead of numbers.

The KV of a token depends on all the tokens before it. So the shadow gives each *history* (a salt and some
tokens after it) a number of its own, and a slot holds the number of the history that was written there. A
sequence reads right if, through its block table, it finds at position p the history of its first p + 1
tokens: no accounting can hide a block that was reused too early, copied too late or hit by mistake.

The shadow knows nothing of how a manager decides; it sees slots, copy lists and block tables only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from allocator.content import ChunkContent, Content, TokenContent, UniqueContent

State = int
"""The number of a history."""

_unnamed = itertools.count(1)


def fresh_tokens(count: int) -> list[Hashable]:
    """Return tokens that equal no others: what a sequence generated and nobody named."""
    return [("unnamed", next(_unnamed)) for _ in range(count)]


class ShadowKV:
    """The slots of a pool of blocks of `tokens_per_block`; nothing is written yet."""

    def __init__(self, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self._numbers: dict[tuple[State, Hashable], State] = {}
        self._parents: list[State] = [0]
        self._slots: dict[int, State] = {}

    def twin(self) -> ShadowKV:
        """Return the shadow of another pool, empty, in which histories have the same numbers."""
        other = ShadowKV(self.tokens_per_block)
        other._numbers, other._parents = self._numbers, self._parents
        return other

    def after(self, state: State, token: Hashable) -> State:
        """Return the history that goes on from `state` with `token`."""
        key = (state, token)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._parents)
            self._parents.append(state)
        return number

    def states(self, salt: Hashable, tokens: Iterable[Hashable]) -> list[State]:
        """Return the histories of the first 1, 2, … tokens behind a salt."""
        state = self.after(0, ("salt", salt))
        out = []
        for token in tokens:
            state = self.after(state, token)
            out.append(state)
        return out

    def write(self, slots: Iterable[int], states: Iterable[State]) -> None:
        """Write one history to each slot."""
        for slot, state in zip(slots, states, strict=True):
            self._slots[slot] = state

    def copy(self, copies: Iterable[Sequence[int]]) -> None:
        """Execute a copy list as parallel kernels would: all reads before all writes."""
        size = self.tokens_per_block
        moved = {
            destination * size + i: self._slots.get(source * size + i, 0)
            for source, destination, valid in copies
            for i in range(valid)
        }
        self._slots.update(moved)

    def move(self, pairs: Iterable[tuple[int, int]], other: ShadowKV) -> None:
        """Execute a transfer list into another pool, whole blocks, as parallel kernels would."""
        size = self.tokens_per_block
        for source, destination in pairs:
            for i in range(size):
                other._slots[destination * size + i] = self._slots.get(source * size + i, 0)

    def read(self, table: Sequence[int], num_tokens: int) -> list[State]:
        """Return what a sequence finds at its first `num_tokens` positions; 0 where nothing was written."""
        size, slots = self.tokens_per_block, self._slots
        return [slots.get(table[p // size] * size + p % size, 0) for p in range(num_tokens)]

    def slots(self, block: int) -> list[State]:
        """Return what all slots of a block hold."""
        return self.read([block], self.tokens_per_block)

    def block(self, block: int) -> State:
        """Return the history that a full block ends; 0 if its slots do not follow one from the other."""
        found = self.slots(block)
        for earlier, later in itertools.pairwise(found):
            if self._parents[later] != earlier:
                return 0
        return found[-1]

    def is_root(self, state: State) -> bool:
        """Return whether a history is a salt with no tokens after it."""
        return state != 0 and self._parents[state] == 0

    def block_before(self, state: State) -> State:
        """Return the history one block shorter; of a first block, that of the salt alone."""
        for _ in range(self.tokens_per_block):
            state = self._parents[state]
        return state


@dataclass(frozen=True)
class Prompt:
    """A content, and by the shadow's account what it says: `tokens` go on beyond the prompt if named."""

    content: Content
    tokens: tuple[Hashable, ...]

    @property
    def num_tokens(self) -> int:
        """Return the length of the prompt proper."""
        return self.content.num_prompt_tokens


@dataclass(frozen=True)
class PromptSpec:
    """A small prompt, written so that it can be pasted into a test.

    kind         tokens (each symbol a token), runs (each symbol `tokens_per_block` tokens), chunks (each symbol
                 `granularity` tokens) or unique
    symbols      small ints; equal beginnings are what makes prompts collide
    cut          tokens that the prompt lacks at its end
    named        whether the tokens cut off are known to follow
    """

    kind: str
    symbols: list[int]
    cut: int = 0
    named: bool = False
    granularity: int = 1

    def make(self, tokens_per_block: int) -> Prompt:
        """Return the prompt for a pool of such blocks."""
        repeats = {"tokens": 1, "chunks": self.granularity}.get(self.kind, tokens_per_block)
        symbols = [symbol for symbol in self.symbols for _ in range(repeats)]
        length = max(1, len(symbols) - self.cut)
        known = len(symbols) if self.named else length
        if self.kind == "unique":
            return Prompt(UniqueContent(length), tuple(fresh_tokens(length)))
        if self.kind == "chunks":
            content: Content = ChunkContent(self.symbols, self.granularity, length, known)
            return Prompt(content, tuple((self.granularity, symbol) for symbol in symbols[:known]))
        return Prompt(TokenContent(symbols[:known], length), tuple(symbols[:known]))


@dataclass(eq=False)
class Story:
    """What one sequence has said so far, and what it is known to say next."""

    shadow: ShadowKV
    salt: Hashable
    tokens: list[Hashable]
    """All known tokens: those that have a slot, then those that are named in advance."""
    prompt: int
    length: int = 0
    step: int = 0
    """The first of the tokens that its last step wrote."""
    states: list[State] = field(default_factory=list)
    """The histories of the tokens that have a slot, [length]."""
    wish: Callable[[int], Any] = lambda position: None
    """What it says of how its block at a position is to be kept, see `allocator.rules.retention`."""
    noted: int = 0
    """How many of its blocks' wishes have been noted."""
    nameable: bool = False
    """Whether its content can name tokens one by one."""

    def next_tokens(self, count: int, named: Sequence[int] | None = None) -> list[Hashable]:
        """Return the next `count` tokens: with these names, or those known before, or like no others."""
        if named is not None:
            return list(named)
        last = self.length + count
        self.tokens += fresh_tokens(last - len(self.tokens))
        return self.tokens[self.length : last]

    def say(self, count: int, named: Sequence[int] | None = None) -> list[State]:
        """Go on by `count` tokens, see `next_tokens`; return the new histories."""
        first, last = self.length, self.length + count
        self.step = first
        self.tokens[first:last] = self.next_tokens(count, named)
        state = self.states[-1] if self.states else self.shadow.after(0, ("salt", self.salt))
        for token in self.tokens[first:last]:
            state = self.shadow.after(state, token)
            self.states.append(state)
        self.length = last
        return self.states[first:]

    def fork(self) -> Story:
        """Return a story equal so far; what nobody has said or asked yet, it will say in its own way."""
        known = max(self.length, self.prompt)
        states = list(self.states)
        return Story(
            self.shadow,
            self.salt,
            self.tokens[:known],
            self.prompt,
            self.length,
            self.step,
            states,
            self.wish,
            self.noted,
            self.nameable,
        )

    def truncate(self, length: int) -> None:
        """Forget what was said beyond `length`, and what was known to follow."""
        self.length = length
        self.prompt = min(self.prompt, length)
        self.noted = min(self.noted, length // self.shadow.tokens_per_block)
        del self.tokens[length:], self.states[length:]

    def named(self) -> list[int]:
        """Return the token ids that it has said, up to the first that nobody named."""
        said: list[int] = []
        for token in self.tokens[: self.length]:
            if not isinstance(token, int):
                break
            said.append(token)
        return said

    def resumed(self, content: Content) -> Prompt:
        """Return all it has said as the prompt `content`, to be said again."""
        return Prompt(content, tuple(self.tokens))

    def full_states(self) -> list[State]:
        """Return the histories that its full blocks end."""
        size = self.shadow.tokens_per_block
        return self.states[size - 1 : self.length : size]
