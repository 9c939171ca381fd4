"""Oracle: drives a KV cache manager beside a shadow of its pool, and says when the two disagree.

It is what the state machines of `allocator.fuzz` share, and knows nothing of Hypothesis. It sees which slots the
manager returns, what its copy list says and what its tables name; it does not know how the manager decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from allocator.config import CacheConfig
from allocator.content import TokenContent
from allocator.eviction import POLICIES, EvictionPolicy, make_policy
from allocator.manager import KVCacheManager, OutOfBlocks, PrefixMatch, QuotaExceeded
from allocator.oracle_partial import PartExpected, expected_part
from allocator.oracle_recount import Recount
from allocator.oracle_tiers import HostOracle
from allocator.oracle_windows import Attended
from allocator.retention import RetentionConfig
from allocator.sequence import KVSequence
from allocator.shadow import Prompt, ShadowKV, State, Story

MAX_LIVE = 7
"""Sequences that run at once: more than a tiny pool feeds."""


@dataclass
class Tally:
    """What a run did: how often each operation happened, and what the manager had to do for it."""

    steps: int = 0
    programs: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    """Kinds of what operations led to."""
    evictions: int = 0
    copies: int = 0
    refusals: int = 0
    hit_blocks: int = 0
    transfers: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rows = [("steps", self.steps), ("programs", self.programs), ("evictions", self.evictions)]
        rows += [("copies", self.copies), ("refusals", self.refusals), ("hit blocks", self.hit_blocks)]
        rows += [("transfers", self.transfers)]
        rows += sorted(self.outcomes.items())
        rows += [(f"  {name}", count) for name, count in sorted(self.operations.items())]
        lines = [f"{name:<24}{count:>10,}" for name, count in rows]
        return "\n".join([*lines, f"{'seconds':<24}{self.seconds:>10.1f}"])


def _named(bits: int | None, count: int) -> list[int] | None:
    return None if bits is None else [bits >> i % 4 & 1 for i in range(count)]


class Oracle(Recount):
    """The manager under test, what its sequences say, and the shadow.

    `begin` makes all of it; every operation goes to the manager and into the shadow. A subclass for another
    policy sets `policies`; one for another manager replaces the first three methods.
    """

    policies: ClassVar[Sequence[str | type[EvictionPolicy]]] = tuple(sorted(POLICIES))
    partials: ClassVar[Sequence[str]] = ("",)
    """Ways of partial reuse to draw from: "" for none, "copy", or "steal" (copy_on_partial_reuse off)."""
    tally: ClassVar[Tally] = Tally()
    logging: ClassVar[Sequence[bool]] = (False,)
    """Whether the manager keeps its event log, in as many programs as there are items here."""
    serves_host: ClassVar[bool] = False
    """Whether the manager may get host blocks; a machine with the rules for them says so."""

    # ------------------------------------------------ what a subclass may replace

    def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> Any:
        """Return the manager under test."""
        return KVCacheManager(
            num_blocks,
            tokens_per_block,
            self.cache_config(reuse),
            policy=self.make_policy(),
            ghost_blocks=self.ghosts,
            events=self.keeps_log,
            num_host_blocks=self.host_blocks,
            lifetimes=num_blocks % 2 == 1,
        )

    def make_policy(self) -> EvictionPolicy:
        """Return the policy of the manager under test."""
        return make_policy(self.policy) if isinstance(self.policy, str) else self.policy()

    def cached_blocks(self) -> set[int]:
        """Return the blocks that a lookup could find, or that full blocks of running sequences are known by."""
        return {block for extent in self.manager.index.extents() for block in extent.ids}

    def snapshot(self) -> object:
        """Return all that a refused call must leave as it was."""
        manager = self.manager
        return (
            manager.stats(),
            manager.pool.free_ids().tolist(),
            list(manager.pool.limbo),
            dict(manager.pool.shared),
            len(manager.tables.copies),
            len(manager.events or ()),
            [
                (s, s.num_tokens, s.table[:], s.left, s.anchored, set(s.twins), s.history, s.batch is None)
                for s in manager.sequences
            ],
            [(bytes(e.keys), e.ids[:], e.start, e.references) for e in manager.index.extents()],
            self.host.snapshot(),
        )

    # ------------------------------------------------ state

    def cache_config(self, reuse: bool) -> CacheConfig:
        """Return the configuration of the manager under test, but for its policy."""
        return CacheConfig(
            enable_block_reuse=reuse,
            enable_partial_reuse=reuse and bool(self.partial),
            copy_on_partial_reuse=self.partial != "steal",
            window=self.window,
            num_sinks=self.num_sinks,
        )

    def begin(
        self,
        num_blocks: int,
        tokens_per_block: int,
        reuse: bool,
        policy: int,
        ghosts: int | None,
        log: int = 0,
        host_blocks: int = 0,
        partial: int = 0,
        window: int | None = None,
        num_sinks: int = 0,
    ) -> None:
        """Make the manager and an empty shadow; None is the default of ghosts.

        `policy` picks one of `policies`, `log` one of `logging`, and `partial` one of `partials`.
        """
        self.window = window
        self.num_sinks = num_sinks if window is not None else 0
        self.attended = Attended(self.window, self.num_sinks, tokens_per_block)
        self.partial = self.partials[partial % len(self.partials)]
        self.host_blocks = host_blocks if self.serves_host else 0
        self.keeps_log = self.logging[log % len(self.logging)]
        self.policy = self.policies[policy % len(self.policies)]
        self.ghosts = ghosts
        self.num_blocks = num_blocks
        self.manager = self.make_manager(num_blocks, tokens_per_block, reuse)
        self.size = tokens_per_block
        self.reuse = reuse
        self.shadow = ShadowKV(tokens_per_block)
        host = getattr(self.manager.stats(), "host", None)
        self.host = HostOracle(self, host.num_blocks if host is not None else 0)
        self.stories: dict[KVSequence, Story] = {}
        self.prompts: list[Prompt] = []  # to be admitted again
        self.known: dict[int, Prompt] = {}  # all of them, by the id of the content
        self.waiting: list[tuple[Prompt, Hashable]] = []  # preempted
        self.matches: list[tuple[Prompt, Hashable, PrefixMatch]] = []
        self.batch = self.manager.batch()
        self.writes: list[tuple[KVSequence, list[int], list[State]]] = []  # of the step being scheduled
        self.hold = 0  # rules for which the step stays open
        self.copies = self.copied_tokens = 0
        self.queried_tokens = self.queried_blocks = self.hit_tokens = self.hit_blocks = 0
        self.refusals = 0

    def did(self, operation: str) -> None:
        """Count an operation."""
        self.tally.operations[operation] += 1

    def learn(self, prompt: Prompt) -> Prompt:
        """Remember a prompt, so that it can be admitted again."""
        self.prompts = [*self.prompts[-7:], prompt]
        self.known[id(prompt.content)] = prompt
        return prompt

    def live(self, index: int, allow: Callable[[KVSequence], bool] = lambda _: True) -> KVSequence | None:
        """Return one of the running sequences that `allow` admits, or None."""
        found = [sequence for sequence in self.stories if allow(sequence)]
        return found[index % len(found)] if found else None

    def complete(self, sequence: KVSequence) -> bool:
        """Return whether a sequence's prompt is complete."""
        story = self.stories[sequence]
        return story.length >= story.prompt

    def alone(self, sequence: KVSequence) -> bool:
        """Return whether a sequence decodes by itself: prompt complete, in no batch."""
        return self.complete(sequence) and sequence not in self.batch

    # ------------------------------------------------ oracles

    def flush(self) -> bool:
        """Run the step being scheduled: transfers, copies, then writes; return whether there were any but writes."""
        moved = self.host.run()
        copies = self.manager.pending_copies().tolist()
        sources, destinations = {c[0] for c in copies}, [c[1] for c in copies]
        assert len(set(destinations)) == len(destinations), f"{copies} writes a block twice"
        assert not sources & set(destinations), f"{copies} reads what it writes"
        self.copies += len(copies)
        self.copied_tokens += sum(valid for _, _, valid in copies)
        if sources:
            self.note_copied(sources)
        self.shadow.copy(copies)
        for _, slots, states in self.writes:
            self.shadow.write(slots, states)
            self.host.wrote(slots)
        self.writes.clear()
        return moved or bool(copies)

    def refusing(
        self, least: int, most: int, call: Callable[[], Any], available_now: Callable[[], int] | None = None
    ) -> Any:
        """Call, expecting OutOfBlocks exactly if more is needed than there is; None if it was refused.

        The number needed lies between `least` and `most`. What there is, `available_now` recounts; the default
        is the GPU's blocks.
        """
        exact = (
            self.settled and not self.host.in_flight
        )  # else the shadow does not know what is cached or held
        available = 0
        if exact:
            available = sum(self.available()) if available_now is None else available_now()
        before = self.snapshot()
        refused = None
        try:
            result = call()
        except OutOfBlocks as error:
            refused = error
        if refused is None:
            assert not exact or least <= available, f"{least} blocks out of {available}"
            return result
        self.refusals += 1
        assert self.snapshot() == before, "a refused call changed something"
        if isinstance(refused, QuotaExceeded):
            self.check_quota_refusal(refused)
            return None
        assert refused.needed > refused.available
        if exact:
            assert refused.available == available
            assert least <= refused.needed <= most, f"{refused.needed} needed, not {least} to {most}"
        return None

    def tenant(self, salt: Hashable) -> Hashable:
        """Return the tenant that a sequence with this salt belongs to."""
        return None

    def check_quota_refusal(self, refused: QuotaExceeded) -> None:
        """Check a refusal for a tenant's quota."""
        raise AssertionError(f"there are no quotas: {refused}")

    def check_all(self) -> None:
        """Check everything that holds after every operation; run the step unless it is to stay open."""
        self.manager.check_invariants()
        between_steps = not self.hold
        if not between_steps:
            self.hold -= 1
        elif self.flush():
            self.manager.check_invariants()
        look = self.look()
        if between_steps:
            self.check_reads(look)
        self.check_counters(look)

    def drain(self) -> None:
        """Release all, and see that nothing is left; add to the tally."""
        self.flush()
        self.host.drain()
        stats = self.manager.stats()
        tally = self.tally
        tally.programs += 1
        tally.evictions += stats.evicted_blocks
        tally.copies += stats.cow_copies + stats.partial_copies
        tally.hit_blocks += stats.hit_blocks
        tally.refusals += self.refusals
        tally.transfers += self.host.moved_out + self.host.moved_in
        for sequence in list(self.stories):
            self.manager.release(sequence)
        self.manager.check_invariants()
        stats = self.manager.stats()
        assert stats.free_blocks + stats.evictable_blocks == self.num_blocks, "blocks leaked"
        self.host.check_drained()
        assert stats.logical_blocks == stats.logical_tokens == stats.kv_tokens == 0
        lifetimes = getattr(getattr(self.manager, "pool", None), "lifetimes", None)
        if lifetimes is not None:
            gone = {name: int(weights.sum()) for name, (_, weights) in lifetimes.take().items()}
            assert gone["lifetime"] == gone["idle_before_evict"] == stats.evicted_blocks + stats.stolen_blocks

    # ------------------------------------------------ the life of a sequence

    def admit_prompt(
        self,
        prompt: Prompt,
        salt: Hashable,
        chunk: int,
        match: PrefixMatch | None = None,
        readmission: bool = False,
        retention: RetentionConfig | None = None,
    ) -> bool:
        """Admit a prompt with `chunk` tokens (or what is left) beyond its hits; return whether it ran."""
        if len(self.stories) >= MAX_LIVE:
            return False
        found = self.manager.lookup(prompt.content, salt)
        self.check_match(prompt, salt, found)
        if match is not None and self.manager.is_current(match):
            assert match.hit_blocks == found.hit_blocks
            assert match.miss_blocks == found.miss_blocks
            assert match.partial == found.partial
        chunk = min(chunk, prompt.num_tokens - found.hit_tokens)
        if match is not None:
            self.compare_matches(match, found, chunk)
        needed = -(-(found.hit_tokens + chunk) // self.size) - found.hit_blocks
        part = None
        if self.settled:  # hits that nobody holds are no longer available, and those on the host take blocks
            tables = {block for sequence in self.stories for block in self.table(sequence)}
            held = self.held_states()
            hits = self.longest_hit(prompt, salt)[1]
            needed += sum(b is None or (b not in tables and self.shadow.block(b) not in held) for b in hits)
            part = expected_part(self, prompt, salt, found.hit_blocks)
            if self.knows_parts:
                assert part.idle if found.copied_blocks else part.free or part.held or not part.num_tokens
        else:
            needed += found.evictable_blocks + (found.host_blocks if self.host.num_blocks else 0)
        needed += found.copied_blocks
        before = self.manager.stats() if found.partial_tokens else None
        tenant = self.tenant(salt)
        fits = self.manager.can_admit(found, chunk, tenant)
        options = {} if retention is None else {"retention": retention}
        sequence = self.refusing(
            needed,
            needed,
            lambda: self.manager.admit(
                prompt.content, chunk, match, salt, readmission=readmission, tenant=tenant, **options
            ),
        )
        assert (sequence is not None) == fits, "can_admit does not tell what admit does"
        if sequence is None:
            return False
        assert sequence.hit_tokens == found.hit_tokens
        if before is not None:
            after = self.manager.stats()
            was_stolen = after.stolen_blocks > before.stolen_blocks
            if part is not None and after.evicted_blocks > before.evicted_blocks:
                part = part.after_evictions()  # to make room for what came from the host
            whole = found.hit_blocks * self.size
            behind = len(self.attended.blocks(whole, whole))
            self.check_part(part, self.table(sequence)[behind], was_stolen)
        if not readmission:
            self.queried_tokens += prompt.num_tokens
            self.queried_blocks += found.query_blocks
            self.hit_tokens += found.hit_tokens
            self.hit_blocks += found.hit_blocks
        story = Story(self.shadow, salt, list(prompt.tokens), prompt.num_tokens)
        story.nameable = isinstance(prompt.content, TokenContent)
        self.stories[sequence] = story
        story.say(found.hit_tokens)
        self.note(sequence, self.manager.prefill_slots(sequence).tolist(), story.say(chunk))
        if (
            self.window is not None and found.partial_tokens
        ):  # it holds what a query right behind the whole hits needs
            story.step = found.hit_blocks * self.size
        return True

    def check_part(self, part: PartExpected | None, block: int, was_stolen: bool) -> None:
        """See that a partial hit took over a block that was free to take, or else went to a copy."""
        self.tally.outcomes["parts stolen" if was_stolen else "parts copied"] += 1
        if part is not None and self.knows_parts:
            assert block in part.free if was_stolen else part.idle or part.held, f"{block} of {part}"

    def note(self, sequence: KVSequence, slots: list[int], states: list[State]) -> None:
        """Remember what a step is going to write where."""
        assert len(slots) == len(states)
        assert all(0 <= slot < self.num_blocks * self.size for slot in slots)
        self.writes.append((sequence, slots, states))

    def note_copied(self, sources: set[int]) -> None:
        """Note the blocks that the copies of a step, about to be executed, have held until now."""

    def end_step_of(self, sequence: KVSequence) -> None:
        """Let the step run first if `sequence` takes part in it: what is scheduled cannot be taken back."""
        if any(sequence is writer for writer, _, _ in self.writes):
            self.flush()

    def prefill(self, sequence: KVSequence, count: int) -> bool:
        """Prefill up to `count` more tokens of a prompt; return whether there was room."""
        story = self.stories[sequence]
        count = min(count, story.prompt - story.length)
        self.settle([sequence])
        growth = self.growth([sequence], count)
        least, most = self.copies_due([sequence])
        slots = self.refusing(growth + least, growth + most, lambda: self.manager.extend(sequence, count))
        if slots is None:
            return False
        self.note(sequence, slots.tolist(), story.say(count))
        return True

    def append_to(self, sequences: Sequence[KVSequence], count: int, bits: int | None, wait: int) -> bool:
        """Append to some sequences, or to the batch; return whether they advanced.

        The step stays open for `wait` more rules: its copies and writes are only then executed.
        """
        self.settle(sequences)
        if not self.hold:
            self.hold = wait
        if not all(self.stories[sequence].nameable for sequence in sequences):
            bits = None
        named = _named(bits, count)
        tokens = None if named is None else [named] * len(sequences)
        growth = self.growth(sequences, count)
        least, most = self.copies_due(sequences)
        slots = self.refusing(
            growth + least, growth + most, lambda: self.manager.append(sequences, tokens, count)
        )
        if slots is None:
            return False
        rows = np.reshape(slots, (len(sequences), count)).tolist()
        for sequence, row in zip(sequences, rows, strict=True):
            self.note(sequence, row, self.stories[sequence].say(count, named))
        return True

    def append_unwatched(self, sequences: Sequence[KVSequence], count: int, bits: int | None) -> None:
        """Append to some sequences, or to the batch, as long as there is room up to `count` tokens, one a step.

        Nobody looks at the manager in between, as `refusing` does: what it puts off till then, it puts off.
        """
        self.settle(sequences)
        self.flush()
        if not all(self.stories[sequence].nameable for sequence in sequences):
            bits = None
        for step in range(count):
            named = None if bits is None else [bits >> step % 4 & 1]
            try:
                slots = self.manager.append(sequences, named and named * len(sequences))
            except OutOfBlocks:
                break
            for sequence, slot in zip(sequences, slots.tolist(), strict=True):
                self.note(sequence, [slot], self.stories[sequence].say(1, named))
            self.appended()
            self.flush()

    def appended(self) -> None:
        """Note what a step of `append_unwatched` says of blocks."""
