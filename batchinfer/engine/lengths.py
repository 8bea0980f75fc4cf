"""How long a sample will probably get: what admission reckons with, so that the batch is full without preemptions, and
what the order at the end of a job goes by.

Short samples finish first, so the mean of the finished ones is too low at the beginning of a job and whenever the input
changes. Those that still run know something too: that they are longer than they are now. The estimator for such
censored observations is that of Kaplan & Meier, "Nonparametric estimation from incomplete observations", J. Amer.
Statist. Assoc. 53 (1958).
"""

from __future__ import annotations

import math

import numpy as np

WINDOW = 2048
"""Finished samples that the estimate rests on: enough to be steady, few enough to follow a change in the input."""

ENOUGH = 16
"""Finished samples before an estimate is trusted, of all or of one group; until then every sample is expected to use
all of its max_tokens, or what all groups together do."""

MARGIN = 0.25
"""Standard deviations added to the mean: an estimate that is too low costs a recomputed sequence, one that is too high
only an emptier batch."""

FRESH = 16
"""An estimate is made anew after a sixteenth as many new samples as it rests on: it takes 0.1 ms, and a GPU finishes
ten thousand short samples a second."""


class LengthPredictor:
    """Learns which share of ``max_tokens`` samples use: those of a group (``Request.group``) once ENOUGH of it have
    finished, else all. ``fixed_share`` above 0 takes the place of learning."""

    def __init__(self, fixed_share: float = 0.0):
        self._fixed = fixed_share
        self._count = 0
        self._share = np.zeros(WINDOW)
        self._group = np.zeros(WINDOW, np.int64)
        self._running_share = np.zeros(0)
        self._running_group = np.zeros(0, np.int64)
        self._estimates: dict[int, float] = {}
        self._stale_at = 0

    def finished(self, tokens: int, max_tokens: int, group: int = 0) -> None:
        """A sample ended after ``tokens`` of the ``max_tokens`` that it might have used."""
        place = self._count % WINDOW
        self._share[place] = tokens / max_tokens
        self._group[place] = group
        self._count += 1
        if self._count >= self._stale_at:
            self._forget()

    def running(self, tokens: np.ndarray, max_tokens: np.ndarray, groups: np.ndarray) -> None:
        """What the samples under way have by now: int [N] each. Replaces what was said last."""
        self._running_share = tokens / np.maximum(1, max_tokens)
        self._running_group = groups.astype(np.int64)
        self._forget()

    def expected(self, max_tokens: int, group: int = 0) -> int:
        """Tokens that a new sample will probably generate, from 1 to ``max_tokens``."""
        share = self._fixed or self._estimate(group)
        return min(max_tokens, max(1, math.ceil(share * max_tokens - 1e-6)))  # 3.0000001 is 3

    def _forget(self) -> None:
        self._estimates.clear()
        self._stale_at = self._count + max(1, min(self._count, WINDOW) // FRESH)

    def _estimate(self, group: int) -> float:
        """The share that is expected, made once between two changes."""
        if group in self._estimates:
            return self._estimates[group]
        count = min(self._count, WINDOW)
        ended, running = self._share[:count], self._running_share
        if group:
            ended, running = ended[self._group[:count] == group], running[self._running_group == group]
        if len(ended) >= ENOUGH:
            mean, deviation = survival_moments(ended, running)
            share = mean + MARGIN * deviation
        else:
            share = self._estimate(0) if group else 1.0
        self._estimates[group] = share
        return share


def survival_moments(ended: np.ndarray, running: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a share in [0, 1], of which ``ended`` (float [N], N > 0) were observed and
    ``running`` (float [M]) are known to be exceeded. What no observation tells counts as 1: an estimate from few
    samples that ended early is high, not low."""
    shares, deaths = np.unique(ended, return_counts=True)
    at_risk = len(ended) - np.searchsorted(np.sort(ended), shares)
    at_risk += len(running) - np.searchsorted(np.sort(running), shares)
    survival = np.cumprod(1.0 - deaths / at_risk)
    mass = -np.diff(survival, prepend=1.0)
    mean = float(mass @ shares + survival[-1])
    square = float(mass @ shares**2 + survival[-1])
    return mean, math.sqrt(max(0.0, square - mean * mean))
