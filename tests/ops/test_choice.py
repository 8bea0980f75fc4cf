"""Which backend and which GPU, from what a build and a node have."""

from __future__ import annotations

import pytest

from batchinfer.ops.choice import BOUND_BY_SLURM, Choice, Gpus, choose

CPU_BUILD = Gpus(built=False)


def forbidden() -> Gpus:
    raise AssertionError("nobody asked for a GPU")


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_the_host_needs_no_look_at_gpus(asked: str) -> None:
    assert choose(asked, forbidden, rank=3, ranks=4) == Choice(asked)


def test_auto_is_what_the_build_is_for() -> None:
    assert choose("auto", lambda: CPU_BUILD) == Choice("cpu")
    assert choose("auto", lambda: Gpus(True, 4), rank=2, ranks=4) == Choice("cuda", 2)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_build_without_a_gpu_says_so_and_never_computes_on_the_cpu(asked: str) -> None:
    with pytest.raises(RuntimeError, match=r"no driver.*engine\.device=cpu"):
        choose(asked, lambda: Gpus(True, 0, "no driver"))


def test_cuda_in_a_cpu_build_names_the_rebuild() -> None:
    with pytest.raises(RuntimeError, match="BATCHINFER_DEVICE=cuda pip install"):
        choose("cuda", lambda: CPU_BUILD)


@pytest.mark.parametrize("variable", BOUND_BY_SLURM)
def test_a_rank_with_gpus_of_its_own_takes_the_first(variable: str) -> None:
    one = Gpus(True, 1)
    assert choose("auto", lambda: one, rank=3, ranks=4, environment={variable: "1"}) == Choice("cuda", 0)
    with pytest.raises(RuntimeError, match=r"4 ranks on this node and 1 visible GPUs.*--ntasks-per-node=1"):
        choose("auto", lambda: one, rank=3, ranks=4, environment={})
