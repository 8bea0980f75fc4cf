"""``batchinfer bench``: the engine alone, timed on the rows of a Parquet file; one JSON line per repetition."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
from collections.abc import Sequence

from batchinfer.config import Config
from batchinfer.data.columns import check_input
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import read_chunk
from batchinfer.data.tables import list_inputs
from batchinfer.engine.engine import Engine
from batchinfer.engine.loading import load_engine
from batchinfer.types import Chunk, EngineStats, Request, SamplingParams

WARM_UP = SamplingParams(max_tokens=4, ignore_eos=True)


def main(config: Config) -> int:
    """Time ``bench.repeat`` runs over the input's first ``bench.rows`` rows (0: all). Reading, tokenising and loading
    the weights are not in the figure; they are reported beside it. The prefix cache starts empty each time."""
    for repetition in range(config.bench.repeat):
        start = time.perf_counter()
        engine = load_engine(config.model, config.engine, threads=config.engine.threads)
        load_seconds = time.perf_counter() - start
        requests = _requests(config, engine)
        _run(engine, [dataclasses.replace(r, prompt=r.prompt[::-1].copy(), sampling=WARM_UP) for r in requests[:2]])
        before = dataclasses.replace(engine.stats())
        start = time.perf_counter()
        peak_pages = _run(engine, requests)
        seconds = time.perf_counter() - start
        line = {
            "name": config.input.path,
            "model": config.model.path,
            "repetition": repetition,
            "requests": len(requests),
            "load_seconds": round(load_seconds, 2),
            **_rates(before, engine.stats(), seconds),
            "peak_pages_used": peak_pages,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "engine": dataclasses.asdict(config.engine),
            "max_tokens": config.sampling.max_tokens,
            "host": platform.node(),
        }
        print(json.dumps(line), flush=True)
        engine.close()
    return 0


def _requests(config: Config, engine: Engine) -> list[Request]:
    files = list_inputs(config.input.path)
    check_input(files, config.input)
    builder = PromptBuilder(
        config.input, config.sampling, engine.tokenizer, engine.max_seq_len, run_seed=config.sampling.seed
    )
    limit = config.bench.rows or sum(file.rows for file in files)
    requests: list[Request] = []
    for file in files:
        chunk = Chunk(index=0, file=file.ordinal, start=0, rows=min(file.rows, limit - len(requests)))
        if chunk.rows > 0:
            rows = builder.build(read_chunk(file, chunk, None), chunk)
            requests += [row for row in rows if isinstance(row, Request)]
    return requests


def _run(engine: Engine, requests: Sequence[Request]) -> int:
    """Run all requests to their end; the most KV pages that were in use after a step."""
    waiting, peak = list(reversed(requests)), 0
    while waiting or engine.num_open:
        while waiting and engine.wants_more:
            engine.add(waiting.pop())
        engine.step()
        peak = max(peak, engine.stats().pages_used)
    return peak


def _rates(before: EngineStats, after: EngineStats, seconds: float) -> dict[str, object]:
    prompt, output, cached = (
        getattr(after, name) - getattr(before, name)
        for name in ("prompt_tokens", "output_tokens", "cached_prompt_tokens")
    )
    return {
        "seconds": round(seconds, 3),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "prompt_tokens_per_s": round(prompt / seconds, 1),
        "output_tokens_per_s": round(output / seconds, 1),
        "cached_prompt_share": round(cached / prompt, 4) if prompt else 0.0,
        "preemptions": after.preemptions - before.preemptions,
        "steps": after.steps - before.steps,
        "seconds_by_part": {k: round(v - before.step_seconds[k], 3) for k, v in after.step_seconds.items()},
    }
