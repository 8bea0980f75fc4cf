"""What the KV cache is kept in: engine.kv_dtype, and the backends that have it."""

from __future__ import annotations

import torch

from batchinfer.config import EngineConfig
from batchinfer.ops import Lack, Ops
from batchinfer.ops.quantized import FLOAT8
from batchinfer.types import ExitCode, JobError

DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Of engine.dtype; half.py decides what auto is."""

KV_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "fp8": FLOAT8}


def kv_dtype(engine: EngineConfig) -> torch.dtype:
    """The cache's dtype."""
    return DTYPES[engine.dtype] if engine.kv_dtype == "auto" else KV_DTYPES[engine.kv_dtype]


def check_kv_dtype(engine: EngineConfig, ops: Ops) -> None:
    """Raises JobError (64) where the backend has no cache of that kind."""
    need = _needed(kv_dtype(engine), DTYPES[engine.dtype])
    if need in ops.lacks:
        raise JobError(
            f"engine.kv_dtype={engine.kv_dtype} with engine.dtype={engine.dtype} is for the CPU, and "
            f"{type(ops).__name__} has not got it yet: set engine.device=cpu, or engine.kv_dtype=auto, or fp8 with "
            "engine.dtype=bf16",
            ExitCode.USAGE,
        )


def _needed(kept: torch.dtype, computed: torch.dtype) -> Lack | None:
    """What a backend must not lack for this cache beside activations of that dtype."""
    if kept is computed or (kept is FLOAT8 and computed is torch.bfloat16):
        return None
    named: dict[torch.dtype, Lack] = {torch.int8: "int8 KV cache", FLOAT8: "float8 KV cache beside float32"}
    return named.get(kept, "KV cache of another dtype")
