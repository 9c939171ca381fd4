"""Steps that are alike: how many more can follow, so that the engine may take them as one."""

from __future__ import annotations

from allocator.config import BuildConfig
from allocator.manager import KVCacheManager
from sim.cost import StepCost
from sim.scheduler.config import EngineConfig
from sim.scheduler.plan import Plan
from sim.scheduler.preemption import Preemption


class StepsAlike(Preemption):
    """The part of the scheduler that foresees steps in which nothing happens but that everybody gets a token."""

    def __init__(
        self, manager: KVCacheManager, build: BuildConfig, config: EngineConfig, cost: StepCost | None
    ) -> None:
        super().__init__(manager, config, cost)
        self.max_batch_size = build.max_batch_size
        self._closed = False  # a static batch: one of its prompts is computed, and not all its jobs are done

    def idle_steps(self) -> int:
        """Return for how many steps there is nothing to do but decode, if that is plain to see; else 0.

        The answer is what `schedule` and `quiet_steps` would come to: blocks abound, nobody can start, nobody's
        prompt is unfinished, no member of the batch has to copy a block, and what it generates nobody else did.
        """
        if not self.decoding or self._named or self._prefilling or self._stalled:
            return 0
        if self.waiting and self._may_start():
            return 0
        if self.protection is not None and not self.protection.is_current():
            return 0
        manager, batch = self.manager, self.batch
        steps = self.end_tick - batch.tick
        if self._windowed is not None:
            steps = min(steps, manager.ticks_until_leave(batch))
        if self.window_keys is not None:
            even = self.window_keys.even_ticks(batch.tick)
            if even == 1:
                return 0  # the step after the next is not like it
            steps = min(steps, even)
        if self.beams.groups:
            steps = min(steps, self.beams.next_tick() - batch.tick)
        if not self._surely_enough(steps, self._untouched_blocks()):
            return 0
        return 0 if batch.unready and not manager.writes_in_place(batch) else steps

    def _surely_enough(self, steps: int, blocks: int) -> bool:
        """Return whether so many blocks are plainly enough for the whole batch to decode for so many steps."""
        # Nobody starts, or fills, more than a block every tokens_per_block steps; see _most_blocks.
        most = len(self.decoding) * -(-steps // self.manager.tokens_per_block)
        return 2 * most <= blocks or most + self._pool.num_evictable <= blocks

    def _may_start(self) -> bool:
        """Return whether a waiting job finds a place in the batch, so that it depends on blocks."""
        if self._closed:
            return False
        if self.waiting.order_follows_cache:  # which one is first can change
            return self.sequences < self.max_batch_size
        return self.sequences + self.waiting.first.samples <= self.max_batch_size

    def _untouched_blocks(self) -> int:
        """Return how many blocks steps may take and still be like the one before: evicting makes some move, and what
        is protected is given up at once.
        """
        pool = self._pool
        if pool.tier is not None:
            return pool.num_free
        blocks = pool.available
        return blocks if self.protection is None else blocks - self.protection.num_blocks

    def quiet_steps(self) -> int:
        """Return how many steps like the one just scheduled, which only decodes, can follow it: until somebody
        finishes, the pool runs out, or something is cached or evicted that lets the first waiting job start.
        """
        steps = self.end_tick - self.batch.tick
        blocks = self._untouched_blocks()
        if self._windowed is not None:  # what leaves a window makes room
            steps = min(steps, self.manager.ticks_until_leave(self.batch))
            if self._named and self.wishes is not None:
                # The time of a cached block begins anew where one is filled that repeats it: not within a stretch.
                steps = min(steps, self.batch.ticks_until_fill() - 1)
        if self.window_keys is not None:  # beyond, who has reached a window attends to no more keys
            steps = min(steps, self.window_keys.even_ticks(self.batch.tick))
        if self.beams.groups:
            steps = min(steps, self.beams.next_tick() - self.batch.tick)
        if self.protection is not None:
            if not self.protection.is_settled():
                return 0
            if self._named and self.protection:  # what a step fills is protected from the next one on
                steps = min(steps, 0 if self.batch.starting() else self.batch.ticks_until_fill())
        if self.waiting and self._may_start():
            if self.manager.config.enable_partial_reuse:
                return 0  # what a step fills can be hit in part in the next
            match = self.waiting.first.match
            eviction_tells = (
                self.waiting.order_follows_cache
                or self._windowed is not None  # the next shorter hit may be on blocks that others hold
                or (match is not None and match.repeated_blocks)
            )
            let_go = self.beams.reordered == self.batch.tick - 1  # of blocks, by beams that ended
            if not self._config.mixed_steps and (self._named or eviction_tells or let_go):
                return 0  # what this very step has cached or evicted, only the next one's admission sees
            if self._named:
                # a block can be hit in the very step that fills it, so that step is not like this one
                steps = min(steps, self.batch.ticks_until_fill() - 1)
            if eviction_tells:
                # nor is one that evicts a block which the job would have held beside its own, or be first for
                blocks = self.manager.pool.num_free
        if steps <= 0 or (not self.batch.unready and self._surely_enough(steps, blocks)):
            return steps
        if self._most_blocks(steps) <= blocks:
            return steps
        enough, too_many = 0, steps
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if self._most_blocks(middle) <= blocks:
                enough = middle
            else:
                too_many = middle
        return enough

    def _most_blocks(self, steps: int) -> int:
        """Return by how many blocks `steps` more steps of decoding may lessen what is available.

        A block that repeats what is cached takes one for itself, and keeps the cached one from eviction. Within
        this bound the manager takes blocks in the order of the steps.
        """
        fills = min(self.batch.fills(steps), self.manager.pool.num_evictable)
        return self.manager.blocks_to_advance(self.batch, steps) + fills

    def accepts_arrivals(self) -> bool:
        """Return whether a job that arrives now could be admitted: none waits before it, and the batch has room."""
        if self.protection is not None and self.protection.takes_arrivals:
            return True  # if not admitted, then protected
        if self.sequences >= self.max_batch_size or self._closed:
            return False
        return not self.waiting or self.waiting.arrivals_may_lead

    def decode(self, steps: int = 1) -> None:
        """Give every decoding job its token, `steps` times over. There must be blocks for it."""
        batch = self.batch
        if self.decoding:
            self.context += steps * len(self.decoding)
            if self._named or (batch.unready and not self.manager.writes_in_place(batch)):
                self.manager.advance(batch, steps)
            else:
                self.manager.coast(batch, steps)
            if self.window_keys is not None:
                self.window_keys.advance(batch.tick, steps)

    def count_keys(self, plan: Plan) -> None:
        """Let a plan say what the sequences that decode attend to."""
        plan.context = self.context
        if self.window_keys is not None:
            plan.window_keys = tuple(self.window_keys.keys)

    def coast(self, steps: int) -> int:
        """Do what `decode` does, for steps that are idle; return how many blocks they take after the first."""
        self.context += steps * len(self.decoding)
        later = self.manager.coast(self.batch, steps)
        if self.window_keys is not None:
            self.window_keys.advance(self.batch.tick, steps)
        return later
