"""Synthetic workloads: seeded arrivals, lengths, and content that is shared the way prompts share it."""

from sim.workload.config import GENERATOR_VERSION, WorkloadConfig, WorkloadShape
from sim.workload.generator import generate
from sim.workload.lengths import LENGTH_MODELS

__all__ = ["GENERATOR_VERSION", "LENGTH_MODELS", "WorkloadConfig", "WorkloadShape", "generate"]
