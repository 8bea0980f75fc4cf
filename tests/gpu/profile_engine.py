"""Where the time of the engine's steps goes on a GPU: kernels by their sum, over some steps of a workload.

python tests/gpu/profile_engine.py MODEL_FOLDER WORKLOAD [FIRST_STEP [STEPS [key=value of EngineConfig ...]]]
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from batchinfer.bench import NoText
from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.workloads import make_requests

CUDA: dict[str, Any] = {"max_slots": 1024, "max_step_tokens": 8192, "max_model_len": 4096}


def main() -> None:
    folder, workload, *rest = sys.argv[1:]
    first, steps = (int(rest[i]) if len(rest) > i else default for i, default in enumerate((100, 20)))
    kinds = {f.name: type(f.default) for f in fields(EngineConfig)}
    given = {key: kinds[key](value) for key, _, value in (option.partition("=") for option in rest[2:])}
    tokenizer: Any = NoText()
    engine = load_engine(ModelConfig(folder, True), EngineConfig(**(CUDA | given)), tokenizer=tokenizer)
    waiting = make_requests(workload, engine.vocab_size)[::-1]

    def run(count: int) -> None:
        for _ in range(count):
            while waiting and engine.wants_more:
                engine.add(waiting.pop())
            engine.step()

    run(first)
    before = dict(engine.stats().step_seconds)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run(steps)
    parts = {name: (value - before[name]) / steps for name, value in engine.stats().step_seconds.items()}
    print(f"{folder} {workload}: {engine.stats().running} running, per step (profiled, so the host is slower):")
    print("  " + ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in parts.items()))
    events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in events)
    print(f"  kernels: {total / steps / 1e3:.2f} ms a step")
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:18]:
        share = e.self_device_time_total / total
        print(f"  {share:6.1%} {e.self_device_time_total / steps:8.1f} us {e.count / steps:6.1f} x  {e.key[:110]}")
    engine.close()


if __name__ == "__main__":
    main()
