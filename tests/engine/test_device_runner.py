"""The GPU's runner on the host's memory: steps that are filled up and captured give the tokens of steps that aren't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine.host_device import FilledOps, host_device  # noqa: F401
from engine.tiny_engine import VOCAB, make_decoder, make_engine, random_prompts, run

from batchinfer.engine.device_runner import DeviceRunner
from batchinfer.models.decoder import Decoder
from batchinfer.types import Request, SamplingParams

pytestmark = pytest.mark.usefixtures("host_device")

PLAIN = SamplingParams(max_tokens=16, ignore_eos=True)
CASES = {
    "greedy": PLAIN,
    "samples": replace(PLAIN, n=3, temperature=1.0, top_p=0.9),
    "stop ids": replace(PLAIN, stop_token_ids=tuple(range(5, VOCAB, 6)), min_tokens=3),
    "logprobs": replace(PLAIN, logprobs=3, temperature=0.7, stop=("E", "f", "G")),
    "penalties": replace(PLAIN, repetition_penalty=1.3, frequency_penalty=0.5),
    "prompts scored": replace(PLAIN, prompt_logprobs=2, max_tokens=3),
}
OPTIONS: list[dict[str, Any]] = [
    {"lookup": 0},
    {"lookup": 0, "num_pages": 24, "max_slots": 6, "max_step_tokens": 40, "expected_share": 0.01},
    {"lookup": 4},
]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder(ops=FilledOps())


def requests(params: SamplingParams) -> list[Request]:
    """Of several lengths, so that prompts come while others decode."""
    lengths = [params.max_tokens - i % 3 for i in range(14)]
    return [
        Request(i, prompt, replace(params, max_tokens=lengths[i]), seed=i)
        for i, prompt in enumerate(random_prompts(14))
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.feature("engine", "steps of a GPU filled up to sizes that repeat: the tokens of steps that aren't")
def test_filled_up_and_captured_steps(decoder: Decoder, case: str, options: dict[str, Any]) -> None:
    asked, given = requests(CASES[case]), {"page_size": 16} | options
    want = run(make_engine(decoder, **given), asked)
    engine = make_engine(decoder, make_runner=DeviceRunner, **given)
    got = run(engine, asked)
    for request in asked:
        for one, other in zip(want[request.id].samples, got[request.id].samples, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
    graphs = engine._runner._graphs
    if case in ("greedy", "samples"):
        assert any(shape.decode_only for shape in graphs)
        assert any(not shape.decode_only for shape in graphs)
        assert all(captured.graph.replays for captured in graphs.values())
    if options["lookup"] and case != "prompts scored":
        assert engine.stats().drafted_tokens > 0
    assert engine.stats().pages_used == 0
    engine.close()
