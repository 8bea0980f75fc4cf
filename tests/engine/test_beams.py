"""Beam search in the engine: beside other requests, in steps of any shape, interrupted, refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from engine.test_ahead import LaggingRunner
from engine.test_scoring import truth
from engine.tiny_engine import EOS, VOCAB, LetterTokenizer, make_decoder, make_engine, random_prompts, run

from batchinfer.engine.beams import BeamSearch
from batchinfer.types import Completion, ErrorCode, Logprobs, Request, SamplingParams

BEAMS = SamplingParams(max_tokens=10, beam_width=3, n=2, stop_token_ids=(4, 5, 6))
TIGHT = {"num_pages": 30, "max_slots": 4, "max_step_tokens": 7, "expected_share": 0.01}


def requests() -> list[Request]:
    """Every third samples as usual."""
    params = [BEAMS, replace(BEAMS, beam_width=5, n=1, length_penalty=0.0), SamplingParams(max_tokens=8, temperature=1)]
    return [Request(i, prompt, params[i % 3], seed=i) for i, prompt in enumerate(random_prompts(9))]


def facts(done: dict[int, Completion]) -> list[Any]:
    def of(completion: Completion) -> list[Any]:
        return [(s.token_ids.tolist(), s.text, s.finish_reason) for s in completion.samples]

    return [(i, done[i].prompt_tokens, done[i].error, of(done[i])) for i in sorted(done)]


@pytest.mark.parametrize(
    "options", [TIGHT, {"prefix_cache": False}, {"lookup": 4}, {"make_runner": LaggingRunner}], ids=str
)
def test_what_is_found_does_not_depend_on_the_steps(options: dict[str, Any]) -> None:
    expected = run(make_engine(make_decoder()), requests())
    engine = make_engine(make_decoder(), **options)
    assert facts(run(engine, requests())) == facts(expected)
    assert engine.num_open == 0
    texts = [sample for i in range(9) if i % 3 < 2 for sample in expected[i].samples]
    assert {sample.finish_reason for sample in texts} == {"stop", "length"}
    for sample in texts:
        ended = sample.finish_reason == "stop"
        assert (sample.token_ids[-1] in (EOS, 4, 5, 6)) == ended
        assert sample.text == LetterTokenizer().decode_batch([sample.token_ids[: -1 if ended else None]])[0]


def test_a_search_as_wide_as_all_texts_finds_the_best() -> None:
    """Of three tokens each, over four tokens that are far likelier than others: by the sum of the model's own."""
    rng = np.random.default_rng(0)
    search = BeamSearch(16, 3, (), length_penalty=1.0)
    tables = {(): rng.standard_normal(4)}
    for length in (1, 2):
        tables |= {text: rng.standard_normal(4) for text in product(range(4), repeat=length)}
    while not search.done:
        search.advance([options(tables[beam.tokens]) for beam in search.running])
    sums = {t: sum(tables[t[:i]][t[i]] for i in range(3)) for t in product(range(4), repeat=3)}
    best = sorted(sums, key=sums.__getitem__, reverse=True)[:16]
    assert [beam.tokens for beam in search.finished] == best
    np.testing.assert_allclose([beam.score for beam in search.finished], [sums[t] / 3 for t in best], rtol=1e-5)


def options(scores: np.ndarray) -> Logprobs:
    """Those of one token after another one, most likely first, and places that nothing fills."""
    order = np.argsort(-scores)
    ids = np.array([[9] * 5, [*order, -1]], np.int32)
    return Logprobs(np.zeros(2, np.float32), ids, np.array([[0] * 5, [*scores[order], -np.inf]], np.float32))


def test_scores_are_the_models() -> None:
    """The search's sums against a pass over the whole text."""
    prompt = random_prompts(1)[0]
    search = BeamSearch(3, 5, (), 0.0)
    while not search.done:
        asked = [truth(np.concatenate([prompt, beam.tokens]).astype(np.int32))[-1] for beam in search.running]
        tops = [row.topk(search.options) for row in asked]
        search.advance([Logprobs(np.zeros(1), t.indices.numpy()[None], t.values.numpy()[None]) for t in tops])
    params = SamplingParams(max_tokens=5, beam_width=3, n=3, ignore_eos=True, length_penalty=0.0)
    (done,) = run(make_engine(make_decoder()), [Request(0, prompt, params)]).values()
    assert [tuple(s.token_ids.tolist()) for s in done.samples] == [beam.tokens for beam in search.finished]


def test_given_up_and_interrupted() -> None:
    engine = make_engine(make_decoder())
    asked = requests()[:3]
    for request in asked:
        engine.add(request)
    for _ in range(3):
        assert engine.step() == []
    assert engine.num_open == 3
    assert [state.id for state in engine.unfinished()] == [2]  # a search begins anew
    dropped = engine.abandon(0)
    assert (dropped.id, dropped.samples, dropped.prompt_tokens) == (0, (), len(asked[0].prompt))
    assert engine.num_open == 2
    done = {c.id: c for c in _finish(engine)}
    expected = run(make_engine(make_decoder()), asked)
    assert facts(done) == facts({i: expected[i] for i in (1, 2)})
    with pytest.raises(KeyError):
        engine.abandon(0)


def _finish(engine: Any) -> list[Completion]:
    done = []
    while engine.num_open:
        done += engine.step()
    return done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_width": 33}, "beam_width=33 is not allowed: beam_width must lie in [0, 32]"),
        ({"beam_width": 13}, "beam_width=13 is not allowed: with 4 tokens that end a text it may be 12 at most"),
        ({"n": 4}, "n=4 is not allowed: beam_width=3 finds no more texts"),
        ({"temperature": 0.5}, "temperature and beam_width are both given"),
        ({"stop": ("a",)}, "stop and beam_width are both given"),
        ({"logprobs": 1}, "logprobs and beam_width are both given"),
        ({"length_penalty": float("nan")}, "length_penalty=nan is not allowed"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    asked = [Request(0, np.array([5], np.int32), replace(BEAMS, **changes)), requests()[0]]
    done = run(make_engine(make_decoder()), [replace(request, id=i) for i, request in enumerate(asked)])
    assert done[0].error is not None
    assert done[0].error.code is ErrorCode.BAD_SAMPLING
    assert message in done[0].error.message
    assert done[1].error is None


def test_a_vocabulary_with_fewer_tokens_than_options() -> None:
    search = BeamSearch(VOCAB, 2, ())
    search.advance([options(np.array([1.0, 0.5, 0.2, 0.1]))])
    assert [beam.tokens for beam in search.running] == [(0,), (1,), (2,), (3,)]
