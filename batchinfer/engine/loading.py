"""From a configuration to a running engine: model directory, ops, KV pool, scheduler."""

from __future__ import annotations

import torch

from batchinfer import ops as op_list
from batchinfer._engine import Scheduler
from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.lengths import LengthPredictor
from batchinfer.engine.memory import free_memory, num_pages
from batchinfer.engine.runner import Runner
from batchinfer.models.decoder import Decoder, KVCache
from batchinfer.models.spec import load_spec
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.models.weights import load_weights
from batchinfer.types import ExitCode, JobError

DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_engine(model: ModelConfig, engine: EngineConfig, *, threads: int = 0, ranks_on_node: int = 1) -> Engine:
    """An engine with its weights in memory.

    ``threads`` 0: the CPUs that this process may use. The automatic KV pool is this rank's share of the node's free
    memory. Raises JobError: a model that can't be used (64), memory for not even one page or a device that the
    extension was not compiled for (69).
    """
    try:
        ops = op_list.load("cpu" if engine.device == "auto" else engine.device, threads)
    except RuntimeError as error:
        raise JobError(f"engine.device={engine.device}: {error}", ExitCode.UNFIT) from None
    spec = load_spec(model.path)
    dtype = DTYPES[engine.dtype]
    max_len = spec.resolve_length(engine.max_model_len)
    decoder = Decoder(
        spec,
        load_weights(model.path, spec, dtype),
        ops,
        dtype,
        max_positions=max_len,
        max_step_tokens=engine.max_step_tokens,
        max_samples=engine.max_slots,
    )
    pages = engine.num_pages or num_pages(
        KVCache.bytes_per_page(spec, engine.page_size, dtype),
        engine.page_size,
        engine.max_slots,
        max_len,
        asked_gb=engine.kv_cache_gb,
        free_bytes=free_memory() // ranks_on_node,
    )
    scheduler = Scheduler(
        num_pages=pages,
        page_size=engine.page_size,
        max_slots=engine.max_slots,
        max_step_tokens=engine.max_step_tokens,
        max_seq_len=max_len,
        prefix_cache=engine.prefix_cache,
    )
    return Engine(
        scheduler,
        Runner(decoder, ops, pages, engine.page_size, engine.max_slots),
        load_tokenizer(model.path),
        LengthPredictor(engine.expected_share),
        max_seq_len=max_len,
        max_slots=engine.max_slots,
        num_pages=pages,
        vocab_size=spec.vocab_size,
    )
