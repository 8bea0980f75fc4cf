"""From a configuration to a running engine: model directory, ops, KV pool, scheduler."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from batchinfer import ops as op_list
from batchinfer.types import ExitCode, JobError, PoolSpec

try:
    from batchinfer._engine import Scheduler
except ImportError as error:  # BATCHINFER_DEVICE=none, or a folder of sources without a build
    raise JobError(
        f"this installation has no compiled engine ({error}): it plans, verifies and reports. Rebuild with: "
        "BATCHINFER_DEVICE=cpu pip install --force-reinstall --no-deps .",
        ExitCode.UNFIT,
    ) from None

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.encoder_engine import EncoderEngine
from batchinfer.engine.engine import Engine
from batchinfer.engine.half import with_dtype
from batchinfer.engine.kv_dtype import DTYPES, check_kv_dtype, kv_dtype
from batchinfer.engine.lengths import LengthPredictor
from batchinfer.engine.memory import GIB, num_pages, trim_heap
from batchinfer.engine.roofline import Costs
from batchinfer.engine.runner import make_runner
from batchinfer.engine.trace import Trace
from batchinfer.models.decoder import Decoder, KVCache
from batchinfer.models.dense import load_dense
from batchinfer.models.encoder import BertEncoder
from batchinfer.models.encoder_spec import EncoderSpec, encoder_spec
from batchinfer.models.files import ModelError, OwnReading, Source
from batchinfer.models.lora import Grouped, Stacked, load_adapter, pack_adapters
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.modernbert import ModernBertEncoder
from batchinfer.models.packing import Suiting, Weights, bytes_of, most_bytes, pack, packable
from batchinfer.models.scheme import Scheme
from batchinfer.models.spec import load_spec
from batchinfer.models.tokenizer import Tokenizer, load_tokenizer
from batchinfer.models.weights import dummy_weights, load_weights, with_token_head
from batchinfer.ops import Ops
from batchinfer.ops.shared import Filling, can_share, mapped

OTHER_TASKS = "use task=embed, or task=classify or task=rerank of a model with a classification head"


def load_engine(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    threads: int = 0,
    rank_on_node: int = 0,
    ranks_on_node: int = 1,
    tokenizer: Tokenizer | None = None,
    source: Source | None = None,
    pool: PoolSpec | None = None,
) -> Engine | EncoderEngine:
    """An engine with its weights in memory.

    ``threads`` 0: the CPUs that this process may use. On GPUs, rank i of a node takes its i-th visible device. The
    automatic KV pool is this rank's share of the node's free memory, or what is free on its device. ``tokenizer``: in
    place of the model's own. ``source``: whence the weights come, None for this rank's own reading. ``pool``: it makes
    vectors of texts, and generates nothing. Raises JobError: a
    model or a setting that can't be used (64), a device that the build or the node lacks, or memory for not even one
    page (69).
    """
    try:
        ops = op_list.load(engine.device, threads, rank=rank_on_node, ops=engine.ops, kernels=engine.kernels)
    except RuntimeError as error:
        raise JobError(f"engine.device={engine.device}: {error}", ExitCode.UNFIT) from None
    encoder = encoder_spec(model.path)
    if encoder is not None:
        engine = with_dtype(engine, ops)
        return _encoder_engine(encoder, ops, model, engine, tokenizer, source, pool)
    trace = Trace(engine.profile) if engine.profile else None
    spec = load_spec(model.path)
    if spec.head != "tokens" and pool is None:
        raise ModelError(f"{model.path} has no LM head, without which nothing is generated or scored: {OTHER_TASKS}")
    spec = spec if pool is None else spec.with_head(pool.head)
    engine = with_dtype(engine, ops, wide=spec.embed_scale != 1.0)
    check_kv_dtype(engine, ops)
    dtype = DTYPES[engine.dtype]
    max_len = spec.resolve_length(engine.max_model_len)
    adapters = [load_adapter(folder, spec) for _, folder in sorted(model.adapters.items())]
    adapted = pack_adapters(adapters, ops, dtype, Grouped if ops.device.type == "cpu" else Stacked)
    tokens = () if pool is None else pool.tokens
    weights = _packed(model, engine.weights, spec, dtype, ops, source or OwnReading(), tokens, adapted)
    spec = spec.with_token_head(len(tokens)) if tokens else spec
    decoder = Decoder(
        spec,
        weights,
        ops,
        dtype,
        max_positions=max_len,
        max_step_tokens=engine.max_step_tokens,
        max_samples=min(engine.max_slots * (1 + engine.lookup), engine.max_step_tokens),
        pooling=None if pool is None else pool.pooling,
        adapters=adapted,
        kv_dtype=kv_dtype(engine),
    )
    runner = make_runner(decoder, engine.page_size, engine.max_slots)
    pages = engine.num_pages or num_pages(
        KVCache.bytes_per_page(spec, engine.page_size, kv_dtype(engine)),
        engine.page_size,
        engine.max_slots,
        max_len,
        asked_gb=engine.kv_cache_gb,
        budget=runner.cache_budget(ranks_on_node),
    )
    pages = runner.allocate(pages)
    if pool is not None:
        max_len += 1  # for the scheduler's next token, which is never computed
    scheduler = Scheduler(
        num_pages=pages,
        page_size=engine.page_size,
        max_slots=engine.max_slots,
        max_step_tokens=engine.max_step_tokens,
        max_seq_len=max_len,
        prefix_cache=engine.prefix_cache,
        lookup=engine.lookup,
    )
    tokenizer = tokenizer or load_tokenizer(model.path)
    trim_heap()
    return Engine(
        scheduler,
        runner,
        tokenizer,
        LengthPredictor(engine.expected_share),
        max_seq_len=max_len,
        max_slots=engine.max_slots,
        num_pages=pages,
        page_size=engine.page_size,
        vocab_size=spec.vocab_size,
        weight_bytes=bytes_of(weights),
        trace=trace,
        costs=_costs(spec, engine, bytes_of(weights)),
        pool=pool,
        dense=() if pool is None else load_dense(model.path, pool.dense),
        adapters=len(adapters),
        flat_steps=spec.experts is None,
        threads=threads or len(os.sched_getaffinity(0)),
    )


def _costs(spec: ModelSpec, engine: EngineConfig, weight_bytes: int) -> Costs:
    """What steps take of the model. Of quantised weights they read all but the embedding."""
    itemsize = DTYPES[engine.dtype].itemsize
    costs = replace(Costs.of(spec, itemsize), kv_bytes=KVCache.bytes_per_page(spec, 1, kv_dtype(engine)))
    if engine.weights == "auto" and spec.scheme is None:
        return costs
    return costs.quantised(weight_bytes - itemsize * spec.vocab_size * spec.width)


def _encoder_engine(
    spec: EncoderSpec,
    ops: Ops,
    model: ModelConfig,
    engine: EngineConfig,
    tokenizer: Tokenizer | None,
    source: Source | None,
    pool: PoolSpec | None,
) -> EncoderEngine:
    if pool is None:
        raise ModelError(f"{model.path} is an encoder ({spec.architecture}), which generates nothing: {OTHER_TASKS}")
    for key, given in (("model.adapters", model.adapters), ("model.dummy_weights", model.dummy_weights)):
        if given:
            raise ModelError(f"{key}={given} is not supported with an encoder ({spec.architecture})")
    dtype = DTYPES[engine.dtype]
    weights = _packed(model, engine.weights, spec, dtype, ops, source or OwnReading())
    spec = replace(spec, head=pool.head)
    modern = spec.modern
    encoder = (
        BertEncoder(spec, weights, ops, dtype)
        if modern is None
        else ModernBertEncoder(spec, modern, weights, ops, dtype)
    )
    return EncoderEngine(
        encoder,
        tokenizer or load_tokenizer(model.path),
        pool,
        max_len=spec.resolve_length(engine.max_model_len),
        max_slots=engine.max_slots,
        max_step_tokens=engine.max_step_tokens,
        weight_bytes=bytes_of(weights),
        dense=load_dense(model.path, pool.dense),
    )


def _packed(
    model: ModelConfig,
    form: str,
    spec: ModelSpec | EncoderSpec,
    dtype: torch.dtype,
    ops: Ops,
    source: Source,
    tokens: Sequence[int] = (),
    adapted: Collection[str] = (),
) -> dict[str, Any]:
    """The weights by name, packed for ``ops``: by this rank, or by another one of its node. ``form``:
    engine.weights. ``tokens``: the only ones that the LM head is asked for, if there are some. ``adapted``: names of
    those that adapters add to."""
    scheme = spec.scheme if isinstance(spec, ModelSpec) else None
    groups = scheme is not None and "groups of codes" not in ops.lacks
    keep = form == "keep" or (form == "auto" and groups)
    if form != "auto" and "quantised weights" in ops.lacks and not (keep and groups):
        raise JobError(
            f"engine.weights={form} is for the CPU, and {type(ops).__name__} has not got it yet: set "
            "engine.device=cpu, or engine.weights=auto",
            ExitCode.USAGE,
        )
    if can_share(ops) and (fd := source.take()) is not None:
        try:
            return mapped(fd, ops)
        except (OSError, ValueError) as error:
            _say(f"{error}: this rank packs its own")
        finally:
            os.close(fd)
    if model.dummy_weights:
        weights = dummy_weights(spec, dtype, ops.device)
    else:
        weights = load_weights(model.path, spec, dtype, source, keep)
    suiting = Suiting(ops, dtype)
    weights = suiting(weights)
    if tokens:
        spec, weights = spec.with_token_head(len(tokens)), with_token_head(weights, spec, tokens)
    packed = _pack(spec, weights, dtype, ops, source, form == "int8", adapted)
    if scheme is not None and not model.dummy_weights:
        _say(_how_kept(scheme, suiting, keep, dtype, bytes_of(packed)))
    return packed


def _pack(
    spec: ModelSpec | EncoderSpec,
    weights: Weights,
    dtype: torch.dtype,
    ops: Ops,
    source: Source,
    to_int8: bool,
    adapted: Collection[str],
) -> dict[str, Any]:
    """Pack them, for the other ranks of the node too where these wait for them."""
    if not (can_share(ops) and source.shares):
        return pack(spec, weights, ops, to_int8, adapted)
    try:
        filling = Filling(ops, most_bytes(spec, dtype))
    except OSError as error:
        _say(f"there is no memory to share the weights in ({error}): every rank packs its own")
        return pack(spec, weights, ops, to_int8, adapted)
    for one in packable(spec, weights, to_int8, adapted):
        filling.put(one.name, one.tensor, one.packed, one.gated)
    fd = filling.seal()
    found = mapped(fd, ops)
    source.give(fd)
    return found


def _how_kept(scheme: Scheme, suiting: Suiting, keep: bool, dtype: torch.dtype, size: int) -> str:
    """What has become of a quantised checkpoint, of which ``size`` bytes are in memory."""
    in_dtype = str(dtype).removeprefix("torch.")
    if not keep:
        what = f"are dequantised to {in_dtype}"
    elif suiting.dense:
        total = suiting.kept + suiting.dense
        what = f"stay codes in {suiting.kept} of {total} matrices, the others are dequantised to {in_dtype}"
    else:
        what = "stay codes"
    return f"the model's weights, {scheme}, {what}: {size / GIB:.2f} GiB with all others"


def _say(text: str) -> None:
    print(f"batchinfer: {os.uname().nodename}: {text}", file=sys.stderr, flush=True)
