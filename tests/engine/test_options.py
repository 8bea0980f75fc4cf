"""Settings that restrict, rank, show or cut what a sample is, on the tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine.test_ahead import LaggingRunner
from engine.test_scoring import truth
from engine.tiny_engine import EOS, VOCAB, LetterTokenizer, make_decoder, make_engine, random_prompts, run

from batchinfer.models.decoder import Decoder
from batchinfer.types import Completion, ErrorCode, Request, SamplingParams

PLAIN = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts(4)
TIGHT = {"num_pages": 26, "max_slots": 6, "max_step_tokens": 7, "expected_share": 0.01}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def complete(decoder: Decoder, params: SamplingParams, prompts: Any = PROMPTS, **given: Any) -> list[Completion]:
    options = {key: given.pop(key) for key in tuple(given) if key in {*TIGHT, "make_runner"}}
    requests = [Request(i, prompt, params, seed=i, **given) for i, prompt in enumerate(prompts)]
    done = run(make_engine(decoder, **options), requests)
    return [done[i] for i in range(len(prompts))]


def text(ids: Any) -> str:
    return LetterTokenizer().decode_batch([np.array(ids)])[0]


def greedy(logits: torch.Tensor) -> list[int]:
    return logits.argmax(1).tolist()


def logits_along(completion: Completion, prompt: np.ndarray) -> torch.Tensor:
    """What the model says at the place of each token of the sample, float64 [tokens, V], log-softmax."""
    tokens = completion.samples[0].token_ids
    return truth(np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]


@pytest.mark.feature("sampling", "allowed_token_ids")
@pytest.mark.parametrize("options", [{}, TIGHT, {"make_runner": LaggingRunner}], ids=str)
def test_only_allowed_tokens_are_chosen(decoder: Decoder, options: dict) -> None:
    allowed = (7, 40, 3, 63)
    for prompt, done in zip(
        PROMPTS, complete(decoder, replace(PLAIN, allowed_token_ids=allowed), **options), strict=True
    ):
        logits = logits_along(done, prompt)
        others = [i for i in range(VOCAB) if i not in allowed]
        logits[:, others] = -torch.inf
        assert done.samples[0].token_ids.tolist() == greedy(logits)


@pytest.mark.parametrize("options", [{}, TIGHT, {"make_runner": LaggingRunner}], ids=str)
def test_biases_move_the_choice(decoder: Decoder, options: dict) -> None:
    bias = {5: 15.0, 9: 14.5, 30: -100.0}
    for prompt, done in zip(PROMPTS, complete(decoder, replace(PLAIN, logit_bias=bias), **options), strict=True):
        logits = logits_along(done, prompt)
        for token, value in bias.items():
            logits[:, token] += value
        tokens = done.samples[0].token_ids.tolist()
        assert tokens == greedy(logits)
        assert set(tokens) & {5, 9}


@pytest.mark.feature("sampling", "bad_words")
@pytest.mark.parametrize("options", [{}, TIGHT, {"make_runner": LaggingRunner}], ids=str)
def test_bad_words_do_not_occur(decoder: Decoder, options: dict) -> None:
    """One token and three of each plain answer are made bad; the rest of the text follows from the model."""
    plain = [done.samples[0].token_ids.tolist() for done in complete(decoder, PLAIN)]
    words = (text(plain[0][:1]), text(plain[1][2:5]), text(plain[2][1:3]))
    ids = [[ord(c) - 33 for c in word] for word in words]
    done = complete(decoder, replace(PLAIN, bad_words=words), **options)
    assert [d.samples[0].token_ids.tolist() for d in done] != plain
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert not any(word in completion.samples[0].text for word in words)
        logits, tokens = logits_along(completion, prompt), completion.samples[0].token_ids.tolist()
        for place, row in enumerate(logits):
            for word in ids:
                if ([*tokens[:place], word[-1]])[-len(word) :] == word:
                    row[word[-1]] = -torch.inf
        assert tokens == greedy(logits)


def test_bad_words_and_stop_tokens_before_min_tokens_are_banned_together(decoder: Decoder) -> None:
    first = complete(decoder, PLAIN)[0].samples[0].token_ids.tolist()
    params = replace(PLAIN, bad_words=(text(first[:1]),), stop_token_ids=(first[1],), min_tokens=12)
    got = complete(decoder, params)[0].samples[0].token_ids.tolist()
    assert not {*first[:2]} & {*got}


@pytest.mark.feature("sampling", "best_of: the n samples with the highest mean log-probability")
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("options", [{}, TIGHT], ids=str)
def test_the_best_samples_are_given(decoder: Decoder, options: dict, logprobs: int | None) -> None:
    params = replace(PLAIN, temperature=1.0, stop=("!", "&", "5"), n=2, logprobs=logprobs)
    every = complete(decoder, replace(params, n=6, logprobs=2))
    for all_six, done in zip(every, complete(decoder, replace(params, best_of=6), **options), strict=True):
        means = [s.logprobs.chosen.mean() for s in all_six.samples if s.logprobs is not None]
        order = np.argsort(means)[::-1][:2]
        assert [s.text for s in done.samples] == [all_six.samples[i].text for i in order]
        for sample, i in zip(done.samples, order, strict=True):
            assert (sample.logprobs is None) == (logprobs is None)
            if sample.logprobs is not None:
                np.testing.assert_allclose(sample.logprobs.chosen, all_six.samples[i].logprobs.chosen, atol=1e-6)
                assert sample.logprobs.top.shape == (len(sample.token_ids), logprobs)


def test_best_of_goes_on_after_an_interruption(decoder: Decoder) -> None:
    params = replace(PLAIN, temperature=1.0, n=2, best_of=4, stop=("!", "&"))
    asked = [Request(i, prompt, params, seed=i) for i, prompt in enumerate(PROMPTS)]
    engine = make_engine(decoder)
    for request in asked:
        engine.add(request)
    done = {c.id: c for _ in range(7) for c in engine.step()}
    begun = {state.id: state.samples for state in engine.unfinished()}
    assert all(len(samples) == 4 for samples in begun.values())
    done |= run(make_engine(decoder), [replace(r, so_far=begun.get(r.id, ())) for r in asked if r.id not in done])
    want = complete(decoder, params)
    assert [[s.text for s in done[i].samples] for i in range(len(asked))] == [[s.text for s in c.samples] for c in want]
    assert all(sample.logprobs is None for completion in done.values() for sample in completion.samples)


@pytest.mark.feature("sampling", "prompt_logprobs")
@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, TIGHT, {"make_runner": LaggingRunner}], ids=str)
@pytest.mark.parametrize("wanted", [0, 1, 5])
def test_logprobs_of_the_prompt(decoder: Decoder, options: dict, wanted: int) -> None:
    """Beside samples that are the same as without, and prompts of one token, which have none."""
    prompts = [*PROMPTS, *PROMPTS, PROMPTS[0][:1]]
    params = replace(PLAIN, temperature=0.5, n=2)
    plain = complete(decoder, params, prompts)
    options = dict(options)
    prefix_cache = options.pop("prefix_cache", True)
    engine = make_engine(decoder, prefix_cache=prefix_cache, **options)
    asked = [Request(i, p, replace(params, prompt_logprobs=wanted), seed=i) for i, p in enumerate(prompts)]
    done = run(engine, asked)
    for i, prompt in enumerate(prompts):
        assert [s.text for s in done[i].samples] == [s.text for s in plain[i].samples]
        assert done[i].prompt_tokens == len(prompt)
        got, count = done[i].prompt_logprobs, len(prompt) - 1
        assert got is not None
        assert got.top.shape == got.top_ids.shape == (count, wanted)
        if not count:
            continue
        expected = truth(prompt)[:-1]
        chosen = expected.gather(1, torch.from_numpy(prompt[1:]).long()[:, None])[:, 0]
        top, top_ids = expected.topk(wanted)
        np.testing.assert_allclose(got.chosen, chosen.numpy(), atol=1e-5)
        np.testing.assert_allclose(got.top, top.numpy(), atol=1e-5)
        assert got.top_ids.tolist() == top_ids.tolist()
    assert plain[0].prompt_logprobs is None


def test_more_alternatives_than_tokens_and_scores_beside_them(decoder: Decoder) -> None:
    scored = Request(0, PROMPTS[0], PLAIN, scored_from=3)
    asked = [scored, Request(1, PROMPTS[1], replace(PLAIN, prompt_logprobs=64, max_tokens=1))]
    done = run(make_engine(decoder), asked)
    assert done[0].samples[0].logprobs.top.shape == (len(PROMPTS[0]) - 3, 1)
    np.testing.assert_allclose(done[1].prompt_logprobs.top, truth(PROMPTS[1])[:-1].topk(64).values, atol=1e-5)


@pytest.mark.feature("sampling", "include_stop, skip_special_tokens, detokenize: what the text shows")
def test_what_the_text_shows(decoder: Decoder) -> None:
    prompt = PROMPTS[0]
    free = complete(decoder, PLAIN)[0].samples[0]
    stop = free.text[3:6]

    def shown(**changes: Any) -> str:
        return complete(decoder, replace(PLAIN, **changes), [prompt])[0].samples[0].text

    end = free.text.find(stop)
    assert shown(stop=(stop,)) == free.text[:end]
    assert shown(stop=(stop,), include_stop=True) == free.text[: end + 3]
    token = int(free.token_ids[3])
    first = free.token_ids.tolist().index(token)
    assert shown(stop_token_ids=(token,)) == free.text[:first]
    assert shown(stop_token_ids=(token,), include_stop=True) == free.text[: first + 1]
    special = {"ignore_eos": False, "logit_bias": {EOS: 100.0}}
    assert shown(**special, include_stop=True) == ""
    assert shown(**special, include_stop=True, skip_special_tokens=False) == chr(33 + EOS)
    assert shown(**special, skip_special_tokens=False) == ""
    assert shown(detokenize=False) == ""
    silent = complete(decoder, replace(PLAIN, detokenize=False), [prompt])[0].samples[0]
    assert silent.token_ids.tolist() == free.token_ids.tolist()
    assert shown(logit_bias={EOS: 100.0}, skip_special_tokens=False, stop=(chr(33 + EOS) * 2,)) == ""


THINKS = {"[": 58, "]": 60}


@pytest.mark.feature("output", "output.reasoning: thoughts in a column of their own")
@pytest.mark.parametrize("options", [{}, TIGHT], ids=str)
def test_thoughts_are_apart(decoder: Decoder, options: dict) -> None:
    """The text is cut at the marks as the whole text would be."""
    params = replace(PLAIN, max_tokens=40, temperature=1.0, allowed_token_ids=(3, 4, 5, 6, 7, THINKS["["], THINKS["]"]))
    prompts = [np.append(p[:20], mark).astype(np.int32) for p in PROMPTS for mark in (3, THINKS["["], THINKS["]"])]
    whole = complete(decoder, params, prompts)
    seen = set()
    for prompt, plain, done in zip(
        prompts, whole, complete(decoder, params, prompts, reasoning=True, **options), strict=True
    ):
        (sample,), full = done.samples, plain.samples[0].text
        assert plain.samples[0].reasoning is None
        assert sample.token_ids.tolist() == plain.samples[0].token_ids.tolist()
        opened = prompt[-1] == THINKS["["]
        before, mark, after = ("", "[", full) if opened else full.partition("[")
        if "]" in before or (not mark and "]" in full):
            before, after = "", full
        elif not mark:
            assert (sample.text, sample.reasoning) == (full, None)
            continue
        thoughts, _, answer = after.partition("]")
        assert (sample.text, sample.reasoning) == (before + answer, thoughts)
        seen.add((opened, bool(answer)))
    assert len(seen) >= 2


def test_a_stop_string_cuts_where_it_stands(decoder: Decoder) -> None:
    params = replace(PLAIN, allowed_token_ids=(3,), max_tokens=9, stop=("$$$",))
    (thinks, answers) = (np.array([2, 2, m], np.int32) for m in (THINKS["["], THINKS["]"]))
    (a, b) = complete(decoder, params, [thinks, answers], reasoning=True)
    assert (a.samples[0].text, a.samples[0].reasoning) == ("", "")
    assert (b.samples[0].text, b.samples[0].reasoning) == ("", None)
    (a, b) = complete(decoder, replace(params, include_stop=True), [thinks, answers], reasoning=True)
    assert (a.samples[0].text, a.samples[0].reasoning) == ("", "$$$")
    assert (b.samples[0].text, b.samples[0].reasoning) == ("$$$", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias names token {VOCAB}: the model has the tokens 0 to {VOCAB - 1}"),
        ({"allowed_token_ids": (1, -1)}, "allowed_token_ids names token -1"),
        ({"stop_token_ids": (VOCAB,)}, f"stop_token_ids names token {VOCAB}"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias[1]=nan is not allowed: a bias must lie in [-100, 100]"),
        ({"best_of": 1, "n": 2}, "best_of=1 is not allowed: give 0, or a number from n=2 to 1024"),
        ({"bad_words": (" ",)}, "bad_words holds a text without a word"),
        (
            {"regex": "a", "allowed_token_ids": (1,), "ignore_eos": False},
            "regex says which tokens may come next, and so",
        ),
        ({"prompt_logprobs": 65}, "prompt_logprobs=65 is not allowed"),
    ],
)
def test_wrong_values_are_the_rows_error(decoder: Decoder, changes: dict, message: str) -> None:
    requests = [Request(0, PROMPTS[0], replace(PLAIN, **changes)), Request(1, PROMPTS[1], PLAIN)]
    done = run(make_engine(decoder), requests)
    assert done[0].error is not None
    assert done[0].error.code is ErrorCode.BAD_SAMPLING
    assert message in done[0].error.message
    assert done[1].error is None
