"""Synthetic workloads: seeded arrivals, lengths, and content that is shared the way prompts share it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.checks import require_int, require_optional_int
from sim.request import MAX_GRANULARITY, MAX_TIME_PS, MAX_TOKENS, PS_PER_S, Request
from sim.traces.trace import Trace

GENERATOR_VERSION = 1
"""Part of a workload's hash: goes up when the same configuration comes to give other requests."""

_INTEGERS = {
    "num_requests": (1, 10**7),
    "turns_max": (1, 10**6),
    "samples_per_request": (1, 10**6),
    "system_prompts": (0, 10**6),
    "content_tokens_per_chunk": (1, MAX_GRANULARITY),
}
_NUMBERS = {
    "requests_per_s": (1e-6, 1e9),
    "arrival_cv": (0.0, 100.0),
    "user_tokens_sigma": (0.0, 10.0),
    "output_tokens_sigma": (0.0, 10.0),
    "system_prompt_zipf": (0.0, 100.0),
    "system_prompt_share": (0.0, 1.0),
    "sampling_share": (0.0, 1.0),
    "turns_mean": (1.0, 1e4),
    "think_s_mean": (0.0, 86400.0),
}
"""Least and most of each figure: far beyond any service, and within what the draws and the clock can hold."""

_LEAST_CV = 0.001
"""Least variation but none: that of a gamma distribution of shape 10^6."""


@dataclass(frozen=True)
class WorkloadShape:
    """What a synthetic workload is drawn from, but for how many requests.

    The same configuration gives the same requests, as long as NumPy keeps its random streams.
    Sessions arrive at random; each starts with its user's text, behind one of the shared system prompts if there
    are any, and goes on for some turns: the next prompt is all that was said before and new text of the user.
    Each kind of draw has a random stream of its own, so that changing, say, the rate leaves all lengths as they are.

    Raises ValueError on a broken rule.
    """

    workload_seed: int = 0
    """Seed of all draws."""
    requests_per_s: float = 4.0
    """Mean rate of requests, all turns counted, once sessions have come to a steady number."""
    arrival_cv: float = 1.0
    """Coefficient of variation of the gaps between sessions, which are gamma distributed: 0 is a metronome, 1 a
    Poisson process, more is bursty."""
    user_tokens_mean: float = 512.0
    """Mean length of a user's text, before it is clipped; lengths are lognormal."""
    user_tokens_sigma: float = 0.7
    """Standard deviation of that length's logarithm; 0 makes all alike."""
    user_tokens_min: int = 16
    user_tokens_max: int = 8192
    output_tokens_mean: float = 128.0
    """Mean length of an output, before it is clipped; lengths are lognormal."""
    output_tokens_sigma: float = 0.7
    """Standard deviation of that length's logarithm."""
    output_tokens_min: int = 1
    output_tokens_max: int = 2048
    system_prompts: int = 0
    """Shared system prompts."""
    system_prompt_tokens: int = 512
    """Length of each of them."""
    system_prompt_zipf: float = 1.0
    """Exponent of their popularity: the k-th is used in proportion to 1 / k^exponent; 0 is uniform."""
    system_prompt_share: float = 1.0
    """Share of sessions that begin with a system prompt, if there are any."""
    turns_mean: float = 1.0
    """Mean number of turns of a session, before it is cut off; geometrically distributed."""
    turns_max: int = 32
    """Most turns of a session."""
    session_tokens_max: int | None = None
    """Most tokens a session may come to, prompt and output of its last turn: it ends before the turn that would
    exceed it. None sets no bound."""
    think_s_mean: float = 10.0
    """Mean time, seconds, between an answer's end and the user's next turn; exponentially distributed."""
    sampling_share: float = 0.0
    """Share of requests that ask for several outputs."""
    samples_per_request: int = 4
    """Outputs that those requests ask for. A session goes on with the first."""
    content_tokens_per_chunk: int = 16
    """Tokens that one content id stands for. Sharing is exact to this many tokens: the chunk in which a system
    prompt ends belongs to the session."""

    def __post_init__(self) -> None:
        for name in _INTEGERS.keys() & {each.name for each in dataclasses.fields(self)}:
            least, most = _INTEGERS[name]
            require_int(name, getattr(self, name), least)
            if getattr(self, name) > most:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at most {most}")
        require_int("workload_seed", self.workload_seed, 0)
        require_optional_int("session_tokens_max", self.session_tokens_max, 1)
        for name in ("user_tokens_mean", "output_tokens_mean"):
            _require_number(name, getattr(self, name), above=0.0)
        for name, bounds in _NUMBERS.items():
            _require_number(name, getattr(self, name), least=bounds[0], most=bounds[1])
        if 0 < self.arrival_cv < _LEAST_CV:
            raise ValueError(f"arrival_cv ({self.arrival_cv}) must be 0, or at least {_LEAST_CV:g}")
        for kind in ("user", "output"):
            low, high = getattr(self, f"{kind}_tokens_min"), getattr(self, f"{kind}_tokens_max")
            require_int(f"{kind}_tokens_min", low, 1)
            require_int(f"{kind}_tokens_max", high, 1)
            if not low <= high <= MAX_TOKENS:
                raise ValueError(
                    f"{kind}_tokens_max ({high}) must be in {kind}_tokens_min ({low})..{MAX_TOKENS}"
                )
        if self.system_prompts:
            require_int("system_prompt_tokens", self.system_prompt_tokens, 1)
            if self.system_prompt_tokens > MAX_TOKENS:
                raise ValueError(
                    f"system_prompt_tokens ({self.system_prompt_tokens}) must be at most {MAX_TOKENS}"
                )
            if self.system_prompt_tokens < self.content_tokens_per_chunk:
                raise ValueError(
                    f"system_prompt_tokens ({self.system_prompt_tokens}) must be at least "
                    f"content_tokens_per_chunk ({self.content_tokens_per_chunk}), or nothing is shared"
                )
        first = self._system_tokens + self.user_tokens_max + self.output_tokens_max
        if self.session_tokens_max is not None and self.session_tokens_max < first:
            raise ValueError(
                f"session_tokens_max ({self.session_tokens_max}) must hold the longest first turn: system prompt, "
                f"user_tokens_max and output_tokens_max, {first} tokens"
            )

    @property
    def _system_tokens(self) -> int:
        return self.system_prompt_tokens if self.system_prompts else 0


