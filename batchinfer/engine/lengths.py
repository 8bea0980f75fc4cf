"""How long a sample will probably get: what admission reckons with, so that the batch is full without preemptions."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 2048
"""Finished samples that the estimate rests on: enough to be steady, few enough to follow a change in the input."""

ENOUGH = 64
"""Finished samples before the estimate is trusted. Short samples finish first, so an early mean is too low; until
then every sample is expected to use all of its max_tokens."""

MARGIN = 0.25
"""Standard deviations added to the mean: an estimate that is too low costs a recomputed sequence, one that is too high
only an emptier batch."""


class LengthPredictor:
    """Learns which share of ``max_tokens`` samples use. ``fixed_share`` above 0 takes the place of learning."""

    def __init__(self, fixed_share: float = 0.0):
        self._fixed = fixed_share
        self._shares: deque[float] = deque(maxlen=WINDOW)
        self._sum = 0.0
        self._squares = 0.0

    def finished(self, tokens: int, max_tokens: int) -> None:
        """A sample ended after ``tokens`` of the ``max_tokens`` that it might have used."""
        if len(self._shares) == WINDOW:
            oldest = self._shares[0]
            self._sum -= oldest
            self._squares -= oldest * oldest
        share = tokens / max_tokens
        self._shares.append(share)
        self._sum += share
        self._squares += share * share

    def expected(self, max_tokens: int) -> int:
        """Tokens that a new sample will probably generate, from 1 to ``max_tokens``."""
        return min(max_tokens, max(1, math.ceil(self._share() * max_tokens - 1e-6)))  # 3.0000001 is 3

    def _share(self) -> float:
        if self._fixed:
            return self._fixed
        count = len(self._shares)
        if count < ENOUGH:
            return 1.0
        mean = self._sum / count
        return mean + MARGIN * math.sqrt(max(0.0, self._squares / count - mean * mean))
