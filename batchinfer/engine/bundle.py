"""``batchinfer bundle``: the Triton kernels that an engine's steps would launch, compiled for GPUs that are not here.

The decoder goes through steps of many sizes on tensors without memory, so the weights are not read and any model fits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from batchinfer.config import Config
from batchinfer.engine.kv_dtype import DTYPES, kv_dtype
from batchinfer.engine.step_buffer import StepBuffer
from batchinfer.engine.step_shape import StepShape
from batchinfer.models.decoder import Decoder, ScoreInput
from batchinfer.models.encoder_spec import encoder_spec
from batchinfer.models.files import ModelError
from batchinfer.models.layers import Copies
from batchinfer.models.layout import layout
from batchinfer.models.packing import pack
from batchinfer.models.pool_spec import pool_spec
from batchinfer.models.spec import load_spec
from batchinfer.ops.device import DeviceOps
from batchinfer.types import ExitCode, JobError

META = torch.device("meta")


def main(config: Config) -> int:
    """Compile for ``bundle.targets`` and write ``bundle.path``. JobError: a model that is no decoder or a target that
    Triton does not know (64), a node without Triton or a C compiler (69)."""
    try:
        from batchinfer.ops.triton.bundle import build_modules, write_bundle
        from batchinfer.ops.triton.compiling import CompilingOps
        from batchinfer.ops.triton.targets import TARGETS
    except ImportError as error:
        raise JobError(f"Triton 3.4 or newer is needed ({error}): pip install triton", ExitCode.UNFIT) from None
    wanted = config.bundle.targets
    if unknown := [name for name in wanted if name not in TARGETS] or not wanted:
        given = unknown[0] if wanted else "[]"
        text = f"bundle.targets={given}: give some of {', '.join(TARGETS)}, as in bundle.targets=[sm_80,sm_90]"
        raise JobError(text, ExitCode.USAGE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1"}
        for name in wanted:
            ops = CompilingOps(TARGETS[name])
            take_steps(config, ops)
            try:
                build_modules(ops.kernels, TARGETS[name].gpu.backend, Path(cache))
            except (OSError, RuntimeError) as error:
                print(f"batchinfer: {name}: a node that uses this bundle needs a C compiler still: {error}", flush=True)
            print(f"{name}: {len(ops.kernels)} kernels", flush=True)
        count = write_bundle(Path(config.bundle.path), Path(cache), wanted)
    print(f"{config.bundle.path}: {count} kernels; use it with engine.kernels={config.bundle.path}")
    return ExitCode.COMPLETE


def take_steps(config: Config, ops: DeviceOps) -> None:
    """Steps of every kind that the engine of this configuration can take: prompts and decoding, with every option of
    sampling and without."""
    model, engine = config.model, config.engine
    if encoder_spec(model.path) is not None:
        raise ModelError(f"{model.path} is an encoder: its kernels are torch's, and there is nothing to compile ahead")
    spec, pool = load_spec(model.path), pool_spec(config)
    spec = spec if pool is None else spec.with_head(pool.head)
    spec = spec.with_token_head(len(pool.tokens)) if pool is not None and pool.tokens else spec
    dtype = DTYPES[engine.dtype]
    shapes = layout(spec).targets.items()
    weights = ((n, torch.empty(s, dtype=dtype if len(s) == 2 else torch.float32, device=META)) for n, s in shapes)
    decoder = Decoder(
        spec,
        pack(spec, weights, ops),
        ops,
        dtype,
        max_positions=spec.resolve_length(engine.max_model_len),
        max_step_tokens=engine.max_step_tokens,
        max_samples=min(engine.max_slots * (1 + engine.lookup), engine.max_step_tokens),
        pooling=None if pool is None else pool.pooling,
        kv_dtype=kv_dtype(engine),
    )
    cache = decoder.new_cache(1, engine.page_size)
    columns = -(-decoder.max_positions // engine.page_size)
    page_table = torch.empty(engine.max_slots, columns, dtype=torch.int32, device=META)
    buffer = StepBuffer(engine.max_step_tokens, engine.max_slots, decoder.max_samples, _empty_bytes)
    for tokens in _sizes(engine.max_step_tokens):
        samples = min(tokens, decoder.max_samples)
        for decoding in {False, tokens <= engine.max_slots}:
            step = buffer.step_input(StepShape(tokens, samples, decode_only=decoding), page_table)
            if decoder.pooling:
                decoder.pool(step, cache)
                continue
            logits, _ = decoder.forward(step, cache)
            for extras in _extras(samples):
                ops.sample(logits, buffer.sample_input(samples, **extras))
    if not decoder.pooling:
        row = torch.empty(1, dtype=torch.int32, device=META)
        step = buffer.step_input(StepShape(1, 1), page_table)
        decoder.forward(replace(step, score=ScoreInput(row, row.long()), copies=Copies(row, row)), cache)


def _sizes(most: int) -> Iterator[int]:
    """Of steps: how many tokens the experts of a mixture get decides which kernel multiplies them."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _extras(samples: int) -> Iterator[dict[str, Any]]:
    """The optional fields of SampleInput: none of them, and all that kernels work on."""
    numbers = torch.empty(samples, device=META)
    words = torch.empty(samples, dtype=torch.int32, device=META)
    start = torch.empty(samples + 1, dtype=torch.int32, device=META)
    yield {}
    yield {
        "penalties": (numbers,) * 3,
        "history_ids": words,
        "history_start": start,
        "history_prompt": words,
        "banned_ids": words,
        "banned_start": start,
        "num_logprobs": torch.ones(samples, dtype=torch.int32),
    }


def _empty_bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=META)
