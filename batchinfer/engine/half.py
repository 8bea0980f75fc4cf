"""What engine.dtype=auto is on a device, and who has float16."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from batchinfer.config import EngineConfig
from batchinfer.ops import Ops
from batchinfer.types import ExitCode, JobError


def with_dtype(engine: EngineConfig, ops: Ops, wide: bool = False) -> EngineConfig:
    """The configuration with engine.dtype decided. ``wide``: the model's residual stream outgrows float16. JobError
    (64) for float16 where there are no kernels for it."""
    if engine.dtype == "fp16" and "float16" in ops.lacks:
        raise JobError(
            f"engine.dtype=fp16 is for GPUs, and {type(ops).__name__} has not got it: set engine.dtype=auto, or bf16",
            ExitCode.USAGE,
        )
    if engine.dtype != "auto":
        return engine
    kind = ops.device.type
    name = torch.get_device_module(ops.device).get_device_name(ops.device) if kind == "xpu" else ""
    return replace(engine, dtype=default_dtype(kind, name, wide))


def default_dtype(kind: str, name: str, wide: bool) -> Literal["bf16", "fp16"]:
    """float16 on Intel's Arc, as vLLM has it on the A770 for the accuracy of its bfloat16, unless the model is too
    ``wide`` for it."""
    return "fp16" if kind == "xpu" and "Arc" in name and not wide else "bf16"
