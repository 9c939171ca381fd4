"""Blocks that are to be kept: priorities, and time that passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

from hypothesis import strategies as st

from allocator.eviction import Priority
from allocator.oracle import MAX_LIVE
from allocator.prefix import Extent
from allocator.retention import DEFAULT_PRIORITY, Retention, RetentionConfig, TokenRange
from allocator.rules.base import CHUNKS, INDEX, PROMPTS, SALTS, ManagerMachine, symbols_up_to
from allocator.rules.batch import BatchRules
from allocator.rules.operation import operation
from allocator.sequence import KVSequence
from allocator.shadow import Prompt, PromptSpec, State

WISHES = [
    Retention(priority, duration) for duration in (None, None, 1, 2, 5) for priority in (0, 20, 35, 50, 100)
]

CUTS: list[tuple[int, ...]] = [(), *combinations(range(17), 1)] * 8
CUTS += [*combinations(range(17), 2), *combinations(range(17), 3)][::3]


def make_retention(
    cuts: Sequence[int], wishes: Sequence[Retention | None], decode: Retention, *, is_open: bool
) -> RetentionConfig:
    """Return the wishes for the tokens between the cuts, and behind the last one if `is_open`."""
    starts = sorted(set(cuts))
    ends: list[int | None] = [*starts[1:], None]
    rows = zip(starts, ends, wishes, strict=False)
    ranges = [TokenRange(a, b, *wish) for a, b, wish in rows if wish is not None and (b or is_open)]
    return RetentionConfig(tuple(ranges), *decode)


RETENTIONS = st.builds(
    make_retention,
    cuts=st.sampled_from(CUTS),
    wishes=st.tuples(*[st.sampled_from([*[None] * 12, *WISHES])] * 3),
    decode=st.sampled_from(WISHES),
    is_open=st.booleans(),
)


def wish_of(retention: RetentionConfig, prompt: int, size: int) -> Callable[[int], Retention | None]:
    """Return what a request says of the block at a position, by the token that the block begins with."""

    def wish(position: int) -> Retention | None:
        token = position * size
        if token >= prompt:
            said = Retention(retention.decode_priority, retention.decode_duration)
            return None if said.priority == DEFAULT_PRIORITY else said
        for each in retention.ranges:
            if each.start <= token and (each.end is None or token < each.end):
                return Retention(each.priority, each.duration)
        return None

    return wish


class Keeping:
    """What was said last of each cached history, and when it is over: the oracle of retention.

    It sees what sequences say and which histories are cached or held between steps; not how a manager keeps it.
    Where two sequences fill equal blocks in one call and want different things, it does not know, and says so.
    """

    def __init__(self) -> None:
        self.now = 0
        self.said: dict[State, Retention] = {}  # nothing of those of default priority
        self.ends: dict[State, int] = {}
        self.unsure: set[State] = set()
        self._idle: set[State] = set()
        self._touched: set[State] = set()
        self._log: list[tuple[State, set[Retention] | None]] = []  # None where the history's block was lost

    def lose(self, states: Iterable[State]) -> None:
        """Note histories whose cached blocks were taken, be it for others or by their only holder to write in."""
        self._log += [(state, None) for state in states]

    def touch(self, states: Iterable[State]) -> None:
        """Note histories whose cached blocks were held, be it for a moment."""
        self._touched.update(states)

    def say(self, wishes: dict[State, set[Retention]]) -> None:
        """Note what the sequences of one call said of histories; an empty set where they said nothing."""
        self._log += wishes.items()

    @property
    def in_doubt(self) -> set[State]:
        """Return the histories of which nobody can tell what was said last, or not yet."""
        return self.unsure | {state for state, _ in self._log}

    def settle(self, cached: dict[State, int], held: set[State]) -> None:
        """Draw conclusions. Only between steps, and while nothing is in flight: what transfers hold has no end yet."""
        for state, wishes in self._log:
            if wishes is None:  # whatever is cached under it later is computed anew
                self._forget(state)
            elif wishes:
                self._forget(state)
                (wish, *others) = wishes
                if others:  # one of them may run out, and the other not: nothing is known until more is said
                    self.unsure.add(state)
                elif wish.priority != DEFAULT_PRIORITY:
                    self.said[state] = wish
        self._log.clear()
        for state in [*self.said, *self.unsure]:
            if state not in cached:
                self._forget(state)
        idle = cached.keys() - held
        for state in idle - (self._idle - self._touched):
            duration = self.said[state].duration if state in self.said else None
            if duration is not None:
                self.ends[state] = self.now + duration
        for state in [*self.ends]:
            if state not in idle:
                del self.ends[state]
        self._idle, self._touched = idle, set(held)

    def _forget(self, state: State) -> None:
        self.said.pop(state, None)
        self.ends.pop(state, None)
        self.unsure.discard(state)

    def pass_time(self, now: int) -> None:
        """Let it be `now`. Only when all is settled."""
        self.now = now
        for state, end in [*self.ends.items()]:
            if end <= now:
                self._forget(state)

    def priority(self, state: State) -> int:
        """Return the priority of a history's block right now."""
        return self.said[state].priority if state in self.said else DEFAULT_PRIORITY


