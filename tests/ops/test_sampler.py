"""The sampler: its arithmetic, its distribution, and that every instruction set chooses the reference's tokens."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchinfer import _ops
from batchinfer.ops import SampleInput, SampleOutput
from batchinfer.ops import reference_sampler as spec
from batchinfer.ops.device import add_biases, forbid
from batchinfer.ops.native import NativeOps
from batchinfer.ops.reference import ReferenceOps

ISAS = _ops.build_info["usable_isas"]
REFERENCE = ReferenceOps()

backends = pytest.mark.parametrize("ops", [REFERENCE, *(NativeOps("cpu", 2, isa) for isa in ISAS)], ids=["ref", *ISAS])


@cache
def native(isa: str, threads: int) -> NativeOps:
    return NativeOps("cpu", threads, isa)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def settings_for(rows: int, **fields: object) -> SampleInput:
    """Neutral sampling at temperature 1, row i with seed i; a number in ``fields`` goes for all rows."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "position": 0}
    dtypes = {"temperature": torch.float32, "top_p": torch.float32, "min_p": torch.float32}
    tensors = {"seed": torch.arange(rows)}
    for name, value in (neutral | fields).items():
        is_number = isinstance(value, (int, float))
        tensors[name] = torch.full((rows,), value, dtype=dtypes.get(name, torch.int32)) if is_number else value
    return SampleInput(**tensors)


# The arithmetic


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_vectors(counter: str, key: str, block: str) -> None:
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    words = np.array([[int(w, 16) for w in counter.split()]], np.uint32)
    low, high = (int(w, 16) for w in key.split())
    assert " ".join(f"{w:08x}" for w in spec.philox4x32(words, high << 32 | low)[0]) == block


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.max(np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32))))


def test_exp_and_log_are_within_2_ulp() -> None:
    x = np.linspace(-86.9, 0, 200_001).astype(np.float32)
    assert ulps(spec.exp(x), np.exp(x.astype(np.float64))) < 2
    assert np.array_equal(spec.exp(np.float32([0, -87.5, -1e30, -np.inf])), np.float32([1, 0, 0, 0]))
    y = np.exp(np.random.default_rng(0).uniform(-25, 4, 200_000)).astype(np.float32)
    assert ulps(spec.log(y), np.log(y.astype(np.float64))) < 2


def test_noise_is_standard_gumbel() -> None:
    noise = np.concatenate([spec.gumbel(seed, 3, np.arange(50_000)) for seed in range(4)]).astype(np.float64)
    assert abs(noise.mean() - 0.5772157) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    uniform = np.sort(np.exp(-np.exp(-noise)))  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed in 99.9 % of seeds
    assert np.abs(uniform - (np.arange(len(uniform)) + 0.5) / len(uniform)).max() < 1.95 / math.sqrt(len(uniform))


