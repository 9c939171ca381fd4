"""Eviction policies, one small file each, and how to name one."""

from __future__ import annotations

from importlib import import_module

from allocator.eviction.belady import Belady
from allocator.eviction.fifo import FIFO
from allocator.eviction.gdsf import GDSF
from allocator.eviction.lfu import LFU
from allocator.eviction.lru import LRU
from allocator.eviction.mru import MRU
from allocator.eviction.policy import EvictionPolicy
from allocator.eviction.priority import Priority
from allocator.eviction.s3fifo import S3FIFO
from allocator.eviction.sieve import SIEVE
from allocator.eviction.slru import SLRU
from allocator.eviction.weighted import WeightedBelady

POLICIES: dict[str, type[EvictionPolicy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "lfu": LFU,
    "slru": SLRU,
    "sieve": SIEVE,
    "s3fifo": S3FIFO,
    "gdsf": GDSF,
    "mru": MRU,
    "priority": Priority,
}
"""All that can be made from a name alone. Belady cannot: it has to be told the future."""

__all__ = [
    "FIFO",
    "GDSF",
    "LFU",
    "LRU",
    "MRU",
    "POLICIES",
    "S3FIFO",
    "SIEVE",
    "SLRU",
    "Belady",
    "EvictionPolicy",
    "Priority",
    "WeightedBelady",
    "make_policy",
]


def make_policy(name: str) -> EvictionPolicy:
    """Return a new policy by its name (`lru`) or as `package.module:Class`.

    Raises ValueError, in one line, if there is no such policy, or if the class is not an EvictionPolicy.
    """
    if name == "belady":
        raise ValueError("policy (belady) must be told the future: make a Belady, and pass it to the manager")
    if ":" not in name:
        if name not in POLICIES:
            known = ", ".join(sorted(POLICIES))
            raise ValueError(f"policy ({name}) must be one of {known}, or package.module:Class")
        return POLICIES[name]()
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(import_module(module_name), class_name)
    except Exception as error:  # whatever a user's module does when imported
        raise ValueError(f"policy ({name}) cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, EvictionPolicy)):
        raise ValueError(f"policy ({name}) must be a subclass of allocator.eviction.EvictionPolicy")
    try:
        return found()
    except Exception as error:
        raise ValueError(f"policy ({name}) cannot be made without arguments: {error}") from None
