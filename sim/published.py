"""Published models of a step's duration, to compare the roofline with. Each satisfies sim.cost.StepCost."""

from __future__ import annotations

from sim.cost import StepBatch

_PS_PER_MS = 10**9


class DistServeCost:
    """The linear model that DistServe's authors fitted to OPT-13B on an A100, in milliseconds:

        prefill  22.05 + 0.1405 · ΣL + 8.08e-6 · ΣL²
        decode   23.48 + 5.93e-4 · Σcontext + 0.0607 · sequences

    Zhong et al., DistServe, OSDI 2024; the coefficients are those of the profile published with its simulator, for
    batches below 95 sequences. It knows no other model and no other GPU. L is a prompt's length; of a chunk that
    ends at c tokens, n of them new, the square is c² − (c − n)², so that the chunks of a prompt add up to the whole.
    DistServe runs the phases apart, so a step that does both takes the sum.
    """

    DECODE_BASE_PS = 23_480_000_000
    DECODE_TOKEN_PS = 593_000
    DECODE_SEQUENCE_PS = 60_700_000
    PREFILL_BASE_PS = 22_050_000_000
    PREFILL_TOKEN_PS = 140_500_000
    PREFILL_SQUARE_PS = 8_080

    def step(self, batch: StepBatch) -> int:
        """Return the duration of a step, picoseconds."""
        total = 0
        if batch.prefills:
            total += self.PREFILL_BASE_PS
            for new_tokens, context in batch.prefills:
                square = context * context - (context - new_tokens) * (context - new_tokens)
                total += self.PREFILL_TOKEN_PS * new_tokens + self.PREFILL_SQUARE_PS * square
        if batch.decode_sequences:
            base, slope = self.decode_affine(batch.decode_sequences)
            total += base + slope * batch.decode_context
        return total

    def decode_affine(self, decode_sequences: int) -> tuple[int, int]:
        """Return the base and the slope per key of a decode-only step."""
        base = self.DECODE_BASE_PS + self.DECODE_SEQUENCE_PS * decode_sequences
        return (base if decode_sequences else 0), self.DECODE_TOKEN_PS


class DynamoCost:
    """The polynomials of the mocker in NVIDIA Dynamo, in milliseconds:

        prefill  4.21e-7 · n² + 0.01518 · n + 16.5            n new tokens of the step
        decode   −25.74 · p² + 54.01 · p + 5.74               p share of the pool's tokens that are attended to

    They stand for one engine that its authors profiled, whatever the model here; a step that does both takes the
    sum. p can pass 1 where sequences share blocks, and counts as 1 there. Quadratic, so decode steps are not affine.

    Raises ValueError if the pool holds no token.
    """

    def __init__(self, pool_tokens: int) -> None:
        if pool_tokens < 1:
            raise ValueError(f"pool_tokens ({pool_tokens}) must be at least 1")
        self._pool_tokens = pool_tokens

    def step(self, batch: StepBatch) -> int:
        """Return the duration of a step, picoseconds."""
        milliseconds = 0.0
        if batch.prefills:
            tokens = sum(new_tokens for new_tokens, _ in batch.prefills)
            milliseconds += 4.21e-7 * tokens * tokens + 0.01518 * tokens + 16.5
        if batch.decode_sequences:
            share = min(batch.decode_context / self._pool_tokens, 1.0)
            milliseconds += -25.74 * share * share + 54.01 * share + 5.74
        return round(milliseconds * _PS_PER_MS)

    def decode_affine(self, decode_sequences: int) -> None:
        """Return None: every step has to be asked for."""
        return