def test_noise_is_accurate_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1e-6 of -log(-log1p(-v)) for the smallest and largest v, from random words chosen by hand."""
    words = np.array([0, 1, 2, 2**9 + 1, 2**16 - 1, 2**31, 2**31 + 12345, 2**32 - 2**9, 2**32 - 1], np.uint32)
    v = np.minimum((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    want = -np.log(-np.log1p(-v.astype(np.float64)))
    monkeypatch.setattr(spec, "philox4x32", lambda counter, key: np.repeat(words[:, None], 4, axis=1))
    got = spec.gumbel(0, 0, np.arange(len(words)))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_no_two_tokens_positions_or_seeds_share_their_noise() -> None:
    noise = [spec.gumbel(seed, position, np.arange(256)) for seed in (0, 1, 2**32, -1) for position in (0, 1, 2)]
    assert len(np.unique(np.concatenate(noise))) > 0.999 * 256 * len(noise)


# Every backend makes the same choices


@st.composite
def sampling_cases(draw: st.DrawFn) -> tuple[torch.Tensor, SampleInput]:
    rows, vocab = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 63, 64, 65, 1000, 5003]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab, generator=g) * draw(st.sampled_from([0.1, 2.0, 12.0]))
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2  # many ties
    if draw(st.booleans()):
        logits[torch.rand(rows, vocab, generator=g) < 0.2] = draw(st.sampled_from([-torch.inf, torch.nan]))

    def choice(*values: float) -> torch.Tensor:
        return floats(*values)[torch.randint(len(values), (rows,), generator=g)]

    def segments(longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = torch.randint(longest + 1, (rows,), generator=g)
        ids = torch.randint(vocab, (int(lengths.sum()),), generator=g).int()
        return ids, torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(), (lengths * 0.6).int()

    more: dict = {}
    if draw(st.booleans()):
        more["penalties"] = (choice(1.0, 1.3, 0.8), choice(0.0, 0.5, -1.0), choice(0.0, 0.1, 1.5))
        more["history_ids"], more["history_start"], more["history_prompt"] = segments(40)
    if draw(st.booleans()):
        counts = torch.randint(min(vocab, 9) + 1, (rows,), generator=g)
        ids = [torch.randperm(vocab, generator=g)[:n] for n in counts.tolist()]
        more["bias_ids"], more["bias_start"] = torch.cat(ids).int(), torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
        more["bias_values"] = torch.randn(int(counts.sum()), generator=g) * 10
    if draw(st.booleans()):
        more["banned_ids"], more["banned_start"], _ = segments(3)
    if draw(st.booleans()):
        words = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=g)
        more["allowed"] = torch.where(torch.rand(rows, 1, generator=g) < 0.3, -1, words).int()
    if draw(st.booleans()):
        more["num_logprobs"] = torch.randint(-1, 8, (rows,), generator=g).int()
    inputs = SampleInput(
        temperature=choice(0.0, 0.3, 1.0, 1.0, 7.0, 1e-40),
        top_k=torch.randint(6, (rows,), generator=g).int() ** 3,
        top_p=choice(1.0, 1.0, 0.95, 0.5, 1e-6, 0.999999),
        min_p=choice(0.0, 0.0, 0.02, 1.0),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=g),
        position=torch.randint(2**20, (rows,), generator=g).int(),
        **more,
    )
    return logits, inputs


def assert_same(got: SampleOutput, want: SampleOutput) -> None:
    assert torch.equal(got.tokens, want.tokens)
    assert (got.chosen is None) == (want.chosen is None)
    if want.chosen is not None:
        torch.testing.assert_close(got.chosen, want.chosen, rtol=0, atol=1e-5, equal_nan=True)
        finite = torch.isfinite(want.top)  # -inf logits are all alike, and reported by the reference only
        assert torch.equal(got.top_ids[finite], want.top_ids[finite])
        torch.testing.assert_close(got.top[finite], want.top[finite], rtol=0, atol=1e-5)


@given(case=sampling_cases(), isa=st.sampled_from(ISAS), threads=st.integers(1, 3))
def test_native_chooses_the_tokens_of_the_reference(
    case: tuple[torch.Tensor, SampleInput], isa: str, threads: int
) -> None:
    logits, inputs = case
    want = REFERENCE.sample(logits, inputs)
    assert_same(native(isa, threads).sample(logits.clone(), inputs), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_possible_token_give_the_first(isa: str, temperature: float) -> None:
    """NaN counts as -inf: of rows that hold nothing else, or in which the rest is banned, token 0 is chosen."""
    nan, inf = float("nan"), torch.inf
    logits = torch.tensor([[nan, nan, nan], [nan, -inf, nan], [-inf, -inf, -inf], [nan, 1.0, nan]])
    more = {"banned_ids": ints(1, 1), "banned_start": ints(0, 1, 1, 1, 2), "num_logprobs": ints(0, 1, 2, 3)}
    inputs = settings_for(4, temperature=temperature, **more)
    got = native(isa, 1).sample(logits.clone(), inputs)
    assert got.tokens.tolist() == [0, 0, 0, 0]
    assert_same(got, REFERENCE.sample(logits, inputs))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_native_chooses_the_tokens_of_the_reference_in_a_large_vocabulary(isa: str, sharpness: float) -> None:
    """Here the shortcuts matter: skipped blocks, candidates from block maxima, the bound of top-p."""
    rows, vocab = 24, 49_152
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, vocab, generator=g) * sharpness
    inputs = settings_for(
        rows,
        top_k=ints(0, 0, 0, 5, 800, 0, 0, 50).repeat(3),
        top_p=floats(1, 1, 0.9, 1, 1, 0.5, 0.9999, 0.8).repeat(3),
        min_p=floats(0, 0, 0, 0.1).repeat(6),
        temperature=floats(1, 2, 0.7).repeat_interleave(8),
    )
    assert_same(native(isa, 2).sample(logits.clone(), inputs), REFERENCE.sample(logits, inputs))


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_its_neighbours(isa: str) -> None:
    rows, vocab = 9, 3000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3
    inputs = settings_for(rows, temperature=0.9, top_p=0.95, num_logprobs=ints(*[3] * rows))
    together = native(isa, 3).sample(logits.clone(), inputs)
    for i in range(rows):
        alone = SampleInput(**{k: None if v is None else v[i : i + 1].clone() for k, v in vars(inputs).items()})
        row = native(isa, 1).sample(logits[i : i + 1].clone(), alone)
        for got, want in zip(vars(row).values(), vars(together).values(), strict=True):
            assert torch.equal(got[0], want[i])


# What the choices mean


def allowed_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """The distribution after the filters, by sorting, in float64. For logits without ties."""
    p = torch.softmax(logits.double() / temperature, dim=0).numpy()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    p[order[1:][np.cumsum(p[order])[:-1] >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.feature("sampling", "greedy, temperature, top-k, top-p, min-p")
@backends
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.5, 7, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.1),
        (2.0, 9, 0.9, 0.2),
    ],
)
def test_draws_follow_the_filtered_softmax(
    ops: ReferenceOps | NativeOps, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Chi-square over many seeds, fixed; a right sampler would fail with probability about 1e-6."""
    vocab, draws = 20, 600 if ops is REFERENCE else 20_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)) * 1.5
    p = allowed_probabilities(logits, temperature, top_k, top_p, min_p)
    inputs = settings_for(draws, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, position=5)
    tokens = ops.sample(logits.repeat(draws, 1), inputs).tokens
    count = np.bincount(tokens.numpy(), minlength=vocab)
    assert count[p == 0].sum() == 0
    freedom = int((p > 0).sum()) - 1
    chi_square = float(((count - draws * p)[p > 0] ** 2 / (draws * p[p > 0])).sum())
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson & Hilferty 1931
    assert chi_square < bound


