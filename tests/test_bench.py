"""``batchinfer bench`` over a workload: a folder with a config.json is all it needs."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from models.tiny_models import COMMON

from batchinfer.__main__ import main
from batchinfer.bench import process_age


@pytest.mark.feature("commands", "bench: named workloads on random weights, without tokenizer or input")
def test_a_workload_needs_no_weights_and_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = COMMON | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["model.dummy_weights=true", "bench.workload=samples", "bench.rows=2", "bench.repeat=2"]
    engine = ["engine.device=cpu", "engine.threads=1", "engine.kv_cache_gb=0.05", "engine.dtype=fp32"]
    assert main(["bench", f"model.path={tmp_path}", *options, *engine]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["repetition"] for line in lines] == [0, 1]
    start, later = (line["seconds_to_first_token"] for line in lines)
    assert lines[0]["load_seconds"] < start < process_age() - lines[0]["seconds"]
    assert later is None
    for line in lines:
        assert line["name"] == "samples"
        assert line["requests"] == 2
        assert line["output_tokens"] == 2 * 16 * 256
        assert 500 <= line["prompt_tokens"] <= 700
        assert line["cached_prompt_share"] > 0.8  # 15 of 16 samples find their prompt
        assert line["steps"] >= 256
        assert line["output_tokens_per_s"] == pytest.approx(line["output_tokens"] / line["seconds"], rel=0.01)
        assert {"schedule", "output"} < line["seconds_by_part"].keys()
        assert line["peak_device_mb"] == 0 < line["peak_pages_used"]
        assert line["cached_prompt_share"] <= line["possible_cached_share"] < 15 / 16
        assert line["prefill"]["steps"] + line["decode"]["steps"] == line["steps"]
        for kind in ("prefill", "decode"):
            assert line[kind]["roofline_share"] > 0  # above 1 where others took the CPUs while it was measured
            assert 0 < line[kind]["device_seconds"] < line["seconds"]
        assert 0 < line["device_idle_share"] < 1
        assert line["ms_per_step"].keys() == line["seconds_by_part"].keys()
        assert line["measured_gflop_per_s"] > 0 < line["measured_gb_per_s"]


def test_the_age_of_a_process_counts_from_its_start() -> None:
    before = time.perf_counter()
    with subprocess.Popen(["sleep", "30"]) as child:
        after = time.perf_counter()
        time.sleep(0.3)
        least, age, most = time.perf_counter() - after, process_age(child.pid), time.perf_counter() - before
        child.kill()
    assert least - 0.02 < age < most + 0.02  # starts are told in hundredths
