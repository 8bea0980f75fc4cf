"""Steps that are repeated from a recording: the same bits as steps that are computed op by op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models.test_decoder import PAGE_SIZE, make, run_steps
from models.tiny_models import TinyModel
from torch import Tensor

from batchinfer.engine import replay
from batchinfer.engine.replay import Replay
from batchinfer.models.decoder import Decoder, KVCache, StepInput
from batchinfer.ops import AttentionInput
from batchinfer.ops.native import NativeOps


class Replaying:
    """A decoder whose steps go through a Replay."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.new_cache, self.repeats = decoder, decoder.new_cache, 0
        self.replay: Replay | None = None

    def forward(self, step: StepInput, cache: KVCache) -> tuple[Tensor, None]:
        if self.replay is None:
            self.replay = Replay(self.decoder, cache)
            repeat = self.replay._repeat

            def counted(*args: object) -> None:
                self.repeats += 1
                repeat(*args)

            self.replay._repeat = counted
        return self.replay.forward(step)


@pytest.mark.feature("CPU kernels", "steps of few tokens repeated without Python between their ops")
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "mixtral"])
@pytest.mark.hardware("steps recorded or captured, and repeated")
def test_repeated_steps_have_the_same_bits(name: str, kv_dtype: torch.dtype, tiny: Callable[[str], TinyModel]) -> None:
    model = tiny(name)
    truth, replaying = (
        make(model, NativeOps(threads=2), torch.float32),
        make(model, NativeOps(threads=2), torch.float32),
    )
    truth.kv_dtype = replaying.kv_dtype = kv_dtype
    steps = Replaying(replaying)
    ours, _ = run_steps(steps, model)
    assert torch.equal(ours, run_steps(truth, model)[0])
    assert steps.repeats == (0 if name == "mixtral" else 3)  # of the STEPS, those whose shape came before


def one_token(token: int, position: int) -> StepInput:
    one = torch.tensor([0, 1], dtype=torch.int32)
    attention = AttentionInput(one, torch.tensor([position + 1], dtype=torch.int32), one[:1], one[:1].view(1, 1))
    at = torch.tensor([position])
    return StepInput(torch.tensor([token], dtype=torch.int32), at.int(), at, attention, one[:1])


def test_an_error_in_a_repeated_step_ends_it_alone(tiny: Callable[[str], TinyModel]) -> None:
    decoder = make(tiny("llama"), NativeOps(threads=1), torch.float32)
    steps = Replay(decoder, decoder.new_cache(1, PAGE_SIZE))
    truth = decoder.new_cache(1, PAGE_SIZE)
    first = steps.forward(one_token(5, 0))[0].clone()
    with pytest.raises(ValueError, match=r"embed: ids\[0\]=97 is not in"):
        steps.forward(one_token(97, 1))
    again = steps.forward(one_token(7, 1))[0].clone()
    assert torch.equal(first, decoder.forward(one_token(5, 0), truth)[0])
    assert torch.equal(again, decoder.forward(one_token(7, 1), truth)[0])


def test_the_latest_recordings_are_kept(tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_PROGRAMS", 2)
    decoder = make(tiny("llama"), NativeOps(threads=1), torch.float32)
    steps = Replay(decoder, decoder.new_cache(1, PAGE_SIZE))
    table = torch.zeros(1, 1, dtype=torch.int32)
    for tokens in (1, 2, 1, 3):
        ends, ids = torch.tensor([0, tokens], dtype=torch.int32), torch.arange(tokens, dtype=torch.int32)
        attention = AttentionInput(ends, ends[1:], ends[:1], table)
        steps.forward(StepInput(ids, ids, ids.long(), attention, ends[1:] - 1))
    assert list(steps._programs) == [(1, 1), (3, 1)]
