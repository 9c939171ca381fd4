"""WorkloadConfig: what a synthetic workload is drawn from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from allocator.checks import require_choice, require_int, require_optional_int
from allocator.field_docs import with_field_docs
from sim.request import MAX_GRANULARITY, MAX_TOKENS
from sim.workload.lengths import LENGTH_MODELS, Lengths, Lognormal

GENERATOR_VERSION = 2
"""Part of a workload's hash: goes up when the same configuration comes to give other requests."""

ArrivalProcess = Literal["gamma", "on_off", "closed_loop"]
LengthModel = Literal[
    "lognormal", "sharegpt", "alpaca", "azure_code", "azure_conversation", "mooncake_conversation"
]
DocumentOrder = Literal["drawn", "fixed"]

_CHOICES = {"arrivals": ArrivalProcess, "length_model": LengthModel, "document_order": DocumentOrder}
_INTEGERS = {
    "num_requests": (1, 10**9),
    "clients": (1, 10**6),
    "turns_max": (1, 10**6),
    "branches": (2, 10**4),
    "samples_per_request": (1, 10**6),
    "beams_per_request": (1, 10**6),
    "system_prompts": (0, 10**6),
    "documents": (0, 10**5),
    "documents_per_session": (1, 10**4),
    "content_tokens_per_chunk": (1, MAX_GRANULARITY),
}
_NUMBERS = {
    "requests_per_s": (1e-6, 1e9),
    "arrival_cv": (0.0, 100.0),
    "on_s_mean": (1e-6, 1e6),
    "off_s_mean": (0.0, 1e6),
    "user_tokens_sigma": (0.0, 10.0),
    "output_tokens_sigma": (0.0, 10.0),
    "system_prompt_zipf": (0.0, 100.0),
    "system_prompt_share": (0.0, 1.0),
    "document_zipf": (0.0, 100.0),
    "sampling_share": (0.0, 1.0),
    "beam_share": (0.0, 1.0),
    "branch_share": (0.0, 1.0),
    "turns_mean": (1.0, 1e4),
    "think_s_mean": (0.0, 86400.0),
}
"""Least and most of each figure: far beyond any service, and within what the draws and the clock can hold."""

_LEAST_CV = 0.001
"""Least variation but none: that of a gamma distribution of shape 10^6."""


