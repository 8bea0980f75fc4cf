"""Which backend and which GPU, from what a build and a node have."""

from __future__ import annotations

import pytest

from batchinfer.cluster.binding import gpu_index
from batchinfer.ops.choice import Choice, Gpus, choose, find_gpus

NO_GPU = Gpus(reason="no driver")


def forbidden() -> Gpus:
    raise AssertionError("nobody asked for a GPU")


def chosen(gpus: Gpus, asked: str = "auto", ops: str = "auto", rank: int = 0) -> Choice:
    return choose(asked, ops, lambda: gpus, rank)


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_the_host_needs_no_look_at_gpus(asked: str) -> None:
    assert choose(asked, "auto", forbidden, rank=3) == Choice(asked)


@pytest.mark.feature("Triton kernels", "chosen where the build has no kernels for the GPU, or by engine.ops=triton")
@pytest.mark.parametrize(
    ("gpus", "ops", "choice"),
    [
        (NO_GPU, "auto", Choice("cpu")),
        (Gpus(triton=True, reason="no driver"), "auto", Choice("cpu")),
        (Gpus("cuda", "cuda", False, 4), "auto", Choice("native", "cuda:2")),
        (Gpus("cuda", "cuda", True, 4), "auto", Choice("native", "cuda:2")),
        (Gpus("cuda", "cuda", True, 4), "native", Choice("native", "cuda:2")),
        (Gpus("cuda", "cuda", True, 4), "triton", Choice("triton", "cuda:2")),
        (Gpus("", "cuda", True, 4), "auto", Choice("triton", "cuda:2")),
        (Gpus("", "rocm", True, 4), "auto", Choice("triton", "cuda:2")),  # torch keeps CUDA's name
        (Gpus("rocm", "rocm", True, 4), "auto", Choice("native", "cuda:2")),
        (Gpus("", "xpu", True, 4), "auto", Choice("triton", "xpu:2")),
        (Gpus("cuda", "rocm", True, 4), "auto", Choice("triton", "cuda:2")),  # kernels for another vendor
    ],
)
def test_auto(gpus: Gpus, ops: str, choice: Choice) -> None:
    assert chosen(gpus, "auto", ops, rank=2) == choice


@pytest.mark.parametrize("vendor", ["cuda", "rocm", "xpu"])
def test_a_vendor_is_asked_for_by_name(vendor: str) -> None:
    gpus = Gpus("", vendor, True, 1)
    assert chosen(gpus, vendor) == chosen(gpus, "auto")
    for other in {"cuda", "rocm", "xpu"} - {vendor}:
        with pytest.raises(RuntimeError, match=rf"torch is built for .*engine\.device={vendor}"):
            chosen(gpus, other)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_build_without_a_gpu_says_so_and_never_computes_on_the_cpu(asked: str) -> None:
    with pytest.raises(RuntimeError, match=r"build is for CUDA.*no driver.*engine\.device=cpu"):
        chosen(Gpus("cuda", "cuda", True, 0, "no driver"), asked)


@pytest.mark.parametrize(("asked", "ops"), [("cuda", "auto"), ("auto", "triton"), ("auto", "native")])
def test_who_asks_for_a_gpu_where_there_is_none_is_told(asked: str, ops: str) -> None:
    with pytest.raises(RuntimeError, match=r"^that means a GPU.*no driver.*engine\.device=cpu"):
        chosen(NO_GPU, asked, ops)


def test_a_gpu_without_kernels_is_no_reason_to_compute_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"BATCHINFER_DEVICE=rocm pip .*pip install triton.*engine\.device=cpu"):
        chosen(Gpus("", "rocm", False, 1))


@pytest.mark.feature("commands", "a backend that was not compiled names the rebuild command, and is never replaced")
@pytest.mark.parametrize("vendor", ["cuda", "rocm", "xpu"])
def test_kernels_that_were_not_compiled_name_the_rebuild(vendor: str) -> None:
    with pytest.raises(RuntimeError, match=rf"not compiled for {vendor}; .*: cpu\. .*BATCHINFER_DEVICE={vendor} pip"):
        chosen(Gpus("", vendor, True, 1), vendor, "native")


def test_triton_that_is_not_installed_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"engine\.ops=triton.*pip install triton"):
        chosen(Gpus("cuda", "cuda", False, 1), ops="triton")


def test_a_rank_that_sees_one_gpu_takes_it() -> None:
    """The launcher shows each rank its own; cluster/binding.py refuses ranks that share one."""
    assert chosen(Gpus("cuda", "cuda", False, 1), rank=3) == Choice("native", "cuda:0")


@pytest.mark.parametrize("visible", [1, 2, 8])
def test_the_choice_is_the_one_that_the_binding_table_shows(visible: int) -> None:
    for rank in range(visible):
        gpus = Gpus("cuda", "cuda", False, visible)
        assert chosen(gpus, "cuda", rank=rank).device == f"cuda:{gpu_index(rank, visible)}"


def test_this_machine() -> None:
    gpus = find_gpus()
    assert bool(gpus.reason) == (gpus.count == 0)
