"""Every architecture on a GPU: the logits of small random models against the CPU reference in float32."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from gpu.test_gpu_engine import BOUND, make_decoder, skip_what_triton_serves, step_logits
from models.drawn_models import FAMILIES, draw_config

from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.spec import load_spec
from batchinfer.ops.reference import ReferenceOps


def draw_spec(architecture: str, seed: int, folder: Path) -> ModelSpec:
    """The ``seed``-th of the random configs whose heads are of a width that the kernels take."""
    for number in itertools.count():
        config = draw_config(architecture, number)
        config.architectures = [architecture]
        config.save_pretrained(folder)
        spec = load_spec(str(folder))
        seed -= spec.head_dim % 16 == 0
        if seed < 0:
            return spec
    raise AssertionError


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("architecture", [pytest.param(a, marks=pytest.mark.parity("logits", a)) for a in FAMILIES])
@pytest.mark.feature("engine", "every architecture on CUDA: logits in float32 are the CPU's, to rounding")
@pytest.mark.hardware("logits of every architecture")
def test_logits_of(quick_gpu, architecture: str, seed: int, tmp_path: Path) -> None:
    """In bfloat16 so small a model says little: its rounding is 6 % of the logits, and routes tokens elsewhere."""
    spec = draw_spec(architecture, seed, tmp_path)
    skip_what_triton_serves(spec)
    want = step_logits(make_decoder(spec, ReferenceOps(), torch.float32))
    got = step_logits(make_decoder(spec, quick_gpu, torch.float32))
    assert (got - want).norm() <= BOUND[torch.float32] * want.norm()  # false for NaN
