"""Texts as vectors: how the steps' pooled states become what a request is answered with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as TypeSequence

import numpy as np

from batchinfer._engine import Step
from batchinfer.engine.open_work import Sequence
from batchinfer.types import PoolSpec, Sample

SMALLEST_NORM = 1e-12
"""A shorter vector is not brought to length 1: as in torch.nn.functional.normalize."""

Layers = TypeSequence[Callable[[np.ndarray], np.ndarray]]


def trimmed(prompt: np.ndarray, pool: PoolSpec | None) -> np.ndarray:
    """The prompt without the padding at its end, if that is to be left out; one token stays."""
    if pool is None or pool.pad_id is None:
        return prompt
    rest = np.flatnonzero(prompt != pool.pad_id)
    return prompt[: rest[-1] + 1 if len(rest) else 1]


def cache_rules(adapter: int | None, scored_from: int | None, pool: PoolSpec | None) -> dict[str, int]:
    """What of a prompt the scheduler may take from the cache. That holds keys and values, not the states of which
    scores and means are made; and those of one adapter are of no use to another."""
    rules = {"family": 0 if adapter is None else adapter + 1}
    if scored_from is not None:
        rules["compute_from"] = scored_from - 1
    elif pool is not None and pool.pooling != "last":
        rules["compute_from"] = 0
    return rules


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


def pooled_sample(state: np.ndarray, tokens: int, pool: PoolSpec, dense: Layers = ()) -> Sample:
    """The answer of a text of so many tokens, all of them computed."""
    vector = finish(state / tokens if pool.pooling == "mean" else state, pool, dense)
    return Sample(np.zeros(0, np.int32), "", "pooled", vector=vector)


def finish(values: np.ndarray, pool: PoolSpec, dense: Layers = ()) -> np.ndarray:
    """float32 [width] of pooled values float64; ``dense``: the layers that the pool names."""
    for layer in dense:
        values = layer(values)
    values = values[: pool.width]
    if pool.activation == "normalise":
        values = values / max(float(np.linalg.norm(values)), SMALLEST_NORM)
    elif pool.activation == "softmax":
        values = np.exp(values - values.max())
        values /= values.sum()
    elif pool.activation == "sigmoid":
        values = 0.5 * (1 + np.tanh(0.5 * values))  # 1 / (1 + exp(-x)) without its overflow
    return values.astype(np.float32)