@backends
def test_ties(ops: ReferenceOps | NativeOps) -> None:
    logits = floats(1, 5, 2, 3, 3, 5, 3, 0)
    greedy = ops.sample(logits.repeat(1, 1), settings_for(1, temperature=0.0, num_logprobs=ints(4)))
    assert greedy.tokens.tolist() == [1]
    assert greedy.top_ids.tolist() == [[1, 5, 3, 4]]
    for filters in ({"top_k": 3}, {"top_p": 0.85}, {"min_p": 0.05}):  # all of them cut among the three equal ones
        tokens = ops.sample(logits.repeat(600, 1), settings_for(600, temperature=1.0, **filters)).tokens
        assert set(tokens.tolist()) == {1, 3, 4, 5, 6}, filters


@pytest.mark.feature("sampling", "repetition, presence and frequency penalties")
@backends
@pytest.mark.hardware("penalties, bans, log-probabilities")
def test_penalties_and_bans(ops: ReferenceOps | NativeOps) -> None:
    """Two rows over the same logits; the second has neutral penalties, no history and two banned tokens."""
    logits = floats(2.0, -1.0, 1.5, 0.5, 1.9).repeat(2, 1)
    inputs = settings_for(
        2,
        temperature=0.0,
        penalties=(floats(2.0, 1.0), floats(0.25, 0.0), floats(0.125, 0.0)),
        history_ids=ints(0, 1, 4, 2, 2),  # prompt: 0 1; output: 4 2 2
        history_start=ints(0, 5, 5),
        history_prompt=ints(2, 0),
        banned_ids=ints(0, 4),
        banned_start=ints(0, 0, 2),
        num_logprobs=ints(5, -1),
    )
    # Row 0: 2 / 2 = 1; -1 * 2 = -2; 1.5 / 2 - 0.25 - 2 * 0.125 = 0.25; 0.5; 1.9 / 2 - 0.25 - 0.125 = 0.575
    raw = torch.log_softmax(logits[0].double(), dim=0).float()
    out = ops.sample(logits.clone(), inputs)
    assert out.tokens.tolist() == [0, 2]
    torch.testing.assert_close(out.chosen[0], raw[0])
    assert math.isnan(out.chosen[1])
    assert out.top_ids.tolist() == [[0, 4, 2, 3, 1], [-1] * 5]
    torch.testing.assert_close(out.top[0], raw[[0, 4, 2, 3, 1]])


