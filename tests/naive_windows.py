"""The naive block manager of a windowed cache: which blocks a query needs, by looking at every position.

A sequence holds the blocks in its table and no others. Those that neither the next query nor any later one attends
to leave when it goes on. What the cache holds can be evicted in any order, and a prompt hits as far as there is all
that the query right behind the hit attends to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from naive_manager import Cached, Identity, NaiveManager, NaiveSequence, Refused

from allocator.rules.retention import wish_of


class Attention:
    """What a query attends to: the last `window` positions, its own among them, and the first `num_sinks`.

    A window of one is kept like one of two, so that there is always a block in front of a query.
    """

    def __init__(self, window: int, num_sinks: int, size: int) -> None:
        self.window, self.num_sinks, self.size = max(window, 2), num_sinks, size

    def needs(self, query: int, block: int) -> bool:
        """Return whether the query at a position, or a later one, attends to a token of this block."""
        tokens = range(block * self.size, (block + 1) * self.size)
        return any(token < self.num_sinks or token > query - self.window for token in tokens)

    def blocks(self, query: int) -> int:
        """Return how many blocks the query at a position attends to."""
        return sum(self.needs(query, block) for block in range(query // self.size + 1))

    def most_blocks(self, tokens: int) -> int:
        """Return the most blocks that any of the first queries attends to."""
        return max(self.blocks(query) for query in range(tokens))


class NaiveWindowedManager(NaiveManager):
    """The same semantics as a KVCacheManager with a window. What has left a table is None in it."""

    def __init__(
        self,
        num_blocks: int,
        size: int,
        policy: str,
        reuse: bool,
        ghosts: int,
        partial: str,
        window: int,
        num_sinks: int,
    ) -> None:
        super().__init__(num_blocks, size, policy, reuse, ghosts, partial)
        self.attention = Attention(window, num_sinks, size)

    # ------------------------------------------------ blocks

    def may_go(self, one: Identity) -> bool:
        return True

    def with_path(self, path: list[Identity]) -> list[Identity]:
        return path[-1:]

    # ------------------------------------------------ looking up

    def deepest(self, wanted: list[Identity]) -> int:
        """Return behind how many of these blocks a query finds all that it attends to."""
        for depth in range(len(wanted), 0, -1):
            needed = [
                one for at, one in enumerate(wanted[:depth]) if self.attention.needs(depth * self.size, at)
            ]
            if all(one in self.cached for one in needed):
                return depth
        return 0

    def lookup(self, prompt: Sequence[Hashable], salt: Hashable) -> tuple[int, dict[str, int]]:
        total, full = -(-len(prompt) // self.size), len(prompt) // self.size
        rest = {"short_of_block": 1} if total > full else {}
        if not self.reuse:
            return 0, rest | ({"cold": full} if full else {})
        wanted = self.identities(("root", salt), prompt)
        hits = self.deepest(wanted[: (len(prompt) - 1) // self.size])
        reached = self.deepest(wanted)
        causes = rest | ({"last_token": reached - hits} if reached > hits else {})
        salts = {self.salt_of(one) for one in self.cached} - {salt}
        elsewhere = [self.deepest(self.identities(("root", other), prompt)) for other in salts]
        known = [at for at, one in enumerate(wanted, 1) if one in self.cached or one in self.ghosts]
        ends = [
            ("isolated", max(elsewhere, default=0)),
            ("in_flight", max(self.ahead(wanted).values(), default=0)),
            ("evicted", max(known, default=0)),
        ]
        for cause, end in [*ends, ("unknown" if self.forgot else "cold", full)]:
            if end > reached:
                causes[cause] = end - reached
                reached = end
        return hits, causes

    def ahead(self, wanted: list[Identity]) -> dict[NaiveSequence, int]:
        """Return up to which of these blocks each sequence is going to compute some; 0 if it has computed all."""
        shared = super().ahead(wanted)
        return {s: blocks if blocks > len(s.path) else 0 for s, blocks in shared.items()}

    def computing(self, prompt: Sequence[Hashable], salt: Hashable) -> list[NaiveSequence]:
        wanted = self.identities(("root", salt), prompt) if self.reuse else []
        ahead = self.ahead(wanted)
        most = max(ahead.values(), default=0)
        return [s for s, blocks in ahead.items() if blocks == most > self.deepest(wanted)]

    def blocks_at_once(self, prompt: Sequence[Hashable]) -> int:
        whole = super().blocks_at_once(prompt)
        return whole if whole <= self.num_blocks else self.attention.most_blocks(len(prompt))

    # ------------------------------------------------ sequences

    def admit(
        self,
        prompt: Sequence[Hashable],
        salt: Hashable,
        num_tokens: int,
        retention: Any = None,
        part: Identity | None = None,
        part_tokens: int = 0,
    ) -> NaiveSequence:
        hits, _ = self.lookup(prompt, salt)
        length = hits * self.size + part_tokens + num_tokens
        found = self.identities(("root", salt), prompt)[:hits]
        needed = [self.attention.needs(hits * self.size, at) for at in range(hits)]
        held = [one for one, is_needed in zip(found, needed, strict=True) if is_needed]
        kept = part is not None and part in self.idle and not self.is_leaf(part)
        grow = -(-length // self.size) - hits
        if grow + sum(one in self.idle for one in held) + kept > self.available:
            raise Refused
        self.roots += 1
        sequence = NaiveSequence(("root", salt) if self.reuse else ("root", self.roots), salt, list(prompt))
        for one, is_needed in zip(found, needed, strict=True):
            if is_needed:
                self.hit(one)
            sequence.table.append(self.cached[one].block if is_needed else None)
            sequence.path.append(one)
        if part is not None:
            sequence.table.append(self.part_of(part, part_tokens, sequence.path))
        self.grow(sequence, -(-length // self.size) - len(sequence.table))
        sequence.tokens = list(prompt[:length])
        if retention is not None:
            sequence.wish = wish_of(retention, len(prompt), self.size)
        self.index(sequence)
        self.sequences.append(sequence)
        return sequence

    def index(self, sequence: NaiveSequence, forking: bool = False) -> None:
        """Cache the full blocks; where the content is cached already, keep the own block and hold nothing else."""
        for one in self.identities(sequence.root, sequence.tokens)[len(sequence.path) :]:
            position = len(sequence.path)
            if one in self.cached:
                sequence.own.add(position)
                if (
                    sequence.wish(position) is not None
                ):  # as it says how that is to be kept, it uses it for a moment
                    self.hold(one)
                    self.drop(one)
            else:
                block = sequence.table[position]
                self.cached[one] = Cached(block, 1, self.cached_so_far)
                self.cached_so_far += 1
                self.fresh.add(one)
                self.ghosts.pop(one, None)
                del self.holders[block]
            sequence.path.append(one)

    def held(self, sequence: NaiveSequence) -> list[Identity]:
        """Return the cached blocks that a sequence holds, in their order."""
        return [
            one
            for at, one in enumerate(sequence.path)
            if at not in sequence.own and sequence.table[at] is not None
        ]

    def leaving(self, sequence: NaiveSequence) -> list[int]:
        """Return the positions of the blocks that the next query does not need."""
        query = len(sequence.tokens)
        return [
            at
            for at, block in enumerate(sequence.table)
            if block is not None and not self.attention.needs(query, at)
        ]

    def let_go(self, sequence: NaiveSequence) -> None:
        for at in self.leaving(sequence):
            block = sequence.table[at]
            if at in sequence.own:
                sequence.own.discard(at)
                self.free_one(block)
            else:
                self.drop(sequence.path[at])
            sequence.table[at] = None

    def free_one(self, block: int) -> None:
        self.holders[block] -= 1
        if not self.holders[block]:
            del self.holders[block]
            self.give(block)

    def gain(self, sequences: Sequence[NaiveSequence]) -> int:
        """Return how many more blocks could be taken if what these sequences do not need had left."""
        gone = Counter(s.table[at] for s in sequences for at in self.leaving(s))
        cached = {entry.block: entry for entry in self.cached.values()}
        gained = 0
        for block, times in gone.items():
            if block in cached:
                gained += times == cached[block].references and (self.reuse or not self.pins[block])
            else:
                gained += times == self.holders[block] and not self.pins[block]
        return gained

    def can_take_back(self, one: Identity) -> bool:
        """Return whether a cached last block is its one holder's alone, and nobody else goes on from there."""
        ends = sum(s.path[-1:] == [one] for s in self.sequences)
        return super().can_take_back(one) and ends == 1

    def own_tail(self, sequence: NaiveSequence) -> None:
        valid = len(sequence.tokens) % self.size
        if not (valid and self.tail_is_cached(sequence)) or self.can_take_back(sequence.path[-1]):
            super().own_tail(sequence)
            return
        one = sequence.path.pop()
        self.hold(one)
        sequence.table[-1] = self.copy(sequence.table[-1], valid, [one])
        self.drop(one)

    def write(self, sequences: Sequence[NaiveSequence], rows: Sequence[Sequence[Hashable]]) -> None:
        growth = [self.growth(s, len(row)) for s, row in zip(sequences, rows, strict=True)]
        needed = sum(growth) + self.copies_needed(sequences) - self.gain(sequences)
        if needed > self.available:
            raise Refused
        for sequence in sequences:
            self.let_go(sequence)
        super().write(sequences, rows)

    def write_batch(self, rows: dict[int, Sequence[Hashable]], count: int) -> None:
        """Let the members of the batch go on in lockstep, by one step of `count` queries each.

        Those leave first that need a block less with this very token, as one a step does, then those who lag behind.
        """
        growth = sum(self.growth(s, count) for s in self.batch)
        needed = growth + self.copies_needed(list(self.unready.values())) - self.gain(self.batch)
        if needed > self.available:
            raise Refused
        on_time = [s for s in self.batch if (len(s.tokens) - self.attention.window + 1) % self.size == 0]
        for sequence in dict.fromkeys([*on_time, *self.batch]):
            self.let_go(sequence)
        super().write_batch(rows, count)

    def join(self, sequence: NaiveSequence) -> None:
        super().join(sequence)
        self.unready[id(sequence)] = sequence

    def fork(self, sequence: NaiveSequence) -> NaiveSequence:
        for one in self.held(sequence):
            self.hold(one)
        for position in self.own_positions(sequence, 0):
            self.holders[sequence.table[position]] += 1
        child = NaiveSequence(sequence.root, sequence.salt, list(sequence.prompt))
        child.tokens, child.table = list(sequence.tokens), list(sequence.table)
        child.path, child.own, child.wish = list(sequence.path), set(sequence.own), sequence.wish
        self.sequences.append(child)
        if sequence.in_batch:
            self.unready.setdefault(id(sequence), sequence)
        return child

    def truncate(self, sequence: NaiveSequence, length: int) -> None:
        keep = -(-length // self.size)
        held = self.held(sequence)
        self.free_own(sequence, keep)
        known = keep
        if length % self.size and keep - 1 in sequence.own:  # about to be written, it is a twin no more
            sequence.own.discard(keep - 1)
            known = keep - 1
        while len(sequence.path) > known:
            one = sequence.path.pop()
            if one in held:
                self.drop(one)
        del sequence.table[keep:], sequence.tokens[length:], sequence.prompt[length:]

    def release(self, sequence: NaiveSequence) -> None:
        """Give everything back: of what is cached, the front of the window first and the sinks last."""
        if sequence.in_batch:
            self.leave(sequence)
        held = self.held(sequence)
        self.free_own(sequence, 0)
        sinks = [one for at, one in enumerate(sequence.path) if at * self.size < self.attention.num_sinks]
        for one in [*(one for one in held if one not in sinks), *(one for one in held if one in sinks)]:
            self.drop(one)
        self.sequences.remove(sequence)
