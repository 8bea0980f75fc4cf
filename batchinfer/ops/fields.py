"""The fields that every row of a SampleInput has, with their dtypes."""

from __future__ import annotations

import torch

SAMPLE_FIELDS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "position": torch.int32,
}
"""In the order in which the compiled samplers take their addresses."""
