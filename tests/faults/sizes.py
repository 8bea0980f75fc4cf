"""How much is tried: quick sizes in `make test`, long ones in `make faults`; and what was tried, for the table."""

from __future__ import annotations

import os
import random
from collections import Counter

LONG = os.environ.get("BATCHINFER_FAULTS") == "long"
SEED = int(os.environ.get("BATCHINFER_FAULTS_SEED", "0"))
"""Of everything that is random here. What depends on time (when a kill hits) is not repeated by it."""

tally: Counter[str] = Counter()
"""What was tried and held, by kind."""


def size(quick: int, long: int) -> int:
    return long if LONG else quick


def generator(name: str) -> random.Random:
    """A generator of its own for each test, so that they do not depend on each other."""
    return random.Random(f"{SEED} {name}")
