"""Protecting: any policy, with cached content that is not to be taken while anything else can be."""

from __future__ import annotations

from collections.abc import Hashable

from allocator.eviction.policy import EvictionPolicy
from allocator.prefix import Extent


class Protecting(EvictionPolicy):
    """Another policy, which believes that protected extents are referenced, so that it does not choose them.

    They are evictable all the same: nothing that counts blocks knows of it. Whoever protects an extent has to protect
    those above it as well, as referencing does, unless the cache is windowed: there, each block stands for itself. If
    nothing else is left to be taken, all protection ends, that of the last `protect` first.

        evictable, protected      referenced to the other policy
        evictable                 released to it, and exposed if nothing cached hangs below
        referenced                referenced to it
    """

    def __init__(self, policy: EvictionPolicy, *, windowed: bool = False) -> None:
        self._policy = policy
        self._windowed = windowed
        self._guards: dict[Extent, dict[Hashable, None]] = {}
        self._keys: dict[Hashable, None] = {}
        self._exposed: dict[Extent, None] = {}  # what the other policy can choose

    # ---------------------------------------------------------------- protection

    def protect(self, key: Hashable, path: list[Extent]) -> None:
        """Protect cached extents, the deepest last, until `unprotect` is called with the same key.

        Called with a key again, it protects those extents instead of the earlier ones.
        """
        old = self._protected(key)
        self._keys.pop(key, None)
        self._keys[key] = None  # as the last one
        for extent in path:
            extent.sealed = True  # it must not outgrow what was found
            guards = self._guards.get(extent)
            if guards is None:
                self._guards[extent] = {key: None}
                if not extent.references:
                    self._exposed.pop(extent, None)
                    self._policy.referenced(extent)
            else:
                guards[key] = None
        self._drop(key, old.difference(path))

    def unprotect(self, key: Hashable) -> None:
        """End what was protected with a key, if anything is."""
        extents = self._protected(key)
        self._keys.pop(key, None)
        self._drop(key, extents)

    def protects(self, key: Hashable) -> bool:
        """Return whether something may be protected with a key: not if all protection has ended since."""
        return key in self._keys

    @property
    def num_protected(self) -> int:
        """Return how many evictable blocks are protected. O(protected extents)."""
        return sum(len(extent.ids) for extent in self._guards if not extent.references)

    def _protected(self, key: Hashable) -> set[Extent]:
        if key not in self._keys:
            return set()
        return {extent for extent, keys in self._guards.items() if key in keys}

    def _drop(self, key: Hashable, extents: set[Extent]) -> None:
        """End the protection of extents by a key, the deepest first."""
        for extent in sorted(extents, key=lambda extent: -extent.start):
            guards = self._guards[extent]
            del guards[key]
            if guards:
                continue
            del self._guards[extent]
            if not extent.references:
                self._policy.released(extent)
                if not extent.live_children or self._windowed:
                    self.exposed(extent)

    # ---------------------------------------------------------------- what the pool tells

    def attached(self, num_blocks: int) -> None:
        self._policy.attached(num_blocks)

    def hit(self, extent: Extent) -> None:
        self._policy.hit(extent)

    def referenced(self, extent: Extent) -> None:
        if extent not in self._guards:
            self._exposed.pop(extent, None)
            self._policy.referenced(extent)

    def released(self, extent: Extent) -> None:
        if extent not in self._guards:
            self._policy.released(extent)

    def exposed(self, extent: Extent) -> None:
        if extent not in self._guards:
            self._exposed[extent] = None
            self._policy.exposed(extent)

    def expired(self, extent: Extent) -> None:
        if extent not in self._guards:
            self._policy.expired(extent)

    def split(self, head: Extent, tail: Extent) -> None:
        if tail in self._guards:
            self._guards[head] = self._guards[tail].copy()
        self._policy.split(head, tail)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        if not extent.ids:
            self._exposed.pop(extent, None)
            self._guards.pop(extent, None)
        self._policy.evicted(extent, num_blocks)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        if not self._exposed:
            for key in reversed(list(self._keys)):
                self.unprotect(key)
        return self._policy.victim(wanted)


class _Noting(Protecting):
    """The same around a policy that wants to know of every block that fills."""

    def cached(self, extent: Extent, num_blocks: int) -> None:
        self._policy.cached(extent, num_blocks)


def protecting(policy: EvictionPolicy, *, windowed: bool = False) -> Protecting:
    """Return a policy that chooses as `policy` does among what is not protected, in a cache with windows or without."""
    notes = type(policy).cached is not EvictionPolicy.cached
    return (_Noting if notes else Protecting)(policy, windowed=windowed)