@with_field_docs
@dataclass(frozen=True)
class WorkloadShape:
    """What a synthetic workload is drawn from, but for how many requests.

    The same configuration gives the same requests, as long as NumPy keeps its random streams.
    Sessions arrive at random; each starts with its user's text, behind a shared system prompt and retrieved documents
    if there are any, and goes on for some turns: the next prompt is all that was said before and new text of the
    user. Each kind of draw has a random stream of its own, so that changing, say, the rate leaves all lengths as
    they are.

    Raises ValueError on a broken rule.
    """

    workload_seed: int = 0
    """Seed of all draws."""
    arrivals: ArrivalProcess = "gamma"
    """gamma: independent gaps between sessions; on_off: such gaps while the source is on, none while it is off;
    closed_loop: so many clients, each of which sends its next request when the last has finished and it has had
    its time to think; one whose request is rejected sends no more."""
    requests_per_s: float = 4.0
    """Mean rate of requests, all turns counted, once sessions have come to a steady number; not in a closed loop."""
    arrival_cv: float = 1.0
    """Coefficient of variation of the gaps between sessions, which are gamma distributed: 0 is a metronome, 1 a
    Poisson process, more is bursty."""
    on_s_mean: float = 10.0
    """on_off: mean time, seconds, for which sessions arrive, faster so that the mean rate holds; exponential."""
    off_s_mean: float = 10.0
    """on_off: mean time, seconds, for which none does; exponential."""
    clients: int = 16
    """closed_loop: clients; all send their first request at once."""
    length_model: LengthModel = "lognormal"
    """How long the user's texts and the outputs are: lognormal takes the eight figures below, the others are as
    published."""
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
    documents: int = 0
    """Documents that can be retrieved: the corpus."""
    document_tokens: int = 512
    """Length of each of them."""
    documents_per_session: int = 4
    """Documents that a session's first prompt holds behind the system prompt, all different."""
    document_zipf: float = 1.0
    """Exponent of their popularity, like that of system prompts."""
    document_order: DocumentOrder = "drawn"
    """drawn: in the order in which they are drawn, popular ones rather first; fixed: in the order of the corpus, so
    that sessions that share documents share prefixes more often."""
    turns_mean: float = 1.0
    """Mean number of turns of a session, before it is cut off; geometrically distributed."""
    turns_max: int = 32
    """Most turns of a session."""
    branch_share: float = 0.0
    """Share of turns that several others follow instead of one, as when an agent sends out sub-agents: all go on
    from the same prefix. turns_mean counts the turns of all branches."""
    branches: int = 3
    """Turns that follow such a turn, if the session has so many left."""
    session_tokens_max: int | None = None
    """Most tokens a session may come to, prompt and output of its last turn: it ends before the turn that would
    exceed it. None sets no bound."""
    think_s_mean: float = 10.0
    """Mean time, seconds, between an answer's end and the next turn, of a user who thinks or a tool that works;
    exponentially distributed."""
    sampling_share: float = 0.0
    """Share of requests that ask for several outputs."""
    samples_per_request: int = 4
    """Outputs that those requests ask for. A session goes on with the first."""
    beam_share: float = 0.0
    """Share of the other requests for which a beam search is made."""
    beams_per_request: int = 4
    """Beams of each such search. A session goes on with the best; that it finds in the cache, when it goes on, is
    the prompt alone."""
    content_tokens_per_chunk: int = 16
    """Tokens that one content id stands for. Sharing is exact to this many tokens: the chunk in which a system
    prompt ends belongs to the session, that in which a turn ends to the first branch."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            require_choice(name, getattr(self, name), get_args(kind))
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
        self._check_lengths()
        self._check_shared()
        if self.arrivals == "closed_loop" and self.branch_share:
            raise ValueError(
                f"branch_share ({self.branch_share}) must be 0 in a closed loop: a client waits for one request"
            )
        first = self._most_shared_tokens + self.user_lengths.longest + self.output_lengths.longest
        if self.session_tokens_max is not None and self.session_tokens_max < first:
            raise ValueError(
                f"session_tokens_max ({self.session_tokens_max}) must hold the longest first turn: system prompt, "
                f"documents, user's text and output, {first} tokens"
            )

    def _check_lengths(self) -> None:
        for kind in ("user", "output"):
            low, high = getattr(self, f"{kind}_tokens_min"), getattr(self, f"{kind}_tokens_max")
            require_int(f"{kind}_tokens_min", low, 1)
            require_int(f"{kind}_tokens_max", high, 1)
            if not low <= high <= MAX_TOKENS:
                raise ValueError(
                    f"{kind}_tokens_max ({high}) must be in {kind}_tokens_min ({low})..{MAX_TOKENS}"
                )
        if self.length_model != "lognormal":
            for each in dataclasses.fields(WorkloadShape):
                value = getattr(self, each.name)
                if each.name.startswith(("user_tokens_", "output_tokens_")) and value != each.default:
                    raise ValueError(
                        f"{each.name} ({value}) must not be given with length_model {self.length_model}, "
                        "only with lognormal"
                    )

    def _check_shared(self) -> None:
        chunk = self.content_tokens_per_chunk
        for name, there in (
            ("system_prompt_tokens", self.system_prompts),
            ("document_tokens", self.documents),
        ):
            if not there:
                continue
            length = getattr(self, name)
            require_int(name, length, 1)
            if length > MAX_TOKENS:
                raise ValueError(f"{name} ({length}) must be at most {MAX_TOKENS}")
            if length < chunk:
                raise ValueError(
                    f"{name} ({length}) must be at least content_tokens_per_chunk ({chunk}), or nothing is shared"
                )
            if self.documents and length % chunk:
                raise ValueError(
                    f"{name} ({length}) must be a multiple of content_tokens_per_chunk ({chunk}) where there are "
                    "documents, so that each begins with a chunk"
                )
        if self.documents and self.documents_per_session > self.documents:
            raise ValueError(
                f"documents_per_session ({self.documents_per_session}) must be at most documents ({self.documents})"
            )

    def of(self, num_requests: int | None) -> WorkloadConfig:
        """Return a workload of this shape and so many requests, None for as many as is usual."""
        fields: dict[str, Any] = {
            each.name: getattr(self, each.name) for each in dataclasses.fields(WorkloadShape)
        }
        if num_requests is not None:
            fields["num_requests"] = num_requests
        return WorkloadConfig(**fields)

    @property
    def _most_shared_tokens(self) -> int:
        system = self.system_prompt_tokens if self.system_prompts else 0
        return system + (self.document_tokens * self.documents_per_session if self.documents else 0)

    @property
    def shares_content(self) -> bool:
        """Whether any two prompts may have content in common; else none of it is named."""
        return bool(self.system_prompts or self.documents or (self.turns_mean > 1 and self.turns_max > 1))

    @property
    def user_lengths(self) -> Lengths:
        """The distribution of the lengths of users' texts."""
        if self.length_model != "lognormal":
            return LENGTH_MODELS[self.length_model].prompt
        return Lognormal(
            self.user_tokens_mean, self.user_tokens_sigma, self.user_tokens_min, self.user_tokens_max
        )

    @property
    def output_lengths(self) -> Lengths:
        """The distribution of the lengths of outputs."""
        if self.length_model != "lognormal":
            return LENGTH_MODELS[self.length_model].output
        return Lognormal(
            self.output_tokens_mean, self.output_tokens_sigma, self.output_tokens_min, self.output_tokens_max
        )


@with_field_docs
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
