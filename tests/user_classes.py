"""Classes as users write them, most of them wrong: the text of a module."""

CLASSES = """
import copy
import pickle

import numpy as np

from allocator.eviction import LRU
from sim.cluster.routing import LeastLoaded, RoutingPolicy
from sim.cost import RooflineCost, StepBatch


class Routing(RoutingPolicy):
    def choose(self, request, replicas):
        return self.first(replicas)

    def first(self, replicas):
        return replicas[len(replicas)]


class Missing(RoutingPolicy):
    def choose(self, request):
        return None


class Inherits(LeastLoaded):
    def __init__(self):
        pass

    def choose(self, request, replicas):
        return super().choose(request)


class Refuses(RoutingPolicy):
    def choose(self, request, replicas):
        raise ValueError("not this one")


class Policy(LRU):
    def victim(self, wanted):
        raise KeyError


class Unaware(LRU):
    def hit(self):
        pass


class Stops(LRU):
    def victim(self, wanted):
        return next(iter(()))


class StopsSplitting(LRU):
    def split(self, head, tail):
        raise StopIteration


class Undone(LRU):
    released = None


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(first)


class RaisesOdd(LRU):
    def victim(self, wanted):
        raise Odd("one", "two")


class Exits(LRU):
    def victim(self, wanted):
        raise SystemExit


class Looks(LRU):
    @property
    def released(self):
        raise KeyError("which")


class StopsRouting(RoutingPolicy):
    def choose(self, request, replicas):
        return next(replica for replica in replicas if replica is None)


class Cost:
    def __init__(self, setting):
        self.left = 5

    def step(self, batch: StepBatch):
        self.left -= 1
        return 10**9 // self.left

    def decode_affine(self, decode_sequences):
        return None


class Seconds(Cost):
    def step(self, batch):
        return 0.5


class Single(Cost):
    def decode_affine(self, decode_sequences):
        return 5


class Short(Cost):
    def step(self):
        return 1


class Negative(Cost):  # of prompts alone
    def step(self, batch):
        return -1 if batch.prefills else 10**9


class Never(Cost):
    def step(self, batch):
        return 10**25 if batch.prefills else 10**9


class Late(Cost):  # wrong for more than one sequence
    def step(self, batch):
        return 10**9

    def decode_affine(self, decode_sequences):
        return (10**9, 0) if decode_sequences == 1 else (1.5, 0)


class Shrinking(Late):
    def decode_affine(self, decode_sequences):
        return (10**9, 0) if decode_sequences == 1 else (10**9, -1)


class Windowed(Late):
    windows = (4096,)


class Window(Late):
    windows = 4096


class Unmade(RooflineCost):
    def __init__(self, setting):
        pass


class Exit(Cost):
    def step(self, batch):
        raise SystemExit(0)


class Unknown(Late):
    @property
    def windows(self):
        raise OSError("unknown")


class Hides(RooflineCost):
    windows = (512,)

    def __init__(self, setting):
        super().__init__(setting.model, setting.gpu)


class Inconsistent(Late):
    def decode_affine(self, decode_sequences):
        return 10**9, int(decode_sequences > 1)


class Integers(Cost):
    def step(self, batch):
        return np.int64(10**9 + batch.decode_context)

    def decode_affine(self, decode_sequences):
        return [np.int64(10**9), np.uint8(1)]


class Plain(Cost):
    def step(self, batch):
        return 10**9 + batch.decode_context

    def decode_affine(self, decode_sequences):
        return 10**9, 1

class Answers(LRU):
    def victim(self, wanted):
        extent, count = super().victim(wanted)
        return extent, float(count)


class Drains(LRU):
    drains_victims = 1


class Copies(LeastLoaded):
    def choose(self, request, replicas):
        for other in (copy.deepcopy(request), pickle.loads(pickle.dumps(request))):
            assert other.num_sequences == request.num_sequences and other is not request
        return super().choose(request, replicas)
"""
