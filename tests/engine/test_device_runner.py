"""The GPU's runner on the host's memory: steps that are filled up and captured give the tokens of steps that aren't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine.host_device import FilledOps, host_runner
from engine.tiny_engine import VOCAB, make_decoder, make_engine, random_prompts, run

from batchinfer.engine.engine import Engine
from batchinfer.engine.slots import STOPS
from batchinfer.models.decoder import Decoder
from batchinfer.models.lora import Grouped, Stacked
from batchinfer.types import Completion, Request, SamplingParams

PLAIN = SamplingParams(max_tokens=16, ignore_eos=True)
CASES = {
    "greedy": PLAIN,
    "samples": replace(PLAIN, n=3, temperature=1.0, top_p=0.9),
    "stop ids": replace(PLAIN, stop_token_ids=tuple(range(5, VOCAB, 6)), min_tokens=3),
    "logprobs": replace(PLAIN, logprobs=3, temperature=0.7, stop=("E", "f", "G")),
    "penalties": replace(PLAIN, repetition_penalty=1.3, frequency_penalty=0.5),
    "bad words": replace(PLAIN, bad_words=("A", "BC", "D"), n=2, temperature=1.0),
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


def same_tokens(one: dict[int, Completion], other: dict[int, Completion]) -> bool:
    def tokens(done: dict[int, Completion]) -> dict[int, list[list[int]]]:
        return {i: [sample.token_ids.tolist() for sample in done[i].samples] for i in sorted(done)}

    return tokens(one) == tokens(other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.feature("engine", "steps of a GPU filled up to sizes that repeat: the tokens of steps that aren't")
def test_filled_up_and_captured_steps(decoder: Decoder, case: str, options: dict[str, Any]) -> None:
    asked, given = requests(CASES[case]), {"page_size": 16} | options
    want = run(make_engine(decoder, **given), asked)
    engine = make_engine(decoder, make_runner=host_runner, **given)
    assert same_tokens(run(engine, asked), want)
    graphs = engine._runner._graphs
    if case in ("greedy", "samples"):
        assert any(shape.decode_only for shape in graphs)
        assert any(not shape.decode_only for shape in graphs)
        assert all(captured.graph.replays for captured in graphs.values())
    if case in ("penalties", "bad words", "logprobs"):
        assert any(not shape.sampled and captured.graph.replays for shape, captured in graphs.items())
    if options["lookup"] and case != "prompts scored":
        assert engine.stats().drafted_tokens > 0
    assert engine.stats().pages_used == 0
    engine.close()


def stopped_at(length: int) -> list[Request]:
    """Requests that a stop token ends, which makes them ``length`` tokens long with their prompts."""
    free = [Request(i, prompt, replace(PLAIN, max_tokens=60)) for i, prompt in enumerate(random_prompts(40))]
    done = run(make_engine(make_decoder(), page_size=16), free)
    asked = []
    for request in free:
        tokens = done[request.id].samples[0].token_ids.tolist()[: length - len(request.prompt)]
        if tokens and tokens[-1] not in tokens[:-1]:
            asked.append(replace(request, sampling=replace(request.sampling, stop_token_ids=(tokens[-1],))))
    return asked


@pytest.mark.feature("engine", "a GPU sees itself that a stop token has ended a sequence, and spares its attention")
def test_a_sequence_that_has_ended_attends_to_nothing() -> None:
    """And nobody finds what it would have written: here the stop token is the last of a page."""
    asked = stopped_at(48)
    assert len(asked) >= 5
    ops = FilledOps()
    engine = make_engine(make_decoder(ops=ops), make_runner=host_runner, page_size=16)
    done = run(engine, asked)
    assert all(completion.samples[0].finish_reason == "stop" for completion in done.values())
    assert ops.ended == len(asked)
    more = np.arange(5, 25, dtype=np.int32)
    whole = {r.id: np.concatenate([r.prompt, done[r.id].samples[0].token_ids, more]) for r in asked}
    assert all(len(prompt) == 48 + len(more) for prompt in whole.values())
    next_turn = [Request(100 + i, prompt, PLAIN) for i, prompt in whole.items()]
    got = run(engine, next_turn)
    assert engine.stats().cached_prompt_tokens >= 32 * len(asked)
    assert same_tokens(got, run(make_engine(make_decoder(), page_size=16), next_turn))
    engine.close()


@pytest.mark.parametrize(
    ("changes", "ended"),
    [
        ({}, True),
        ({"ignore": True}, False),
        ({"min_tokens": 60}, False),  # the token is banned until then
        ({"more": STOPS - 1}, True),
        ({"more": STOPS}, False),  # it is one that the device is not told of: the host stops it
        ({"as_string": True}, False),
    ],
    ids=str,
)
def test_what_ends_a_sequence_on_the_device(changes: dict[str, Any], ended: bool) -> None:
    request = stopped_at(48)[0]
    (stop,) = request.sampling.stop_token_ids
    params = replace(request.sampling, min_tokens=changes.get("min_tokens", 0))
    if "ignore" in changes:
        params = replace(params, stop_token_ids=())
    if "as_string" in changes:
        params = replace(params, stop_token_ids=(), stop=(chr(33 + stop),))
    if "more" in changes:
        params = replace(params, stop_token_ids=(*range(VOCAB - changes["more"], VOCAB), stop))
    request = replace(request, sampling=params)
    ops = FilledOps()
    engine = make_engine(make_decoder(ops=ops), make_runner=host_runner, page_size=16)
    got = run(engine, [request])
    assert ops.ended == ended
    assert same_tokens(got, run(make_engine(make_decoder(), page_size=16), [request]))
    engine.close()


@pytest.mark.feature("engine", "a form's masks are made by threads while the GPU is at the step's layers")
def test_forms_among_other_rows() -> None:
    pytest.importorskip("llguidance")
    kinds = [replace(PLAIN, ignore_eos=False, regex="[A-F]{3}(-[0-9]{2}){1,2}"), PLAIN, CASES["penalties"]]
    kinds = [replace(kind, temperature=2.0) for kind in kinds]
    asked = [Request(i, prompt, kinds[i % 3], seed=i) for i, prompt in enumerate(random_prompts(14))]
    want = run(make_engine(make_decoder(), page_size=16), asked)
    engine = make_engine(make_decoder(ops=FilledOps()), make_runner=host_runner, page_size=16)
    order = record_order(engine)
    assert same_tokens(run(engine, asked), want)
    assert any(sample.finish_reason == "stop" for completion in want.values() for sample in completion.samples)
    masks = [i for i, (name, step) in enumerate(order) if name == "masks" and step > 1]
    assert masks
    assert all(order[i - 2][0] == "layers" and order[i - 1] == ("tokens", order[i][1] - 1) for i in masks)
    engine.close()


def record_order(engine: Engine) -> list[tuple[str, int]]:
    """What is begun from now on, and in the how manieth step: "layers", "tokens" (they are taken) and "masks"."""
    order: list[tuple[str, int]] = []
    begun = {"layers": 0, "tokens": 0}

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*given: Any) -> Any:
            if name in begun:
                begun[name] += 1
            order.append((name, begun["layers" if name == "masks" else name]))
            return call(*given)

        return do

    runner = engine._runner
    runner._update_page_table = recorded("layers", runner._update_page_table)
    runner.finish = recorded("tokens", runner.finish)
    engine._constraints.allow = recorded("masks", engine._constraints.allow)
    return order


@pytest.mark.feature("LoRA", "steps of a GPU with adapters are graphs too: the tokens of the CPU's groups of rows")
def test_adapters_in_captured_steps() -> None:
    """Two adapters and the base model in a batch; and steps of the base model alone, which have graphs of their own."""
    mixed = [replace(r, adapter=(None, 0, 1)[r.id % 3]) for r in requests(PLAIN)]
    alone = [replace(r, id=100 + r.id) for r in requests(replace(PLAIN, n=2, temperature=1.0))]
    engine = make_engine(make_decoder(adapters=Grouped), page_size=16, adapters=2)
    want = run(engine, mixed) | run(engine, alone)
    assert not same_tokens(want, run(make_engine(make_decoder(), page_size=16), requests(PLAIN)))
    decoder = make_decoder(ops=FilledOps(), adapters=Stacked)
    engine = make_engine(decoder, make_runner=host_runner, page_size=16, adapters=2)
    assert same_tokens(run(engine, mixed) | run(engine, alone), want)
    shapes = {(shape.decode_only, shape.adapted) for shape in engine._runner._graphs}
    assert shapes == {(False, False), (False, True), (True, False), (True, True)}
    engine.close()