@dataclass(frozen=True)
class WorkloadConfig(WorkloadShape):
    """A synthetic workload: its shape, and how many requests. Raises ValueError on a broken rule."""

    num_requests: int = 1000
    """Requests of the workload: the first so many to arrive."""

    @property
    def shape(self) -> WorkloadShape:
        """All of it but the number of requests."""
        return WorkloadShape(
            **{each.name: getattr(self, each.name) for each in dataclasses.fields(WorkloadShape)}
        )

    @property
    def sha256(self) -> str:
        """Hex digest of the configuration in canonical JSON: it names the workload in a run's manifest."""
        fields = {"generator": GENERATOR_VERSION, **dataclasses.asdict(self)}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _require_number(
    name: str, value: float, *, above: float | None = None, least: float = -math.inf, most: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} ({value!r}) must be a finite number")
    if above is not None and value <= above:
        raise ValueError(f"{name} ({value}) must be above {above:g}")
    if not least <= value <= most:
        raise ValueError(f"{name} ({value}) must be in [{least:g}, {most:g}]")


def generate(config: WorkloadConfig) -> Trace:
    """Return the workload's requests, in order of arrival, the first at time 0.

    A later turn names its predecessor as `parent` and its pause as `think_ps`; its own arrival_ps is the earliest
    it can have, the predecessor's plus the pause. Content ids are unique to a session but for the chunks of system
    prompts. Outputs are named where a later turn of the session repeats them.

    Raises ValueError when the arrivals would not fit the simulator's clock.
    """
    # The first n requests come from the first n sessions: session n + 1 begins after n others have.
    draws = _Draws(config, config.num_requests)
    turns = [
        turn for session in range(config.num_requests) for turn in _session_turns(config, draws, session)
    ]
    turns.sort(key=lambda turn: (turn.arrival_ps, turn.session, turn.index))
    del turns[config.num_requests :]
    contents = _Contents(config, draws, turns)
    ids: dict[tuple[int, int], int] = {}
    requests = []
    for request_id, turn in enumerate(turns):
        ids[turn.session, turn.index] = request_id
        named = turn.prompt_tokens + (0 if turn.last else turn.output_tokens)
        requests.append(
            Request(
                request_id=request_id,
                arrival_ps=turn.arrival_ps,
                prompt_tokens=turn.prompt_tokens,
                output_tokens=turn.output_tokens,
                chunk_ids=contents.chunk_ids(turn.session, named),
                granularity=config.content_tokens_per_chunk,
                named_tokens=named,
                num_samples=turn.num_samples,
                parent=ids[turn.session, turn.index - 1] if turn.index else -1,
                think_ps=turn.think_ps,
            )
        )
    return Trace("synthetic", "synthetic", config.sha256, requests)


@dataclass(slots=True)
class _Turn:
    """A request before it has its number."""

    session: int
    index: int
    arrival_ps: int
    think_ps: int
    prompt_tokens: int
    output_tokens: int
    num_samples: int
    last: bool


class _Draws:
    """All random numbers of a workload, one stream a kind; [s] per session, [t] per turn of all sessions."""

    def __init__(self, config: WorkloadConfig, sessions: int) -> None:
        streams = (
            np.random.default_rng(seed) for seed in np.random.SeedSequence(config.workload_seed).spawn(7)
        )
        gaps, turns, system, user, output, think, sampling = streams
        self.turns = np.minimum(turns.geometric(1 / config.turns_mean, sessions), config.turns_max)
        total = int(self.turns.sum())
        self.first_turn = np.cumsum(self.turns) - self.turns
        self.starts_ps = _arrivals_ps(config, gaps, sessions)
        self.system = _system_prompts(config, system, sessions)
        self.user = _lengths(
            user,
            total,
            config.user_tokens_mean,
            config.user_tokens_sigma,
            config.user_tokens_min,
            config.user_tokens_max,
        )
        self.output = _lengths(
            output,
            total,
            config.output_tokens_mean,
            config.output_tokens_sigma,
            config.output_tokens_min,
            config.output_tokens_max,
        )
        self.think_ps = np.rint(think.exponential(config.think_s_mean, total) * PS_PER_S).astype(np.int64)
        several = sampling.random(total) < config.sampling_share
        self.samples = np.where(several, config.samples_per_request, 1)


