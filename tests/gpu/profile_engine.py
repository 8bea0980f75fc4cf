"""Where the time of the engine's steps goes on a GPU: all steps of a workload by their size, and kernels and host calls
by their sum over some of them.

python tests/gpu/profile_engine.py MODEL_FOLDER WORKLOAD [COUNT [FIRST_STEP [STEPS [key=value of EngineConfig ...]]]]

With filled=0 among the options steps with prompts or drafts are not captured, with filled=N those of up to N tokens.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.loading import load_engine
from batchinfer.engine.no_text import NoText
from batchinfer.feed import steps
from batchinfer.types import Request
from batchinfer.workloads import make_requests

CUDA: dict[str, Any] = {"max_slots": 1024, "max_step_tokens": 8192, "max_model_len": 4096}


SIZES = (16, 64, 128, 256, 512, 1024, 4096, 2**20)


def by_size(engine: Engine, requests: list[Request]) -> None:
    """Run them all, and print how many steps of each size there were and what they took."""
    rows = {size: [0, 0.0, 0.0, 0.0] for size in SIZES}
    runner, before, under_way = engine._runner, dict(engine._runner.seconds), []
    for _ in steps(engine, requests):
        now, in_flight = dict(runner.seconds), list(engine._in_flight)
        if in_flight and in_flight[-1] not in under_way:
            row = rows[next(size for size in SIZES if in_flight[-1].step.num_tokens <= size)]
            row[0] += 1
            row[1] += now["launch"] - before["launch"]
            row[2] = max(row[2], now["launch"] - before["launch"])
        if under_way and under_way[0] not in in_flight:
            row = rows[next(size for size in SIZES if under_way[0].step.num_tokens <= size)]
            row[3] += now["device"] - before["device"]
        before, under_way = now, in_flight
    print("  tokens <= | steps | launch, s | longest, ms | device, s | a step, ms")
    for size, (count, launch, longest, device) in rows.items():
        if count:
            print(
                f"  {size} | {count} | {launch:.2f} | {longest * 1e3:.1f} | {device:.2f} | {device / count * 1e3:.2f}"
            )


def by_kernel(engine: Engine, requests: list[Request], first: int, count: int) -> None:
    """Steps ``first`` to ``first + count``: kernels, and what the host's calls took."""
    under_way = steps(engine, requests)
    for _ in range(first):
        next(under_way)
    before = dict(engine.stats().step_seconds)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            next(under_way)
    parts = {name: (value - before[name]) / count for name, value in engine.stats().step_seconds.items()}
    print(f"  {engine.stats().running} running, per step (profiled, so the host is slower):")
    print("  " + ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in parts.items()))
    averages = profiler.key_averages()
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in kernels)
    print(f"  kernels: {total / count / 1e3:.2f} ms a step")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:14]:
        share = e.self_device_time_total / total
        print(f"  {share:6.1%} {e.self_device_time_total / count:8.1f} us {e.count / count:6.1f} x  {e.key[:90]}")
    for e in sorted(averages, key=lambda e: -e.self_cpu_time_total)[:8]:
        print(f"  host {e.self_cpu_time_total / count:8.1f} us {e.count / count:6.1f} x  {e.key[:60]}")


def main() -> None:
    folder, workload, *rest = sys.argv[1:]
    rows, first, count = (int(rest[i]) if len(rest) > i else default for i, default in enumerate((0, 100, 20)))
    kinds = {f.name: type(f.default) for f in fields(EngineConfig)} | {"filled": int}
    given = {key: kinds[key](value) for key, _, value in (option.partition("=") for option in rest[3:])}
    filled = given.pop("filled", None)
    tokenizer: Any = NoText()
    print(f"{folder} {workload} {rows or ''}")
    for look in (by_size, lambda engine, requests: by_kernel(engine, requests, first, count)):
        engine = load_engine(ModelConfig(folder, True), EngineConfig(**(CUDA | given)), tokenizer=tokenizer)
        if filled is not None:
            engine._runner.limits = replace(engine._runner.limits, filled=filled)
        print(f"  steps with prompts or drafts are captured up to {engine._runner.limits.filled} tokens")
        look(engine, make_requests(workload, engine.vocab_size, rows))
        engine.close()


if __name__ == "__main__":
    main()
