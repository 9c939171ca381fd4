"""Beam search: which beams go on from which, and the groups of beams that decode together.

A beam search begins as one job, whose prompt is computed once, and is forked into its beams, as samples are. From
then on a step may find that the best continuations do not come from every beam: before the next one, some beams end
and others go on twice. What survives depends on the model; here it is drawn, see `beam_parents`.

All beams of a search run or none does. If one is to be preempted, all of them go, and the search begins anew with
its prompt, as in TensorRT-LLM: what one beam said is no prompt from which the others could go on. So that it ends at
last, it is not preempted again while anybody else could be, and of several such, the first to start stays.
"""

from __future__ import annotations

from heapq import heappop, heappush

from allocator.manager import KVCacheManager
from sim.scheduler.job import Job
from sim.scheduler.victims import ChooseVictim, last_started

NEVER = 1 << 62
"""A tick after all others."""

_ONE_IN = 8
"""A beam ends after a step with a chance of one in so many: with 4 beams, two steps in five change something."""

_MASK = (1 << 64) - 1


def _mixed(number: int) -> int:
    """Return 64 well-mixed bits: the output function of SplitMix64 (Steele et al., OOPSLA 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def beam_parents(request_id: int, tokens: int, width: int) -> list[int]:
    """Return, for each of `width` beams, the beam from which it goes on when `tokens` were generated and kept.

    With a chance of one in eight a beam ends, and its place is taken by a copy of a beam drawn from all. A function
    of nothing else, so that a rerun, and a search that begins anew, sees the same.
    """
    seed = _mixed(_mixed(request_id) ^ tokens)
    parents = []
    for beam in range(width):
        drawn = _mixed(seed ^ beam)
        parents.append(beam if drawn % _ONE_IN else (drawn >> 32) % width)
    return parents


def next_reorder(request_id: int, tokens: int, last: int, width: int) -> int:
    """Return the least number of generated tokens, from `tokens` to `last`, at which a beam changes; NEVER if none."""
    stay = list(range(width))
    for generated in range(tokens, last + 1):
        if beam_parents(request_id, generated, width) != stay:
            return generated
    return NEVER


class Beams:
    """The beam searches that decode in a batch.

    A search joined at tick t has generated and kept d tokens at tick t + d. Before its first step nothing changes
    places, as all beams have just come from the prompt, and after its last one nothing does that would matter.

    groups      the first beam's job -> those of all beams
    began_anew  whether a search has ever been preempted
    reordered   the tick before which beams have last changed places
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self.groups: dict[Job, list[Job]] = {}
        self.began_anew = False
        self.reordered = -1
        self._joined: dict[Job, tuple[int, int]] = {}  # its number in the order of joining, and the tick
        self._count = 0
        self._due: list[
            tuple[int, int, Job]
        ] = []  # heap: tick, number of joining, first beam; some have left

    def join(self, beams: list[Job], tick: int) -> None:
        """Let the beams of a search decode together from this tick on."""
        first = beams[0]
        self.groups[first] = beams
        self._count += 1
        self._joined[first] = self._count, tick
        self._schedule(first, 1)

    def leave(self, job: Job) -> list[Job]:
        """Forget the search of a beam; return its beams, or nothing if it is forgotten already."""
        first = job.origin or job
        self._joined.pop(first, None)
        return self.groups.pop(first, [])

    def next_tick(self) -> int:
        """Return the tick before which beams next change places; NEVER if none do."""
        due = self._due
        while due:
            tick, number, first = due[0]
            joined = self._joined.get(first)
            if joined is not None and joined[0] == number:
                return tick
            heappop(due)
        return NEVER

    def reorder(self, tick: int) -> None:
        """Let all beams change places that do so before the step at this tick, in the order of joining."""
        while self.next_tick() <= tick:
            self.reordered = tick
            first = heappop(self._due)[2]
            beams, tokens = self.groups[first], tick - self._joined[first][1]
            sequences = []
            for beam in beams:
                assert beam.sequence is not None
                sequences.append(beam.sequence)
            parents = beam_parents(first.request.request_id, tokens, len(beams))
            self._manager.reorder_beams(sequences, parents)
            self._schedule(first, tokens + 1)

    def _schedule(self, first: Job, tokens: int) -> None:
        request, (number, joined) = first.request, self._joined[first]
        # a search of n tokens keeps n - 1, and is in its last step when it has n - 2
        at = next_reorder(request.request_id, tokens, request.output_tokens - 2, request.beam_width)
        if at != NEVER:
            heappush(self._due, (joined + at, number, first))


def beam_blocks(job: Job, manager: KVCacheManager) -> int:
    """Return the smallest pool in which a beam search finishes alone, whatever the rule of admission.

    None of its beams can wait for the others to end. And a full last block of the prompt that is cached is held beside
    the one that is computed for the last token's sake.
    """
    repeated = manager.reuse and job.target % manager.tokens_per_block == 0
    return job.final_blocks + repeated


def choose_with_beams(choose: ChooseVictim, running: dict[Job, None], manager: KVCacheManager) -> Job:
    """Choose a victim among those who are no search that has begun anew; without any, the one that started last."""
    others = {
        job: None for job in running if not (job.request.beam_width > 1 and (job.origin or job).preemptions)
    }
    return choose(others, manager) if others else last_started(running, manager)
