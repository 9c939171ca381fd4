"""The manager of a windowed cache, step by step beside one that is written block by block."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from different_cases import different_programs
from naive_windows import Attention, NaiveWindowedManager
from test_allocator_naive import BesideNaive

from allocator.fuzz import ReuseMachine, WindowMachine, run_machine


class WindowBesideNaive(BesideNaive, WindowMachine):
    """Every rule, on both managers, with windows of 2 to 9 tokens and up to 3 sinks."""

    partials: ClassVar = ("", "copy", "steal")

    def choose_window(self, drawn: int) -> int | None:
        """Return a window."""
        return 2 + drawn % 8

    def make_naive(self, num_blocks: int, tokens_per_block: int, reuse: bool, ghosts: int) -> Any:
        """Return the naive manager of a windowed cache."""
        assert isinstance(self.policy, str)
        assert self.window is not None
        return NaiveWindowedManager(
            num_blocks,
            tokens_per_block,
            self.policy,
            reuse,
            ghosts,
            self.partial,
            self.window,
            self.num_sinks,
        )


class WindowReuseBesideNaive(WindowBesideNaive, ReuseMachine):
    """As above; the rules of sharing are switched off, so that hits and evictions come quickly."""

    fork = sample = search = reorder_beams = truncate = join_all = join_or_leave = append_batch = None
    partials: ClassVar = ("",)


class WindowPartialBesideNaive(WindowReuseBesideNaive):
    """As above, with partial reuse always, in blocks of four tokens."""

    partials: ClassVar = ("copy", "steal")

    def begin(self, num_blocks: int, tokens_per_block: int, reuse: bool, *others: Any, **more: Any) -> None:
        super().begin(num_blocks, 4, True, *others, **more)


class WithSmallerWindow(WindowReuseBesideNaive):
    """What the comparison has to notice."""

    def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> Any:
        pair = super().make_manager(num_blocks, tokens_per_block, reuse)
        pair.naive.attention = Attention(self.window - 1, self.num_sinks, tokens_per_block)
        return pair


def test_another_window_is_noticed() -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # or one of them does not refuse
        run_machine(WithSmallerWindow, 6000)


TestWindowBesideNaive = different_programs(WindowBesideNaive)
TestWindowReuseBesideNaive = different_programs(WindowReuseBesideNaive, share=0.25)
TestWindowPartialBesideNaive = different_programs(WindowPartialBesideNaive, share=0.25)
