"""``batchinfer bench``: the engine alone, timed on the rows of a Parquet file or on a workload of random token ids; one
JSON line per repetition."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchinfer.config import Config
from batchinfer.data.columns import check_input
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import read_chunk
from batchinfer.data.tables import list_inputs
from batchinfer.engine.kv_dtype import DTYPES
from batchinfer.engine.loading import load_engine
from batchinfer.engine.no_text import NoText
from batchinfer.engine.planner import shared_tokens
from batchinfer.engine.probe import measure
from batchinfer.engine.roofline import Ceilings, roofline_share
from batchinfer.feed import steps
from batchinfer.models.pool_spec import pool_spec
from batchinfer.types import Chunk, EngineStats, Request, StepWork
from batchinfer.workloads import make_requests

if TYPE_CHECKING:
    from batchinfer.engine.engine import Engine

WARM_UP_PROMPT, WARM_UP_TOKENS, WARM_UP_SPREAD = 64, 4, 128
"""The warm-up's sequences end one after the other, over so many steps."""


def main(config: Config) -> int:
    """Time ``bench.repeat`` runs. Reading, tokenising and loading the weights are not in the figure; they are reported
    beside it, and how old the process was when the first engine had its first token. Each run has a fresh engine that
    is warmed up on other prompts and then forgets them: its prefix cache is empty, and of its KV cache the pages that
    the warm-up wrote have their memory, which took 1.9 s a GB on a virtual machine. What the device reaches at most is
    measured once the first engine has left it."""
    named = config.bench.workload != "none"
    dtype = DTYPES[config.engine.dtype]
    ceilings: Ceilings | None = None
    pool = pool_spec(config)
    for repetition in range(config.bench.repeat):
        start = time.perf_counter()
        engine = load_engine(
            config.model,
            config.engine,
            threads=config.engine.threads,
            tokenizer=NoText() if named else None,  # type: ignore[arg-type]
            pool=pool,
        )
        load_seconds = time.perf_counter() - start
        if named:
            requests = make_requests(config.bench.workload, engine.vocab_size, config.bench.rows)
        else:
            requests = _requests(config, engine)
        first_token = _warm(engine, _warm_up(requests, config.engine.max_slots))
        engine.forget_prefixes()
        before = copy.deepcopy(engine.stats())
        start = time.perf_counter()
        peak_pages = _run(engine, requests, config.engine.reorder)
        seconds = time.perf_counter() - start
        stats = engine.stats()
        line = {
            "name": config.bench.workload if named else config.input.path,
            "model": config.model.path,
            "repetition": repetition,
            "requests": len(requests),
            "load_seconds": round(load_seconds, 2),
            "seconds_to_first_token": None if repetition else round(first_token, 2),
            "weights_mb": stats.weight_bytes >> 20,
            **_rates(before, stats, seconds),
            "possible_cached_share": _possible(requests, config.engine.page_size),
            "device_idle_share": _idle_share(before, stats),
            "peak_pages_used": peak_pages,
            "pages": stats.pages_total,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "peak_device_mb": stats.device_bytes >> 20,
            "engine": dataclasses.asdict(config.engine),
            "max_tokens": max(request.sampling.max_tokens for request in requests),
            "host": platform.node(),
        }
        engine.close()
        ceilings = ceilings or measure(config.engine, dtype)
        line |= {
            "prefill": _against_roofline(stats.prefill - before.prefill, ceilings),
            "decode": _against_roofline(stats.decode - before.decode, ceilings),
            "measured_gflop_per_s": round(ceilings.flops / 1e9, 1),
            "measured_gb_per_s": round(ceilings.bandwidth / 1e9, 2),
        }
        print(json.dumps(line), flush=True)
    return 0


