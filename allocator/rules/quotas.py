"""Tenants whose quotas bind, are changed, and are lifted."""

from __future__ import annotations

from collections.abc import Hashable

from hypothesis import strategies as st

from allocator.oracle_recount import Look
from allocator.quotas import QuotaExceeded
from allocator.rules.base import SALTS, ManagerMachine
from allocator.rules.operation import operation


class QuotaRules(ManagerMachine):
    """Each salt is a tenant; the shadow's tables say what it uses."""

    def begin(self, *arguments: object) -> None:
        super().begin(*arguments)  # type: ignore[arg-type]
        self.quotas: dict[Hashable, int | None] = {}
        self.used: dict[Hashable, int] = {}

    def tenant(self, salt: Hashable) -> Hashable:
        """Return the tenant that a sequence with this salt belongs to."""
        return salt

    def tenants(self) -> dict[Hashable, int]:
        """Return how many table entries each tenant has."""
        used: dict[Hashable, int] = {}
        for sequence, story in self.stories.items():
            used[story.salt] = used.get(story.salt, 0) + len(self.table(sequence))
        return used

    @operation(when=lambda self: self.stories, salt=SALTS, quota=st.none() | st.integers(0, 14))
    def set_quota(self, salt: str, quota: int | None) -> None:
        """Give a tenant a quota, perhaps below what it uses, or lift it."""
        self.manager.set_quota(salt, quota)
        self.quotas[salt] = quota
        self.did("set quota")

    def check_quota_refusal(self, refused: QuotaExceeded) -> None:
        """Check that a refusal tells the truth."""
        quota = self.quotas.get(refused.tenant)
        used = self.tenants().get(refused.tenant, 0)
        assert quota is not None, "refused for a quota that nobody set"
        assert refused.available == max(quota - used, 0)
        assert refused.needed > refused.available

    def check_counters(self, look: Look) -> None:
        """See that nobody grows beyond its quota, and that the manager counts as the tables do."""
        super().check_counters(look)
        used = self.tenants()
        for salt, quota in self.quotas.items():
            now = used.get(salt, 0)
            # Within a window, one beam can have let go of more blocks than another, whose table it then takes over.
            may_grow = self.reordered and self.window is not None
            assert quota is None or may_grow or now <= max(quota, self.used.get(salt, 0)), (
                f"{salt!r} is beyond its quota"
            )
        for salt in ("", "other"):
            assert self.manager.tenant_blocks(salt) == used.get(salt, 0)
        self.used, self.reordered = used, False
