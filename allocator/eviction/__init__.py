"""Eviction policies, one small file each, and how to name one."""

from __future__ import annotations

from importlib import import_module

from allocator.eviction.fifo import FIFO
from allocator.eviction.lru import LRU
from allocator.eviction.policy import EvictionPolicy

POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRU, "fifo": FIFO}

__all__ = ["FIFO", "LRU", "POLICIES", "EvictionPolicy", "make_policy"]


def make_policy(name: str) -> EvictionPolicy:
    """Return a new policy by its name (`lru`) or as `package.module:Class`.

    Raises ValueError, in one line, if there is no such policy, or if the class is not an EvictionPolicy.
    """
    if ":" not in name:
        if name not in POLICIES:
            known = ", ".join(sorted(POLICIES))
            raise ValueError(f"policy ({name}) must be one of {known}, or package.module:Class")
        return POLICIES[name]()
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"policy ({name}) cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, EvictionPolicy)):
        raise ValueError(f"policy ({name}) must be a subclass of allocator.eviction.EvictionPolicy")
    return found()