def _warm_up(requests: Sequence[Request], max_slots: int) -> list[Request]:
    """Prompts that share nothing with the measured ones, enough to run at the batch size that the measured ones reach,
    and at the smaller ones on the way out: what is compiled, captured or loaded at first use is not in the figure."""
    count = min(max_slots, sum(request.sampling.samples for request in requests))
    return [
        Request(
            request.id,
            request.prompt[: -WARM_UP_PROMPT - 1 : -1].copy(),
            dataclasses.replace(request.sampling, n=1, max_tokens=WARM_UP_TOKENS + WARM_UP_SPREAD * i // count),
            seed=i,
        )
        for i, request in enumerate(itertools.islice(itertools.cycle(requests), count))
    ]


def _requests(config: Config, engine: Engine) -> list[Request]:
    files = list_inputs(config.input.path)
    check_input(files, config.input)
    builder = PromptBuilder.of(config, engine.tokenizer, engine.max_seq_len)
    limit = config.bench.rows or sum(file.rows for file in files)
    requests: list[Request] = []
    for file in files:
        chunk = Chunk(index=0, file=file.ordinal, start=0, rows=min(file.rows, limit - len(requests)))
        if chunk.rows > 0:
            rows = builder.build(read_chunk(file, chunk, None), chunk)
            requests += [row for row in rows if isinstance(row, Request)]
    return requests


def _run(engine: Engine, requests: Sequence[Request], reorder: bool) -> int:
    """Run all requests to their end; the most KV pages that were in use after a step."""
    return max((engine.stats().pages_used for _ in steps(engine, requests, reorder)), default=0)


def _warm(engine: Engine, requests: Sequence[Request]) -> float:
    """Run all requests to their end; how old the process was when the first token, or vector, was there."""
    first = 0.0
    for done in steps(engine, requests, reorder=False):
        if not first and (done or engine.stats().output_tokens):
            first = process_age()
    return first


def process_age(pid: int | str = "self") -> float:
    """Seconds since a process was started, to the hundredth: imports and all that came before are part of it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may have spaces in it
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the boot; field 22 in proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _rates(before: EngineStats, after: EngineStats, seconds: float) -> dict[str, object]:
    """Prompt tokens count once for a request; the cached share is of what its samples need."""
    prompt, needed, output, cached = (
        getattr(after, name) - getattr(before, name)
        for name in ("prompt_tokens", "needed_prompt_tokens", "output_tokens", "cached_prompt_tokens")
    )
    return {
        "seconds": round(seconds, 3),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "prompt_tokens_per_s": round(prompt / seconds, 1),
        "output_tokens_per_s": round(output / seconds, 1),
        "cached_prompt_share": round(cached / needed, 4) if needed else 0.0,
        "preemptions": after.preemptions - before.preemptions,
        "steps": after.steps - before.steps,
        "ms_per_step": {
            k: round(1000 * (v - before.step_seconds[k]) / max(1, after.steps - before.steps), 3)
            for k, v in after.step_seconds.items()
        },
        "seconds_by_part": {k: round(v - before.step_seconds[k], 3) for k, v in after.step_seconds.items()},
    }


def _possible(requests: Sequence[Request], page_size: int) -> float:
    """The cached share that a cache of unlimited size would reach."""
    prompts = [request.prompt for request in requests for _ in range(request.sampling.samples)]
    return round(shared_tokens(prompts, page_size) / max(1, sum(map(len, prompts))), 4)


def _against_roofline(work: StepWork, ceilings: Ceilings) -> dict[str, float]:
    """Steps of one kind, the time the device took for them, and the share of it that no device could have saved."""
    return {
        "steps": work.steps,
        "tokens": work.tokens,
        "device_seconds": round(work.seconds, 3),
        "roofline_share": round(roofline_share(work, ceilings), 4),
    }


def _idle_share(before: EngineStats, after: EngineStats) -> float:
    """Of the time from the first request in the engine to the last step, that in which the device computed none."""
    idle = after.device_idle - before.device_idle
    busy = sum(getattr(after, kind).seconds - getattr(before, kind).seconds for kind in ("prefill", "decode"))
    return round(idle / max(idle + busy, 1e-9), 4)
