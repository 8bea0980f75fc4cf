"""Texts as vectors: how the steps' pooled states become what a request is answered with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from batchinfer._engine import Step
from batchinfer.engine.open_work import Sequence
from batchinfer.types import PoolSpec, Request, Sample

SMALLEST_NORM = 1e-12
"""A shorter vector is not brought to length 1: as in torch.nn.functional.normalize."""


def trimmed(prompt: np.ndarray, pad_id: int | None) -> np.ndarray:
    """The prompt without the padding at its end; one token stays."""
    if pad_id is None:
        return prompt
    rest = np.flatnonzero(prompt != pad_id)
    return prompt[: rest[-1] + 1 if len(rest) else 1]


def compute_from(request: Request, pool: PoolSpec | None) -> dict[str, int]:
    """From which position on the scheduler has to compute a prompt that the cache may have. The cache holds keys and
    values, not the states that scores and means are made of. Nothing: all but the last may come from the cache."""
    if request.scored_from is not None:
        return {"compute_from": request.scored_from - 1}
    return {"compute_from": 0} if pool is not None and pool.pooling != "last" else {}


def record_states(step: Step, states: np.ndarray, pool: PoolSpec, sequences: Mapping[int, Sequence]) -> None:
    """Add what a step gave (:meth:`batchinfer.models.decoder.Decoder.pool`) to its sequences' states."""
    if pool.pooling == "last":
        for seq_id, state in zip(step.sample_seq.tolist(), states, strict=True):
            if seq_id in sequences:  # not abandoned meanwhile
                sequences[seq_id].state = state.astype(np.float64)
        return
    begins = step.positions[step.q_start[:-1]] == 0  # also of a sequence that was preempted and computed anew
    for i, seq_id in enumerate(step.seq_ids.tolist()):
        sequence = sequences.get(seq_id)
        if sequence is None:
            continue
        if begins[i]:
            sequence.state = states[i].astype(np.float64)
        elif pool.pooling == "mean":
            sequence.state += states[i]


def pooled_sample(state: np.ndarray, tokens: int, pool: PoolSpec) -> Sample:
    """The answer of a text of so many tokens, all of them computed."""
    vector = finish(state / tokens if pool.pooling == "mean" else state, pool)
    return Sample(np.zeros(0, np.int32), "", "pooled", vector=vector)


def finish(values: np.ndarray, pool: PoolSpec) -> np.ndarray:
    """float32 [width] of pooled values float64."""
    values = values[: pool.width]
    if pool.activation == "normalise":
        values = values / max(float(np.linalg.norm(values)), SMALLEST_NORM)
    elif pool.activation == "softmax":
        values = np.exp(values - values.max())
        values /= values.sum()
    elif pool.activation == "sigmoid":
        values = 0.5 * (1 + np.tanh(0.5 * values))  # 1 / (1 + exp(-x)) without its overflow
    return values.astype(np.float32)
