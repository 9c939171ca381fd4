"""ManagerState: what the parts of the manager have in common."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from allocator.checks import as_int, require_power_of_two
from allocator.config import CacheConfig
from allocator.event_log import CREATED, HOST, NOBODY, WINDOW, EventLog
from allocator.eviction import EvictionPolicy, make_policy
from allocator.partial import PartialReuse
from allocator.pool import BlockPool
from allocator.prefilling import Prefilling
from allocator.prefix import PrefixIndex
from allocator.quotas import Quotas
from allocator.sequence import KVSequence
from allocator.stats import Lookups
from allocator.tables import Tables
from allocator.tiers import HostTier
from allocator.windowed_index import WindowedIndex
from allocator.windowed_tables import WindowedTables
from allocator.windowed_tiers import WindowedHostTier
from allocator.windows import AttentionWindow


class ManagerState:
    """Pool, index, tables and running sequences; see KVCacheManager for the arguments."""

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        config: CacheConfig | None = None,
        *,
        policy: EvictionPolicy | None = None,
        ghost_blocks: int | None = None,
        lifetimes: bool = False,
        quotas: Mapping[Hashable, int] | None = None,
        events: bool = False,
        num_host_blocks: int | None = None,
    ) -> None:
        config = config or CacheConfig()
        num_blocks = as_int("num_blocks", num_blocks, 1)
        tokens_per_block = as_int("tokens_per_block", tokens_per_block, 1)
        require_power_of_two("tokens_per_block", tokens_per_block)
        if not isinstance(config, CacheConfig):
            raise ValueError(f"config ({config!r}) must be a CacheConfig")
        if not isinstance(policy, EvictionPolicy | None) or (policy is not None and policy.in_use):
            raise ValueError(f"policy ({policy!r}) must be an EvictionPolicy, made and not yet in use")
        if ghost_blocks is None:
            ghost_blocks = 16 * num_blocks
        ghost_blocks = as_int("ghost_blocks", ghost_blocks, 0)
        self.tokens_per_block = tokens_per_block
        self.config = config
        self.reuse = config.enable_block_reuse
        self.window: AttentionWindow | None = None
        if config.window is not None:
            self.window = AttentionWindow(config.window, config.num_sinks, tokens_per_block)
        tree = PrefixIndex if self.window is None else WindowedIndex
        self.index = tree(ghost_blocks if self.reuse else 0)
        self.pool = BlockPool(
            num_blocks, policy or make_policy(config.policy), self.index, keep_cached=self.reuse
        )
        if num_host_blocks is None and config.host_cache_bytes:
            raise ValueError(
                f"host_cache_bytes ({config.host_cache_bytes}) needs num_host_blocks: a manager counts blocks"
            )
        num_host_blocks = as_int("num_host_blocks", num_host_blocks or 0, 0)
        if num_host_blocks:
            behind = HostTier if self.window is None else WindowedHostTier
            self.pool.tier = behind(self.pool, num_host_blocks, config.offload_min_priority)
        if config.enable_partial_reuse:
            self.pool.partial = PartialReuse(
                self.index, num_blocks, copy=config.copy_on_partial_reuse, has_host=num_host_blocks > 0
            )
            self.pool.drains = False  # candidates have to know at once what is gone
            if self.pool.tier is not None:
                self.pool.tier.host.partial = self.pool.partial
        if lifetimes:
            self.pool.collect_lifetimes()
        self.sequences: dict[KVSequence, None] = {}
        self.tables = Tables(self.pool, self.index, tokens_per_block)
        self.windowed: WindowedTables | None = None  # the same tables, where front blocks leave
        if self.window is not None and isinstance(self.index, WindowedIndex):
            self.tables = self.windowed = WindowedTables(self.pool, self.index, tokens_per_block, self.window)
        self.indexes_full = self.reuse or self.windowed is not None  # if not, a fork indexes what it shares
        self._lookups = Lookups()
        self._prefilling = Prefilling()
        self.quotas = Quotas(quotas) if quotas is not None else None
        self.logical_blocks = 0
        """Blocks of all tables, a shared one counted for each table."""
        self.logical_tokens = 0
        """Tokens of all sequences, those apart whose blocks have left."""
        self.events: EventLog | None = None
        if events:
            self._start_log()
        self._note_features()
        self._truncated = False  # a table may end in a cached block of which it uses only a part

    def _note_features(self) -> None:
        """Note what is switched on, so that what is called often has to look at one thing only."""
        pool = self.pool
        self.steps_count = (  # for more than the blocks that start and fill in them
            self.windowed is not None or self.quotas is not None or self.events is not None
        )
        self.steps_matter = (  # to somebody, so that many must not be taken as one
            self.steps_count or pool.notes_cached or pool.partial is not None
        )
        others = (self.windowed, self.quotas, pool.partial)
        self.only_logged = (  # it is the log alone to which they matter
            self.events is not None and not pool.notes_cached and all(other is None for other in others)
        )

    def _start_log(self) -> None:
        log = EventLog()
        log.add(CREATED, NOBODY, self.tokens_per_block, self.pool.num_blocks)
        self.events = self.pool.events = self.tables.events = self.tables.copies.events = log
        if self.windowed is not None:
            log.add(WINDOW, NOBODY, self.windowed.window.sink_blocks, self.windowed.window.reach + 1)
            self.windowed.index.numbers = {}
        if self.pool.tier is not None:
            log.add(HOST, value=self.pool.tier.host.num_blocks)
            self.pool.tier.log_to(log)
        self._note_features()

    def _pass_time(self, now: int) -> None:
        self.pool.pass_time(now)
        if self.events is not None:
            self.events.move(now)

    def _check_live(self, sequence: KVSequence) -> None:
        if not isinstance(sequence, KVSequence):
            raise ValueError(f"sequence ({sequence!r}) must be a KVSequence")
        if sequence not in self.sequences:
            state = "have been released already" if sequence.released else "be another manager's"
            if sequence.host is not None:
                state = "be swapped out"
            raise ValueError(f"{sequence} must not {state}")

    def _check_complete(self, sequence: KVSequence) -> None:
        self._check_live(sequence)
        if sequence in self._prefilling:
            raise ValueError(f"{sequence} must have its prompt of {sequence.num_prompt_tokens} complete")
