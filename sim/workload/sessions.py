"""Sessions: turns that go on from one another, one after the other or as a tree, and what each of them says."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sim.workload.config import WorkloadShape
from sim.workload.draws import Draws

_Run = tuple[int, int]
"""(first chunk, its id): from there on, consecutive chunks have consecutive ids."""


@dataclass(slots=True)
class Turn:
    """A request before it has its place in the trace."""

    session: int
    index: int
    """Among the session's turns."""
    think_ps: int
    prompt_tokens: int
    output_tokens: int
    num_samples: int
    beam_width: int
    parent: Turn | None
    branch: int
    """Turns of one branch go on with the same run of content ids."""
    followers: list[Turn] = field(default_factory=list)
    arrival_ps: int = 0
    request_id: int = -1
    waits_for: int = -1
    """Request that must have finished before, -1 for none."""
    runs: tuple[_Run, ...] = ()

    @property
    def total_tokens(self) -> int:
        """Prompt and output."""
        return self.prompt_tokens + self.output_tokens

    @property
    def named_tokens(self) -> int:
        """Tokens that have content ids: the prompt, and the output where a later turn repeats it.

        Of a beam search, it is not known which beam will say so.
        """
        return self.total_tokens if self.followers and self.beam_width == 1 else self.prompt_tokens

    def chunk_ids(self, granularity: int) -> NDArray[np.int64]:
        """Return the content ids, int64 [⌈named_tokens / granularity⌉]."""
        chunks = -(-self.named_tokens // granularity)
        ids = np.empty(chunks, dtype=np.int64)
        for first, first_id in self.runs:
            ids[first:] = np.arange(first_id, first_id + max(chunks - first, 0))
        return ids


class Sessions:
    """Draw one session after the other."""

    def __init__(self, shape: WorkloadShape, draws: Draws) -> None:
        self._shape = shape
        self._draws = draws
        self._granularity = shape.content_tokens_per_chunk
        self._system_chunks = shape.system_prompt_tokens // self._granularity
        self._document_chunks = shape.document_tokens // self._granularity
        # Content ids: system prompts first, then documents, then what the sessions say.
        self._first_document = shape.system_prompts * self._system_chunks
        self._next_id = self._first_document + shape.documents * self._document_chunks
        self._count = 0

    def next(self) -> Turn:
        """Return the first turn of the next session, with all that follow it; none has its arrival yet."""
        shape, draws = self._shape, self._draws
        session, self._count = self._count, self._count + 1
        system, documents = next(draws.system_prompt), next(draws.documents)
        said = shape.system_prompt_tokens if system >= 0 else 0
        said += shape.document_tokens * len(documents)
        turns: list[Turn] = []
        branches = 1
        open_places: deque[tuple[Turn | None, int]] = deque([(None, 0)])  # (parent, branch)
        for _ in range(next(draws.turns)):
            user, output, think_ps = next(draws.user), next(draws.output), next(draws.think_ps)
            samples, beams, followers = next(draws.samples), next(draws.beams), next(draws.followers)
            if samples > 1:
                beams = 1
            if not open_places:
                continue  # all draws are taken, so that those of the next session stay what they are
            parent, branch = open_places.popleft()
            prompt = user + (said if parent is None else parent.total_tokens)
            most = shape.session_tokens_max
            if most is not None and prompt + output > most:
                continue
            turn = Turn(session, len(turns), think_ps, prompt, output, samples, beams, parent, branch)
            if parent is not None:
                parent.followers.append(turn)
            turns.append(turn)
            open_places.append((turn, branch))
            for _ in range(followers - 1):
                open_places.append((turn, branches))
                branches += 1
        if shape.shares_content:
            self._name(turns, self._opening(system, documents), branches)
        return turns[0]

    def _opening(self, system: int, documents: list[int]) -> list[_Run]:
        """Return the runs of what a session shares with others: system prompt and documents."""
        runs, chunk = [], 0
        if system >= 0:
            runs.append((0, system * self._system_chunks))
            chunk = self._system_chunks
        for document in documents:
            runs.append((chunk, self._first_document + document * self._document_chunks))
            chunk += self._document_chunks
        return [*runs, (chunk, -1)]

    def _name(self, turns: list[Turn], opening: list[_Run], branches: int) -> None:
        """Give a session's turns their content: a run of ids of its own to each branch."""
        granularity = self._granularity
        first = [0] * branches  # by branch: its first chunk, and how many it has
        chunks = [0] * branches
        for turn in turns:
            branch, parent = turn.branch, turn.parent
            if parent is not None and parent.branch != branch:
                # The chunk in which the parent's answer ends may go on differently here.
                first[branch] = parent.total_tokens // granularity
            needed = -(-turn.total_tokens // granularity) - first[branch]
            chunks[branch] = max(chunks[branch], needed)
        first_id = []
        for count in chunks:
            first_id.append(self._next_id)
            self._next_id += count
        own = opening[-1][0]
        for turn in turns:
            branch, parent = turn.branch, turn.parent
            if parent is None:
                turn.runs = (*opening[:-1], (own, first_id[0] + own))
            elif parent.branch == branch:
                turn.runs = parent.runs
            else:
                turn.runs = (*parent.runs, (first[branch], first_id[branch]))
