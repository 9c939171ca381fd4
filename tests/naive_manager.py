"""A block manager written block by block, as plainly as possible: the second oracle for allocator/.

It shares no code with the allocator. A cached block is an entry of a dict under its identity, the pair of its
parent's identity and its own tokens; nothing is merged, split or compared in bulk, and every question is
answered by looking at everything. Tokens are any hashable things; the caller says what a sequence writes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

Identity = tuple  # (parent identity, tokens of the block); of a root, ("root", label)


class Refused(Exception):
    """Not enough blocks; nothing has changed."""


@dataclass
class Cached:
    """A block that the cache knows; `number` says how many were cached before it."""

    block: int
    references: int
    number: int


@dataclass(eq=False)
class NaiveSequence:
    """tokens: those with a slot. path: identities of the first blocks, as far as the cache knows them.

    own: positions on the path where the sequence has a block of its own beside the cached one.
    wish: how it wants the block at a position kept; None if it says nothing of it.
    """

    root: Identity
    salt: Hashable
    prompt: list[Hashable]
    tokens: list[Hashable] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    path: list[Identity] = field(default_factory=list)
    own: set[int] = field(default_factory=set)
    in_batch: bool = False
    wish: Callable[[int], tuple[int, int | None] | None] = lambda position: None


class NaiveManager:
    """The same semantics as KVCacheManager, a block at a time."""

    def __init__(
        self, num_blocks: int, size: int, policy: str, reuse: bool, ghosts: int, partial: str = ""
    ) -> None:
        self.size, self.policy, self.reuse = size, policy, reuse
        self.num_blocks, self.partial = num_blocks, partial if reuse else ""
        self.fresh: set[Identity] = set()  # cached since the last step ended
        self.ghost_capacity = ghosts if reuse else 0
        self.free = list(range(num_blocks))
        self.cached: dict[Identity, Cached] = {}
        self.idle: OrderedDict[Identity, None] = OrderedDict()  # evictable, the first to become so first
        self.ghosts: OrderedDict[Identity, None] = OrderedDict()
        self.forgot = False
        self.holders: Counter[int] = Counter()  # tables that name a block that is not cached
        self.pins: Counter[int] = Counter()
        self.limbo: list[int] = []
        self.copies: list[tuple[int, int, int, list[Identity]]] = []
        self.sequences: list[NaiveSequence] = []
        self.batch: list[NaiveSequence] = []
        self.unready: dict[int, NaiveSequence] = {}
        self.evicted: list[Identity] = []
        self.cached_so_far = 0
        self.roots = 0

    # ------------------------------------------------ blocks

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """Return a free block, else the one whose content is given up."""
        if self.free:
            return self.free.pop()
        candidates = [one for one in self.idle if self.may_go(one)]
        if self.policy == "fifo":
            candidates.sort(key=lambda one: self.cached[one].number)
        victim = candidates[0]
        del self.idle[victim]
        self.evicted.append(victim)
        self.remember(victim)
        return self.cached.pop(victim).block

    def remember(self, one: Identity) -> None:
        self.ghosts[one] = None
        while len(self.ghosts) > self.ghost_capacity:
            self.ghosts.popitem(last=False)
            self.forgot = True

    def uncache(self, one: Identity) -> int:
        """Take a block out of the cache whose only holder is about to write into it."""
        self.remember(one)
        block = self.cached[one].block
        del self.cached[one]
        return block

    def is_leaf(self, one: Identity) -> bool:
        return not any(other[0] == one for other in self.cached)

    def may_go(self, one: Identity) -> bool:
        """Return whether a block that nobody holds may be evicted."""
        return self.is_leaf(one)

    def give(self, block: int) -> None:
        (self.limbo if self.pins[block] else self.free).append(block)

    def hold(self, one: Identity) -> None:
        self.cached[one].references += 1
        self.idle.pop(one, None)

    def with_path(self, path: list[Identity]) -> list[Identity]:
        """Return what is held along with the last of these blocks, each of which continues the one before."""
        return list(path)

    def hit(self, one: Identity) -> None:
        self.hold(one)

    def drop(self, one: Identity) -> None:
        self.cached[one].references -= 1
        if self.cached[one].references:
            return
        if self.reuse:
            self.idle[one] = None
        else:
            self.give(self.cached.pop(one).block)

    # ------------------------------------------------ looking up

    def identities(self, root: Identity, tokens: Sequence[Hashable]) -> list[Identity]:
        """Return the identities of the full blocks of some tokens."""
        found, parent = [], root
        for i in range(len(tokens) // self.size):
            parent = (parent, tuple(tokens[i * self.size : (i + 1) * self.size]))
            found.append(parent)
        return found

    def cached_length(self, identities: list[Identity], ghosts: bool = False) -> int:
        length = 0
        for one in identities:
            if one not in self.cached and not (ghosts and one in self.ghosts):
                break
            length += 1
        return length

    def lookup(self, prompt: Sequence[Hashable], salt: Hashable) -> tuple[int, dict[str, int]]:
        """Return (hit blocks, missed blocks by cause)."""
        total, full = -(-len(prompt) // self.size), len(prompt) // self.size
        rest = {"short_of_block": 1} if total > full else {}
        if not self.reuse:
            return 0, rest | ({"cold": full} if full else {})
        wanted = self.identities(("root", salt), prompt)
        live = self.cached_length(wanted)
        hits = min(live, (len(prompt) - 1) // self.size)
        causes = rest | ({"last_token": live - hits} if live > hits else {})
        salts = {s for one in self.cached for s in [self.salt_of(one)] if s != salt}
        elsewhere = [self.cached_length(self.identities(("root", s), prompt)) for s in salts]
        ahead = self.ahead(wanted).values()
        known = self.cached_length(wanted, ghosts=True)
        reached = live
        ends = [
            ("isolated", max(elsewhere, default=0)),
            ("in_flight", max(ahead, default=0)),
            ("evicted", known),
        ]
        for cause, end in [*ends, ("unknown" if self.forgot else "cold", full)]:
            if end > reached:
                causes[cause] = end - reached
                reached = end
        return hits, causes

    def ahead(self, wanted: list[Identity]) -> dict[NaiveSequence, int]:
        """Return how many of these blocks each sequence has computed or is still going to."""
        return {
            s: sum(
                1
                for mine, theirs in zip(wanted, self.identities(s.root, s.prompt), strict=False)
                if mine == theirs
            )
            for s in self.sequences
            if len(s.tokens) < len(s.prompt)
        }

    def computing(self, prompt: Sequence[Hashable], salt: Hashable) -> list[NaiveSequence]:
        """Return which sequences are going to compute the block that a prompt misses first, and as many as any."""
        wanted = self.identities(("root", salt), prompt) if self.reuse else []
        ahead = self.ahead(wanted)
        most = max(ahead.values(), default=0)
        return [s for s, blocks in ahead.items() if blocks == most > self.cached_length(wanted)]

    def find_part(
        self, prompt: Sequence[Hashable], salt: Hashable, hits: int, unit: int
    ) -> tuple[int, list[Identity]]:
        """Return how many tokens beyond the hits some cached block agrees with, in whole units, and which do."""
        if not self.partial or (self.partial == "copy" and self.blocks_at_once(prompt) >= self.num_blocks):
            return 0, []
        parent = self.identities(("root", salt), prompt[: hits * self.size])[-1] if hits else ("root", salt)
        rest = prompt[hits * self.size :]
        found: dict[Identity, int] = {}
        for one in self.cached:
            stealable = one in self.idle and self.is_leaf(one)
            if one[0] == parent and one not in self.fresh and (stealable or self.partial == "copy"):
                common = 0
                for mine, theirs in zip(rest, one[1], strict=False):
                    if mine != theirs:
                        break
                    common += 1
                found[one] = common // unit * unit
        most = max(found.values(), default=0)
        tokens = min(most, (len(rest) - 1) // unit * unit)
        return tokens, [one for one in found if found[one] == most and tokens]

    def blocks_at_once(self, prompt: Sequence[Hashable]) -> int:
        """Return how many blocks a prompt needs at once, at the least, to be computed."""
        return -(-len(prompt) // self.size)

    @staticmethod
    def salt_of(one: Identity) -> Hashable:
        while one[0] != "root":
            one = one[0]
        return one[1]

    # ------------------------------------------------ sequences

    def pass_time(self, now: int) -> None:
        """Let it be `now`: nothing depends on it here."""

    def admit(
        self,
        prompt: Sequence[Hashable],
        salt: Hashable,
        num_tokens: int,
        retention: object = None,
        part: Identity | None = None,
        part_tokens: int = 0,
    ) -> NaiveSequence:
        """Start a sequence; the first `part_tokens` tokens beyond its hits come from the block of `part`."""
        hits, _ = self.lookup(prompt, salt)
        length = hits * self.size + part_tokens + num_tokens
        found = self.identities(("root", salt), prompt)[:hits]
        grow = -(-length // self.size) - hits
        kept = part is not None and part in self.idle and not self.is_leaf(part)
        if grow + sum(one in self.idle for one in found) + kept > self.available:
            raise Refused
        self.roots += 1
        root = ("root", salt) if self.reuse else ("root", self.roots)
        sequence = NaiveSequence(root, salt, list(prompt))
        for one in found:
            self.hit(one)
            sequence.table.append(self.cached[one].block)
            sequence.path.append(one)
        if part is not None:
            sequence.table.append(self.part_of(part, part_tokens, sequence.path))
        self.grow(sequence, -(-length // self.size) - len(sequence.table))
        sequence.tokens = list(prompt[:length])
        self.index(sequence)
        self.sequences.append(sequence)
        return sequence

    def part_of(self, one: Identity, valid: int, path: list[Identity]) -> int:
        """Return a block of the sequence's own with the first tokens of a cached one."""
        if one in self.idle and self.is_leaf(one):
            self.hold(one)
            block = self.uncache(one)
            self.holders[block] = 1
            return block
        held = self.with_path([*path, one])
        for each in held:
            self.hold(each)
        return self.copy(self.cached[one].block, valid, held)

    def grow(self, sequence: NaiveSequence, count: int, early: list[int] | None = None) -> None:
        for _ in range(count):
            block = early.pop(0) if early else self.take()
            self.holders[block] = 1
            sequence.table.append(block)

    def index(self, sequence: NaiveSequence, forking: bool = False) -> None:
        """Cache the full blocks; where the content is cached already, hold that and keep the own block.

        Without reuse, it is only for what a fork is about to share.
        """
        if not (self.reuse or forking):
            return
        for one in self.identities(sequence.root, sequence.tokens)[len(sequence.path) :]:
            position = len(sequence.path)
            if one in self.cached:
                self.hold(one)
                sequence.own.add(position)
            else:
                self.cached[one] = Cached(sequence.table[position], 1, self.cached_so_far)
                self.cached_so_far += 1
                self.fresh.add(one)
                self.ghosts.pop(one, None)
                del self.holders[sequence.table[position]]
            sequence.path.append(one)

    def tail_is_cached(self, sequence: NaiveSequence) -> bool:
        last = len(sequence.table) - 1
        return len(sequence.path) > last and last not in sequence.own

    def can_take_back(self, one: Identity) -> bool:
        return self.cached[one].references == 1 and self.is_leaf(one)

    def copies_needed(self, writers: Sequence[NaiveSequence]) -> int:
        needed, left = 0, dict(self.holders)
        for sequence in writers:
            if len(sequence.tokens) % self.size == 0:
                continue
            tail = sequence.table[-1]
            if self.tail_is_cached(sequence):
                needed += not self.can_take_back(sequence.path[-1])
            elif left[tail] > 1:
                needed += 1
                left[tail] -= 1
        return needed

    def own_tail(self, sequence: NaiveSequence) -> None:
        """Make the block that is written next the sequence's alone."""
        valid, tail = len(sequence.tokens) % self.size, sequence.table[-1]
        if not valid:
            return
        if self.tail_is_cached(sequence):
            one = sequence.path[-1]
            if self.can_take_back(one):
                self.uncache(one)
                sequence.path.pop()
                self.holders[tail] = 1
                return
            held = list(sequence.path)
            for each in held:
                self.hold(each)
            sequence.table[-1] = self.copy(tail, valid, held)
            self.drop(sequence.path.pop())
        elif self.holders[tail] > 1:
            sequence.table[-1] = self.copy(tail, valid, [])
            self.holders[tail] -= 1

    def copy(self, source: int, valid: int, held: list[Identity]) -> int:
        destination = self.take()
        self.holders[destination] = 1
        self.pins[destination] += 1
        if not held:
            self.pins[source] += 1
        self.copies.append((source, destination, valid, held))
        return destination

    def take_copies(self) -> list[tuple[int, int, int]]:
        copies, self.copies = self.copies, []
        self.fresh.clear()
        for source, destination, _, held in copies:
            for block in [destination] + [source] * (not held):
                self.pins[block] -= 1
                if not self.pins[block] and block in self.limbo:
                    self.limbo.remove(block)
                    self.free.append(block)
            for one in reversed(held):
                self.drop(one)
        return [(source, destination, valid) for source, destination, valid, _ in copies]

    def growth(self, sequence: NaiveSequence, count: int) -> int:
        return -(-(len(sequence.tokens) + count) // self.size) - len(sequence.table)

    def write(self, sequences: Sequence[NaiveSequence], rows: Sequence[Sequence[Hashable]]) -> None:
        """Let sequences go on one after the other, each by its row of tokens."""
        growth = [self.growth(s, len(row)) for s, row in zip(sequences, rows, strict=True)]
        if sum(growth) + self.copies_needed(sequences) > self.available:
            raise Refused
        for sequence in sequences:
            self.own_tail(sequence)
        for sequence, row, count in zip(sequences, rows, growth, strict=True):
            self.grow(sequence, count)
            sequence.tokens += row
        for sequence in sequences:
            self.index(sequence)

    def write_batch(self, rows: dict[int, Sequence[Hashable]], count: int) -> None:
        """Let the members of the batch go on in lockstep; `rows` by id of the sequence."""
        growth = sum(self.growth(s, count) for s in self.batch)
        if growth + self.copies_needed(list(self.unready.values())) > self.available:
            raise Refused
        for sequence in self.unready.values():
            self.own_tail(sequence)
        self.unready.clear()
        # Where blocks are scarce, all are taken first: a block that fills can hold on to an evictable one.
        fills = sum((len(s.tokens) + count) // self.size - len(s.tokens) // self.size for s in self.batch)
        scarce = growth + min(fills, len(self.idle)) > self.available
        early = [self.take() for _ in range(growth)] if count > 1 and scarce else []
        for tick in range(count):
            for sequence in self.batch:
                if self.growth(sequence, 1):
                    self.grow(sequence, 1, early)
            for sequence in self.batch:
                sequence.tokens.append(rows[id(sequence)][tick])
                self.index(sequence)

    def join(self, sequence: NaiveSequence) -> None:
        self.batch.append(sequence)
        sequence.in_batch = True
        if len(sequence.tokens) % self.size:
            self.unready[id(sequence)] = sequence

    def leave(self, sequence: NaiveSequence) -> None:
        self.batch.remove(sequence)
        sequence.in_batch = False
        self.unready.pop(id(sequence), None)

    def own_positions(self, sequence: NaiveSequence, first: int) -> list[int]:
        beyond = range(max(len(sequence.path), first), len(sequence.table))
        return [p for p in sorted(sequence.own) if p >= first] + list(beyond)

    def fork(self, sequence: NaiveSequence) -> NaiveSequence:
        self.index(sequence, forking=True)
        for one in sequence.path:
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

    def reorder(self, beams: Sequence[NaiveSequence], parents: Sequence[int]) -> None:
        heirs = {i: self.fork(beams[p]) for i, p in enumerate(parents) if p != i}
        for i, heir in heirs.items():
            for name in ("prompt", "tokens", "table", "path", "own", "root", "wish"):
                mine, theirs = getattr(beams[i], name), getattr(heir, name)
                setattr(beams[i], name, theirs)
                setattr(heir, name, mine)
            self.release(heir)
        for beam in beams:
            if beam.in_batch:
                self.unready.setdefault(id(beam), beam)

    def free_own(self, sequence: NaiveSequence, first: int) -> None:
        for position in reversed(self.own_positions(sequence, first)):
            block = sequence.table[position]
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                self.give(block)
            sequence.own.discard(position)

    def shorten_path(self, sequence: NaiveSequence, length: int) -> None:
        while len(sequence.path) > length:
            self.drop(sequence.path.pop())

    def truncate(self, sequence: NaiveSequence, length: int) -> None:
        keep = -(-length // self.size)
        self.free_own(sequence, keep)
        if length % self.size and keep - 1 in sequence.own:
            sequence.own.discard(keep - 1)
            self.shorten_path(sequence, keep - 1)
        self.shorten_path(sequence, keep)
        del sequence.table[keep:], sequence.tokens[length:], sequence.prompt[length:]

    def release(self, sequence: NaiveSequence) -> None:
        if sequence.in_batch:
            self.leave(sequence)
        self.free_own(sequence, 0)
        self.shorten_path(sequence, 0)
        self.sequences.remove(sequence)
