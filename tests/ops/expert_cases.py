"""Kinds of mixtures of experts that backends are tested with: by name, what differs from Mixtral."""

from __future__ import annotations

from typing import Any

import torch

from batchinfer.ops import Clamp

ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"renormalise": True},
    "softmax of all": {"renormalise": False},
    "groups": {"renormalise": False, "groups": 4, "kept_groups": 2, "scale": 3.0},
    "sigmoid": {"renormalise": True, "scores": "sigmoid", "scale": 2.5},
    "sigmoid of groups": {"renormalise": True, "scores": "sigmoid", "groups": 3, "kept_groups": 2},
}
"""Choices are a multiple of 12, and six of them stand in the groups that are kept."""


def options_of(routing: str, choices: int, inner: int, width: int, biased: bool, seed: int) -> dict[str, Any]:
    """Of ``Experts``: the routing, its correction of scores that are sigmoids, and with ``biased`` what GPT-OSS has,
    a gate cut at limits that many values reach."""
    g = torch.Generator().manual_seed(seed)
    options = dict(ROUTINGS[routing])
    if options.get("scores") == "sigmoid":
        options["correction"] = torch.randn(choices, generator=g) / 2
    if biased:
        options["gate_up_bias"] = torch.randn(choices, 2 * inner, generator=g)
        options["down_bias"] = torch.randn(choices, width, generator=g)
        options["clamp"] = Clamp(1.702, 0.8)
    return options
