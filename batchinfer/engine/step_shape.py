"""What decides the launches of a GPU's step, and the few sizes that small steps are filled up to. No torch.

A captured graph is replayed for every step of one :class:`StepShape`. To launch a layer's kernels one by one takes the
host 0.15 to 0.4 ms, so steps whose layers the device ends sooner wait for the host: decoding alone, nearly always, and
the small steps of a small model that have prompts or drafts in them. Those are filled up with rows that change nothing
(step_buffer.py) to sizes that come again; the device has the time for these rows anyway. Larger steps keep their
tokens: the host is ahead, and rows would cost what they compute. Their samples, few beside the tokens, take the same
sizes: for products of another number of rows cuBLAS may look for other kernels, for which the host waits until the step
under way ends. In a job's first seconds that held up every such step, and an H100 was idle for 4.8 to 5.5 % of 1.9 s of
Llama-3.2-1B with long shared prompts (1.3 to 1.7 % with these sizes).
"""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.engine.roofline import Costs
from batchinfer.models.model_spec import ModelSpec

LAUNCH_BOUND = 3e11
"""Floating-point operations in a layer that an H100 does in the 0.4 ms that a slow host's launch of it takes: 2,470
tokens of Llama-3.2-1B, all steps of Qwen3-0.6B, 690 tokens of Llama-3.1-8B. Chat-like lengths take the 8B 1.0 % less
time so than with 1.3e11, where the kernels of its steps of 512 tokens follow one another less closely."""

SLOW, NOT_SLOWER = 448, 512
"""Rows of which cuBLAS's products take longer than of more. On an H100 a step of Llama-3.1-8B has 14.0 ms of them with
the one, and 10.4 with the other; of Llama-3.2-1B 1.6 with both, of Qwen3-0.6B 1.1 with both."""


@dataclass(frozen=True)
class StepShape:
    """Rows of a step as it is launched. ``decode_only``: each sequence has one token, and it is sampled from.
    ``adapted``: some tokens have an adapter. ``copies``: pages that are copied. ``repeats``: the sizes are from the
    short list, so that the shape is worth a graph. ``sampled``: the sampler is part of it."""

    tokens: int
    samples: int
    decode_only: bool = False
    adapted: bool = False
    copies: int = 0
    repeats: bool = False
    sampled: bool = True


@dataclass(frozen=True)
class Limits:
    """``slots``, ``tokens``, ``samples``: the most that a step has. ``filled``: steps with at most so many tokens are
    filled up to sizes that repeat."""

    slots: int
    tokens: int
    samples: int
    filled: int

    @classmethod
    def of(cls, spec: ModelSpec, slots: int, tokens: int, samples: int) -> Limits:
        layer_flops = Costs.of(spec, 1).token_flops / spec.layers
        # The experts that a few tokens meet take the device longer than the launch, and rows may meet more of them.
        filled = 0 if spec.experts else min(tokens, int(LAUNCH_BOUND / layer_flops))
        return cls(slots, tokens, samples, filled)

    def shape(self, tokens: int, samples: int, decoding: int, adapted: bool = False) -> StepShape:
        """Of a step of so many tokens and samples, the first ``decoding`` sequences of which are past their
        prompts."""
        if tokens == samples == decoding:
            rows = decode_size(tokens, self.slots)
            return StepShape(rows, rows, True, adapted, repeats=True)
        if tokens > self.filled:
            return StepShape(tokens, mixed_size(samples, min(tokens, self.samples)), adapted=adapted)
        rows = mixed_size(tokens, self.filled)
        return StepShape(rows, mixed_size(samples, min(rows, self.samples)), False, adapted, repeats=True)


def decode_size(count: int, limit: int) -> int:
    """The rows that a step decoding ``count`` sequences has: few sizes, and little more work than asked for.

    Powers of two up to 16, then multiples of 16, of 32 from 128 on, and of 64 from 256 on but SLOW; never above
    ``limit``.
    """
    if count <= 16:
        return min(limit, 1 << max(0, count - 1).bit_length())
    step = 16 if count <= 128 else 32 if count <= 256 else 64
    return _multiple(count, step, limit)


def mixed_size(count: int, limit: int) -> int:
    """The same for the tokens, and for the samples, of other steps, where pairs of sizes have to come again: 0, 16, and
    from there on two sizes for each doubling (24, 32, 48, 64 ...), above 256 four (320, 384, 448, 512, 640 ...) but
    SLOW; never above ``limit``."""
    if count == 0:
        return 0
    power = 1 << max(4, (count - 1).bit_length())
    step = power if power <= 16 else power // 4 if power <= 256 else power // 8
    return _multiple(count, step, limit)


def _multiple(count: int, step: int, limit: int) -> int:
    size = -(-count // step) * step
    return min(limit, NOT_SLOWER if size == SLOW else size)
