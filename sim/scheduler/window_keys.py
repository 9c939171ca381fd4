"""Keys in attention windows: what a decoding batch attends to in layers that do not look back to the beginning."""

from __future__ import annotations

from heapq import heappop, heappush

NEVER = 1 << 62
"""A tick after all others."""


class WindowKeys:
    """For each of some windows, Σ min(length, window) over the decoding jobs, kept as they grow together.

        length   0 ……… window ………………>     a job of t tokens at tick 0 adds a key a tick up to tick window − t,
        keys     0 ……… window ─────────      and none after it

    Every member grows by a token a tick. So the keys grow evenly between the ticks at which a member reaches a
    window, and `even_ticks` says how long.

    keys     for each window, the keys that lie in it
    growing  for each window, the members whose keys still grow
    """

    __slots__ = ("_members", "_reaching", "_windows", "growing", "keys")

    def __init__(self, windows: tuple[int, ...]) -> None:
        self._windows = windows
        self.keys = [0] * len(windows)
        self.growing = [0] * len(windows)
        # A heap for each window: the tick at which a member reaches it, and its number. Who has left is not taken
        # out before its time: its number is not among the members' any more.
        self._reaching: list[list[tuple[int, int]]] = [[] for _ in windows]
        self._members: set[int] = set()

    def join(self, member: int, tokens: int, tick: int) -> None:
        """Count a job with `tokens` at this tick; `member` is a number that nobody has had."""
        self._members.add(member)
        for at, window in enumerate(self._windows):
            if tokens < window:
                self.keys[at] += tokens
                self.growing[at] += 1
                heappush(self._reaching[at], (tick + window - tokens, member))
            else:
                self.keys[at] += window

    def leave(self, member: int, tokens: int) -> None:
        """Count a job no longer, which has `tokens` now."""
        self._members.remove(member)
        for at, window in enumerate(self._windows):
            self.keys[at] -= min(tokens, window)
            self.growing[at] -= tokens < window

    def advance(self, tick: int, ticks: int) -> None:
        """Let all members grow by `ticks`, from 1 to `even_ticks`, which has brought them to `tick`."""
        for at, growing in enumerate(self.growing):
            self.keys[at] += growing * ticks
            reaching = self._reaching[at]
            while reaching and reaching[0][0] <= tick:
                _, member = heappop(reaching)
                self.growing[at] -= member in self._members

    def even_ticks(self, tick: int) -> int:
        """Return for how many ticks after `tick` the keys grow by as many at each; at least 1."""
        first = NEVER
        for reaching in self._reaching:
            while reaching and reaching[0][1] not in self._members:
                heappop(reaching)
            if reaching and reaching[0][0] < first:
                first = reaching[0][0]
        return first - tick
