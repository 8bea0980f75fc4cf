"""An engine whose kernels are all in a bundle: python bundled_engine.py MODEL BUNDLE TARGET

Steps go through the step loop of a GPU, and what it would launch is looked up in place of being launched. Ends with an
error if a kernel or a C module has to be compiled.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from engine.tiny_engine import make_engine, run
from gpu.backend import HostAccelerator
from triton import knobs
from triton.compiler import ASTSource

from batchinfer.engine.device_runner import DeviceRunner
from batchinfer.models.decoder import Decoder
from batchinfer.models.packing import pack
from batchinfer.models.spec import load_spec
from batchinfer.models.weights import dummy_weights
from batchinfer.ops.triton.bundle import use_bundle
from batchinfer.ops.triton.compiling import CompilingOps
from batchinfer.ops.triton.targets import TARGETS
from batchinfer.types import Request, SamplingParams

CPU = torch.device("cpu")
PLAIN = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PARAMS = (
    PLAIN,
    SamplingParams(temperature=0.8, top_p=0.9, n=2, max_tokens=9, ignore_eos=True),
    SamplingParams(
        temperature=0.0, max_tokens=9, logprobs=3, repetition_penalty=1.3, stop_token_ids=(7,), min_tokens=5
    ),
)


class LookingOps(CompilingOps):
    def _empty(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return self.zeros(shape, dtype)  # of what no kernel fills, tokens must be possible ones


def forbidden(*args: Any, **options: Any) -> None:
    raise AssertionError("a kernel is compiled that should be in the bundle")


def main(model: str, bundle: str, target: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        use_bundle(Path(bundle), Path(cache))
        ASTSource.make_ir = forbidden
        ops, spec = LookingOps(TARGETS[target], "cpu"), load_spec(model)
        weights = pack(spec, dummy_weights(spec, torch.bfloat16, CPU), ops)
        sizes = {"max_positions": spec.max_positions, "max_step_tokens": 1024, "max_samples": 256}
        decoder = Decoder(spec, weights, ops, torch.bfloat16, **sizes)
        engine = make_engine(
            decoder,
            make_runner=lambda *given: DeviceRunner(*given, HostAccelerator()),
            page_size=16,
            max_slots=256,
            max_step_tokens=1024,
        )
        random = np.random.default_rng(1)
        prompts = [random.integers(2, 60, random.integers(1, 90)).astype(np.int32) for _ in range(40)]
        done = run(engine, [Request(i, prompt, PARAMS[i % 3], seed=i) for i, prompt in enumerate(prompts)])
        assert all(completion.error is None for completion in done.values())
        source = Path(triton.__file__).parent / "backends/nvidia/driver.c"
        print(len(ops.kernels), "kernels,", Path(knobs.build.impl("cuda_utils", str(source), cache, [], [], [])).name)


if __name__ == "__main__":
    main(*sys.argv[1:])
