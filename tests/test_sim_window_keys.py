"""Keys in attention windows: counted as they grow, they are what looking at every member finds."""

from __future__ import annotations

import numpy as np
import pytest
from engine_cases import LinearCost, Scenario, assert_identical, unlike
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import MODEL_PRESETS, BuildConfig
from sim.cost import RooflineCost
from sim.hardware import GPU_PRESETS
from sim.scheduler.window_keys import WindowKeys
from sim.workload import WorkloadConfig, generate

_MOVES = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "advance", "advance"]), st.integers(1, 12)), max_size=40
)


@given(st.sampled_from([(4,), (3, 9), (1, 2, 20)]), _MOVES)
def test_counting_is_looking(windows: tuple[int, ...], moves: list[tuple[str, int]]) -> None:
    counted, lengths, tick, joined = WindowKeys(windows), {}, 0, 0
    for move, number in moves:
        if move == "join":
            joined += 1
            lengths[joined] = number
            counted.join(joined, number, tick)
        elif move == "leave" and lengths:
            member = sorted(lengths)[number % len(lengths)]
            counted.leave(member, lengths.pop(member))
        elif move == "advance":
            even = counted.even_ticks(tick)
            for _ in range(min(number, even)):
                before = counted.growing[:]
                tick += 1
                counted.advance(tick, 1)
                lengths = {member: length + 1 for member, length in lengths.items()}
            assert number >= even or counted.growing == before
        assert counted.keys == [sum(min(length, w) for length in lengths.values()) for w in windows]
        assert counted.growing == [sum(length < w for length in lengths.values()) for w in windows]
        left = [w - length for w in windows for length in lengths.values() if length < w]
        assert counted.even_ticks(tick) == min(left) if left else counted.even_ticks(tick) > 10**9


def test_a_step_takes_longer_until_the_window_is_reached() -> None:
    """Two requests, window 8: A has 5 keys in its first decode step, B 7. A step takes 10, and 1 for each key."""
    cost = LinearCost(10, windows=(8,), window_slopes=(1,))
    build = BuildConfig(4, 64, 64, tokens_per_block=4)
    scenario = Scenario(unlike((0, 4, 9), (0, 6, 6)), build, 20, cost=cost)
    result = scenario.run()
    names = ("start_ps", "end_ps", "steps", "decode_sequences", "first_step_ps", "step_increment_ps")
    assert np.stack([result.timeline[name] for name in names], axis=1).tolist() == [
        [0, 10, 1, 0, 10, 0],  # both prompts
        [10, 10 + 22 + 24, 2, 2, 22, 2],  # 5 + 7 keys, 6 + 8: B has reached the window
        [56, 56 + 25 + 26, 2, 2, 25, 1],  # 7 + 8 keys, 8 + 8: A has as well
        [107, 107 + 26, 1, 2, 26, 0],  # and B its last token
        [133, 133 + 3 * 18, 3, 1, 18, 0],
    ]
    assert_identical(result, scenario.run(skipping=False))


@pytest.mark.parametrize("max_seq_len", [4096, 16384])
def test_models_with_windows_skip(max_seq_len: int) -> None:
    """Mistral's window of 4,096 keys: stretches are as long as without one, but for who reaches it."""
    trace = generate(
        WorkloadConfig(num_requests=60, requests_per_s=0.5, output_tokens_mean=500.0, user_tokens_mean=2500.0)
    )
    requests = list(trace)
    cost = RooflineCost(MODEL_PRESETS["mistral-7b"], GPU_PRESETS["a100-80gb"])
    build = BuildConfig(max_seq_len=max_seq_len)
    result = Scenario(requests, build, 4000, cost=cost).run()
    steps = result.timeline["steps"]
    assert steps.sum() > 10 * steps.size