@pytest.mark.feature("sampling", "logit_bias")
@backends
def test_biases_come_before_all_else_and_leave_the_logprobs(ops: ReferenceOps | NativeOps) -> None:
    """Row 0: token 2 gets 0.5 + 5, and 1.1 behind a repetition penalty of 5. Row 1 has no bias. Row 2: of -inf nothing
    else can be made."""
    inf = torch.inf
    logits = torch.tensor([[1.0, 0.9, 0.5], [1.0, 0.9, 0.5], [-inf, 0.0, 0.5]])
    inputs = settings_for(
        3,
        temperature=0.0,
        bias_ids=ints(2, 0),
        bias_start=ints(0, 1, 1, 2),
        bias_values=floats(5, 100),
        penalties=(floats(5, 1, 1), floats(0, 0, 0), floats(0, 0, 0)),
        history_ids=ints(2),
        history_start=ints(0, 1, 1, 1),
        history_prompt=ints(0, 0, 0),
        num_logprobs=ints(1, 0, 0),
    )
    raw = torch.log_softmax(logits.double(), dim=1).float()
    out = ops.sample(logits.clone(), inputs)
    assert out.tokens.tolist() == [2, 0, 2]
    torch.testing.assert_close(out.chosen, raw[[0, 1, 2], [2, 0, 2]])
    assert out.top_ids.tolist() == [[0], [-1], [-1]]


@pytest.mark.parametrize("isa", ISAS)
def test_penalised_logits_are_those_of_the_formula(isa: str) -> None:
    """Greedy sampling reveals a logit exactly: it wins against a rival just below and loses to one just above."""
    x, repetition, presence, frequency, count = (np.float32(v) for v in (3.7, 1.7, 0.3, 0.2, 3))
    want = x / repetition - presence - frequency * count
    rivals = [np.nextafter(want, np.float32(s)) for s in (-np.inf, np.inf)]
    logits = torch.tensor([[rival, x] for rival in rivals])
    inputs = settings_for(
        2,
        temperature=0.0,
        penalties=tuple(floats(v, v) for v in (repetition, presence, frequency)),
        history_ids=ints(1, 1, 1, 1, 1, 1),
        history_start=ints(0, 3, 6),
        history_prompt=ints(0, 0),
    )
    assert native(isa, 1).sample(logits, inputs).tokens.tolist() == [1, 0]


@backends
def test_extremes(ops: ReferenceOps | NativeOps) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[1.0, 2, nan], [-inf, -inf, -inf], [nan, nan, nan], [0, inf, inf], [-3e38, 3e38, 0]])
    for temperature in (0.0, 1.0):
        tokens = ops.sample(logits.clone(), settings_for(5, temperature=temperature, top_p=0.5)).tokens
        assert tokens.tolist() == [1, 0, 0, 1, 1]
    assert ops.sample(torch.empty(0, 7), settings_for(0)).tokens.shape == (0,)


@pytest.mark.parametrize("isa", ISAS)
def test_wrong_segments_are_named(isa: str) -> None:
    history = {"history_ids": ints(0, 7), "history_start": ints(0, 2), "history_prompt": ints(0)}
    penalties = {"penalties": (floats(1), floats(0), floats(0))}
    biases = {"bias_ids": ints(7), "bias_start": ints(0, 1), "bias_values": floats(1)}
    bans = {"banned_ids": ints(1, 2), "banned_start": ints(0, 3)}
    for fields, message in (
        (history | penalties, r"history_ids\[1\]=7 is not in \[0, 7\)"),
        (history | penalties | {"history_start": ints(2, 1)}, r"history_start\[1\]=1 must rise from 0 to 2"),
        (biases, r"bias_ids\[0\]=7 is not in \[0, 7\)"),
        (biases | {"bias_values": floats(1, 2)}, r"bias_values has shape \(2,\)"),
        (bans, r"banned_start\[1\]=3 must rise from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            native(isa, 1).sample(torch.zeros(1, 7), settings_for(1, **fields))


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_the_mask_as_a_gpu_applies_it(vocab: int) -> None:
    """torch's kernels on any device; the samplers take what it leaves."""
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=g)
    allowed = torch.randint(-(2**31), 2**31, (5, -(-vocab // 32)), generator=g).int()
    bits = np.unpackbits(allowed.numpy().view(np.uint8), axis=1, count=vocab, bitorder="little").astype(bool)
    expected = np.where(bits, logits.numpy(), -np.inf)
    forbid(logits, allowed)
    assert np.array_equal(logits.numpy(), expected)


def test_the_biases_as_a_gpu_adds_them() -> None:
    """A row without any, and an id outside the vocabulary, which changes nothing."""
    logits = torch.zeros(3, 4)
    add_biases(logits, ints(3, 0, 9, -1, 3), ints(0, 2, 2, 5), floats(1, 2, 3, 4, 5))
    assert logits.tolist() == [[2, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 5]]