def _arrivals_ps(config: WorkloadConfig, rng: np.random.Generator, sessions: int) -> NDArray[np.int64]:
    """Return the sessions' arrival times, int64 [sessions], from 0.

    Sessions come at requests_per_s divided by the mean number of turns: of a geometric distribution with
    parameter p cut off at m, (1 − (1 − p)^m) / p.
    """
    p = 1 / config.turns_mean
    mean_gap_s = (1 - (1 - p) ** config.turns_max) / p / config.requests_per_s
    if config.arrival_cv == 0:
        gaps_s = np.full(sessions, mean_gap_s)
    else:
        shape = config.arrival_cv**-2
        gaps_s = rng.gamma(shape, mean_gap_s / shape, sessions)
    gaps_s[0] = 0.0
    if gaps_s.sum() * PS_PER_S > MAX_TIME_PS / 2:
        raise ValueError(
            f"requests_per_s ({config.requests_per_s}) must be higher: {config.num_requests} requests would take "
            f"{gaps_s.sum() / 86400:.0f} days, and the simulator's clock ends at {MAX_TIME_PS // 86400 // PS_PER_S}"
        )
    times: NDArray[np.int64] = np.cumsum(np.rint(gaps_s * PS_PER_S).astype(np.int64))
    return times


def _system_prompts(config: WorkloadConfig, rng: np.random.Generator, sessions: int) -> NDArray[np.int64]:
    """Return the system prompt of each session, int64 [sessions], −1 for none."""
    if not config.system_prompts:
        return np.full(sessions, -1, dtype=np.int64)
    weights = np.arange(1, config.system_prompts + 1, dtype=np.float64) ** -config.system_prompt_zipf
    chosen = rng.choice(config.system_prompts, size=sessions, p=weights / weights.sum())
    found: NDArray[np.int64] = np.where(rng.random(sessions) < config.system_prompt_share, chosen, -1)
    return found


def _lengths(
    rng: np.random.Generator, count: int, mean: float, sigma: float, low: int, high: int
) -> NDArray[np.int64]:
    """Return lognormal lengths, int64 [count], in low..high; a lognormal's mean is exp(μ + σ² / 2)."""
    drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    found: NDArray[np.int64] = np.clip(np.rint(drawn), low, high).astype(np.int64)
    return found


def _session_turns(config: WorkloadConfig, draws: _Draws, session: int) -> Iterator[_Turn]:
    first, count = int(draws.first_turn[session]), int(draws.turns[session])
    said = config.system_prompt_tokens if draws.system[session] >= 0 else 0
    arrival_ps = int(draws.starts_ps[session])
    turns: list[_Turn] = []
    for index in range(count):
        at = first + index
        prompt, output = said + int(draws.user[at]), int(draws.output[at])
        if config.session_tokens_max is not None and prompt + output > config.session_tokens_max:
            break
        think_ps = int(draws.think_ps[at]) if index else 0
        arrival_ps += think_ps
        turns.append(
            _Turn(session, index, arrival_ps, think_ps, prompt, output, int(draws.samples[at]), last=False)
        )
        said = prompt + output
    turns[-1].last = True
    yield from turns


class _Contents:
    """Content ids: system prompts first, then the sessions, a range of ids each."""

    def __init__(self, config: WorkloadConfig, draws: _Draws, turns: list[_Turn]) -> None:
        self._granularity = config.content_tokens_per_chunk
        self._shared_chunks = config._system_tokens // self._granularity
        self._system = draws.system
        chunks: dict[int, int] = {}
        for turn in turns:
            needed = -(-(turn.prompt_tokens + turn.output_tokens) // self._granularity)
            chunks[turn.session] = max(chunks.get(turn.session, 0), needed)
        next_id = config.system_prompts * self._shared_chunks
        self._first_id: dict[int, int] = {}
        for session, needed in chunks.items():
            self._first_id[session] = next_id
            next_id += needed

    def chunk_ids(self, session: int, num_tokens: int) -> NDArray[np.int64]:
        """Return the ids of a session's first tokens, int64 [⌈num_tokens / granularity⌉]."""
        first = self._first_id[session]
        ids = np.arange(first, first - (-num_tokens // self._granularity), dtype=np.int64)
        system = int(self._system[session])
        if system >= 0:
            shared = min(self._shared_chunks, len(ids))
            ids[:shared] = np.arange(shared) + system * self._shared_chunks
        return ids
