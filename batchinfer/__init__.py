"""Offline LLM batch inference for HPC: Parquet in, Parquet out, exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchinfer.types import Completion, SamplingParams

if TYPE_CHECKING:
    from batchinfer.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> object:
    """``from batchinfer import LLM`` loads torch; the commands that only look at files must not."""
    if name == "LLM":
        from batchinfer.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
