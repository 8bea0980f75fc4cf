"""The one object for every vendor's GPU against a torch without one: what is asked of which part of torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from batchinfer.ops.accelerator import Accelerator

XPU = torch.device("xpu", 1)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_torch_has_what_the_step_loop_asks_for(kind: str) -> None:
    """Names alone: what they do needs a device."""
    gpu, asked = Accelerator(torch.device(kind, 0)), []
    for name in ("Stream", "Event", "stream", "current_stream", "synchronize", "set_device", "empty_cache"):
        asked.append(getattr(gpu._module, name))
    for name in ("mem_get_info", "memory_reserved", "max_memory_reserved", "get_device_properties"):
        asked.append(getattr(gpu._module, name))
    assert all(callable(found) for found in asked)
    assert gpu.graphs == (kind == "cuda")


def test_memory_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "mem_get_info", {XPU: (30, 64)}.__getitem__)
    assert Accelerator(XPU).memory() == (30, 64)


def test_a_driver_that_does_not_tell_what_is_free_leaves_what_torch_has_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("The device doesn't support querying the available free memory.")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse)
    monkeypatch.setattr(torch.xpu, "get_device_properties", {XPU: SimpleNamespace(total_memory=64)}.__getitem__)
    monkeypatch.setattr(torch.xpu, "memory_reserved", {XPU: 24}.__getitem__)
    assert Accelerator(XPU).memory() == (40, 64)


@pytest.mark.parametrize(("version", "fits"), [("2.5.1+xpu", False), ("2.6.0+xpu", True), ("2.13.0+xpu", True)])
def test_intel_gpus_need_a_torch_whose_events_tell_times(
    monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.xpu, "set_device", chosen.append)
    if fits:
        Accelerator(XPU).use()
    else:
        with pytest.raises(RuntimeError, match=r"torch 2\.5\.1\+xpu is too old for Intel GPUs: 2\.6 or newer"):
            Accelerator(XPU).use()
    assert chosen == [XPU] * fits
