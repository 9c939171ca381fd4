"""Quotas: how many blocks the sequences of one tenant may have in their tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping

from allocator.checks import as_int
from allocator.pool import OutOfBlocks
from allocator.sequence import KVSequence


class QuotaExceeded(OutOfBlocks):
    """A tenant's sequences would hold more blocks than its quota. The call that raised it has changed nothing."""

    def __init__(self, tenant: Hashable, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.args = (tenant, needed, available)
        self.tenant = tenant

    def __str__(self) -> str:
        return f"tenant ({self.tenant!r}) needs {self.needed} blocks, its quota leaves {self.available}"


class Tenant:
    """A quota and what is used of it: table entries, so a shared block counts once for each table that holds it.

    Counted like that, what a tenant uses depends on nobody else, and is known without looking at any block.
    """

    __slots__ = ("blocks", "name", "quota")

    def __init__(self, name: Hashable, quota: int | None = None) -> None:
        self.name = name
        self.quota = quota
        self.blocks = 0

    def require(self, blocks: int) -> None:
        """Raise QuotaExceeded if `blocks` more are too many."""
        if self.quota is not None and blocks > 0 and self.blocks + blocks > self.quota:
            raise QuotaExceeded(self.name, blocks, max(self.quota - self.blocks, 0))


class Quotas:
    """The tenants of a manager. A quota made smaller than what is used takes nothing away; it only stops growth."""

    def __init__(self, quotas: Mapping[Hashable, int] | None = None) -> None:
        self._tenants: dict[Hashable, Tenant] = {}
        for name, blocks in (quotas or {}).items():
            self.set(name, blocks)

    def __getitem__(self, name: Hashable) -> Tenant:
        """Return a tenant, made without a quota on first use."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(name)
        return tenant

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._tenants.values())

    def set(self, name: Hashable, blocks: int | None) -> None:
        """Set a tenant's quota, None for none. Raises ValueError if it is negative."""
        self[name].quota = None if blocks is None else as_int("quota", blocks, 0)

    def require(self, demands: Iterable[tuple[KVSequence, int]]) -> None:
        """Raise QuotaExceeded if a tenant's sequences together demand more blocks than its quota leaves."""
        wanted: Counter[Tenant] = Counter()
        for sequence, blocks in demands:
            if sequence.tenant is not None and blocks:
                wanted[sequence.tenant] += blocks
        for tenant, blocks in wanted.items():
            tenant.require(blocks)
