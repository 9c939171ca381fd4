"""Every eviction, beside a reference that knows single blocks only."""

from __future__ import annotations

from typing import Any

from allocator.eviction import POLICIES, EvictionPolicy
from allocator.rules.base import ManagerMachine
from allocator.rules.references import REFERENCES
from allocator.rules.witness import Witness


class PolicyRules(ManagerMachine):
    """No rules, but a witness to each policy: it keeps the contract, and evicts what its reference evicts.

    A policy without a reference is held to the contract.
    """

    def make_policy(self) -> EvictionPolicy:
        """Return the policy behind its witness."""
        policy = super().make_policy()
        names = {each: name for name, each in POLICIES.items()}
        name = self.policy if isinstance(self.policy, str) else names.get(self.policy, "")
        reference = REFERENCES.get(name)
        model = reference(self.num_blocks) if reference is not None else None
        return Witness(policy, model, windowed=self.window is not None)

    def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> Any:
        """Return a manager whose policy's witness knows the time."""
        manager = super().make_manager(num_blocks, tokens_per_block, reuse)
        manager.pool.policy.pool = manager.pool
        return manager