class RetentionRules(ManagerMachine):
    """Requests that want their blocks kept, and time that passes.

    The policy named `priority` never takes a block dearer than another that it could take.
    """

    def begin(self, *arguments: Any) -> None:
        """Make the manager, and watch what its policy takes."""
        super().begin(*arguments)
        self.keeping = Keeping()
        self.cached_before: set[int] = set()
        watched = self.manager.pool.policy
        choose, note = watched.victim, watched.evicted
        chosen: dict[Any, list[State]] = {}

        def victim(wanted: int) -> Any:
            answer = choose(wanted)
            if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Extent)):
                return answer  # the pool says what is wrong with it
            extent, count = answer
            chosen[extent] = [self.shadow.block(block) for block in extent.ids]
            if self.policy in ("priority", Priority):
                self.check_victim(extent, chosen[extent][-count:])
            return extent, count

        def evicted(extent: Any, count: int) -> None:
            if extent in chosen:  # else its only holder is about to write into it: see `note`
                self.keeping.lose(chosen.pop(extent)[-count:])
            note(extent, count)

        watched.victim, watched.evicted = victim, evicted

    def retention_of_blocks(self) -> dict[int, Retention | None]:
        """Return what the manager remembers of each cached block; another manager's adapter replaces this."""
        return {block: e.retention for e in self.manager.index.extents() for block in e.ids}

    def check_victim(self, extent: Any, taken: list[State]) -> None:
        """Compare the blocks about to be taken with all others that could be."""
        priority, unsure = self.keeping.priority, self.keeping.in_doubt
        others = [
            self.shadow.block(other.ids[-1])
            for other in self.manager.index.extents()
            if other.ids and not other.references and other is not extent
            if not other.live_children or self.window is not None
        ]
        for mine in set(taken) - unsure:
            for other in set(others) - unsure:
                assert priority(mine) <= priority(other), (
                    f"a block of priority {priority(mine)} goes before one of {priority(other)}"
                )

    def refusing(self, *arguments: Any, **options: Any) -> Any:
        """Call as expected, and remember which blocks were cached before."""
        self.cached_before = self.cached_blocks()
        return super().refusing(*arguments, **options)

    def note(self, sequence: KVSequence, slots: list[int], states: list[State]) -> None:
        """Remember what a step is going to write where, and what was cached in a block that it goes on in.

        Such a block was taken back after a truncation, or stolen: it may be cached again at once, even with the
        same content, but nothing has been said of it then.
        """
        super().note(sequence, slots, states)
        block, offset = divmod(slots[0], self.size)
        if offset and block in self.cached_before:
            self.keeping.lose([self.shadow.block(block)])

    def admit_prompt(self, prompt: Prompt, *arguments: Any, **options: Any) -> bool:
        """Admit a prompt, and remember what it wants kept."""
        runs = super().admit_prompt(prompt, *arguments, **options)
        retention = options.get("retention")
        if runs and retention is not None:
            story = next(reversed(self.stories.values()))
            story.wish = wish_of(retention, prompt.num_tokens, self.size)
        self.take_notes()
        return runs

    def prefill(self, sequence: KVSequence, count: int) -> bool:
        """Prefill, and note what that says of blocks."""
        runs = super().prefill(sequence, count)
        self.take_notes()
        return runs

    def append_to(self, *arguments: Any) -> bool:
        """Append, and note what that says of blocks."""
        runs = super().append_to(*arguments)
        self.take_notes()
        return runs

    def append_unwatched(self, *arguments: Any) -> None:
        """Append, and note after each step what that says of blocks."""
        self.cached_before = self.cached_blocks()
        super().append_unwatched(*arguments)

    def appended(self) -> None:
        """Note what a step says of blocks."""
        self.take_notes()

    def take_notes(self) -> None:
        """Note what sequences have come to hold, or computed beside what is cached, by the last call."""
        said: dict[State, set[Retention]] = {}
        for sequence, story in self.stories.items():
            full = story.full_states()
            new = set(range(story.noted, len(full)))
            story.noted = len(full)
            if self.window is None:
                self.keeping.touch(full)
            elif new:
                # Of a hit it holds the window alone. Of a cached block beside its own it has something to say or not.
                held = self.held_blocks(sequence)
                new.intersection_update(held)
                cached = self.cached_blocks()
                new = {p for p in new if held[p] in cached or story.wish(p) is not None}
                self.keeping.touch(full[p] for p in new)
            for position in new:
                wish = story.wish(position)
                said.setdefault(full[position], set()).update([] if wish is None else [wish])
        self.keeping.say(said)

    def note_copied(self, sources: set[int]) -> None:
        """Note that the cached blocks among those copied from, and what they build on, were held for that."""
        super().note_copied(sources)
        states = [self.shadow.block(block) for block in sources & self.cached_blocks()]
        self.keeping.touch(states if self.window is not None else self.host.prefixes(states))

    def held_blocks(self, sequence: KVSequence) -> dict[int, int]:
        """Return the blocks of a sequence by their positions."""
        story = self.stories[sequence]
        return dict(zip(self.attended.blocks(story.step, story.length), self.table(sequence), strict=True))

    def came_back(self, sequence: KVSequence) -> None:
        """Note that a sequence that was swapped in says again how the cached blocks that it holds are to be kept."""
        story = self.stories[sequence]
        if self.window is None:
            story.noted = 0
            return
        full, cached = story.full_states(), self.cached_blocks()
        held = [p for p, block in self.held_blocks(sequence).items() if block in cached and p < len(full)]
        wishes = {full[p]: story.wish(p) for p in held}
        self.keeping.touch(wishes)
        self.keeping.say({state: set() if wish is None else {wish} for state, wish in wishes.items()})

    @property
    def time_can_pass(self) -> bool:
        """Return whether all is settled: no step is being scheduled, and no transfer in flight."""
        return self.settled and not self.host.in_flight

    def check_all(self) -> None:
        """Check everything, and what is to be kept besides."""
        self.take_notes()
        super().check_all()
        if self.time_can_pass:
            self.settle_retention()

    def settle_retention(self) -> None:
        """Compare what the manager remembers with what was said last. Only when all is settled."""
        cached = self.cached_states() if self.reuse else {}
        tables = {block for sequence in self.stories for block in self.table(sequence)}
        held = self.held_states()
        held.update(state for state, block in cached.items() if block in tables)
        keeping = self.keeping
        keeping.settle(cached, held)
        remembered = self.retention_of_blocks() if self.reuse else {}
        for state, block in cached.items():
            if state not in keeping.unsure:
                said = keeping.said.get(state)
                assert remembered[block] == said, f"block {block} is kept by {remembered[block]}, not {said}"
        if not keeping.unsure:
            assert self.manager.next_expiry() == min(keeping.ends.values(), default=None)

    @operation(prompt=PROMPTS, again=INDEX, salt=SALTS, chunk=CHUNKS, retention=RETENTIONS)
    def admit_retained(
        self, prompt: PromptSpec, again: int, salt: str, chunk: int, retention: RetentionConfig
    ) -> None:
        """Admit a prompt, new or seen before, whose blocks are to be kept."""
        old = self.prompts and again % 2
        made = self.prompts[again % len(self.prompts)] if old else self.learn(prompt.make(self.size))
        self.admit_prompt(made, salt, chunk, retention=retention)
        self.did("admit retained")

    @operation(
        when=lambda self: len(self.stories) <= MAX_LIVE - 2,
        symbols=symbols_up_to(5),
        wishes=st.tuples(RETENTIONS, st.none() | RETENTIONS),
        count=st.integers(0, 5),
    )
    def race(
        self, symbols: list[int], wishes: tuple[RetentionConfig, RetentionConfig | None], count: int
    ) -> None:
        """Let two requests with wishes of their own say the same at a time: the later one repeats the other.

        After `count` tokens beyond the prompt the first one ends, and the other goes on by as many.
        """
        prompt = self.learn(PromptSpec("runs", symbols).make(self.size))
        runners = []
        for wish in wishes:
            if not self.admit_prompt(prompt, "", 1, retention=wish):
                break
            runners.append(next(reversed(self.stories)))
        self.flush()
        for sequence in runners:
            if not self.complete(sequence):
                self.prefill(sequence, prompt.num_tokens)
                self.flush()
        if len(runners) == 2 and all(map(self.complete, runners)) and count and not self.hold:
            for _ in range(count):
                self.append_to(runners, 1, 0, 0)
                self.flush()
            first, second = runners
            self.manager.release(first)
            del self.stories[first]
            self.append_to([second], count, 0, 0)
        self.did("race")

    @operation(
        when=lambda self: (self.keeping.said or len(self.stories) == 1) and self.time_can_pass,
        by=st.integers(1, 3),
    )
    def pass_time(self, by: int) -> None:
        """Let time pass, between steps."""
        self.let_time_pass(by)
        self.did("pass time")

    def let_time_pass(self, by: int) -> None:
        """Let it be later. Only when all is settled."""
        self.manager.now += by
        self.keeping.pass_time(self.manager.now)


class RetainedBatchRules(RetentionRules, BatchRules):
    """Requests that want their blocks kept, from their first chunk on to what they decode in the batch."""

    @operation(
        when=lambda self: len(self.stories) < MAX_LIVE,
        symbols=symbols_up_to(4),
        cut=st.integers(0, 3),
        retention=RETENTIONS,
        chunk=CHUNKS,
        count=st.integers(1, 9),
    )
    def serve_retained(
        self, symbols: list[int], cut: int, retention: RetentionConfig, chunk: int, count: int
    ) -> None:
        """Admit a prompt whose blocks are to be kept, complete it chunk by chunk, and decode with the batch."""
        prompt = self.learn(PromptSpec("runs", symbols, cut).make(self.size))
        if not self.admit_prompt(prompt, "", chunk, retention=retention):
            return
        sequence = self.complete_newest(chunk)
        if sequence is None:
            return
        self.decode_on(sequence, count, None, True)
        self.did("serve retained")
