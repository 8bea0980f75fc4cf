"""Which backend and which GPU, from what a build and a node have."""

from __future__ import annotations

import pytest

from batchinfer.cluster.binding import gpu_index
from batchinfer.ops.choice import Choice, Gpus, choose

CPU_BUILD = Gpus(built=False)


def forbidden() -> Gpus:
    raise AssertionError("nobody asked for a GPU")


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_the_host_needs_no_look_at_gpus(asked: str) -> None:
    assert choose(asked, forbidden, rank=3) == Choice(asked)


def test_auto_is_what_the_build_is_for() -> None:
    assert choose("auto", lambda: CPU_BUILD) == Choice("cpu")
    assert choose("auto", lambda: Gpus(True, 4), rank=2) == Choice("cuda", 2)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_build_without_a_gpu_says_so_and_never_computes_on_the_cpu(asked: str) -> None:
    with pytest.raises(RuntimeError, match=r"no driver.*engine\.device=cpu"):
        choose(asked, lambda: Gpus(True, 0, "no driver"))


def test_cuda_in_a_cpu_build_names_the_rebuild() -> None:
    with pytest.raises(RuntimeError, match=r"BATCHINFER_DEVICE=cuda pip install.*engine\.device=cpu"):
        choose("cuda", lambda: CPU_BUILD)


def test_a_rank_that_sees_one_gpu_takes_it() -> None:
    """The launcher shows each rank its own; cluster/binding.py refuses ranks that share one."""
    assert choose("auto", lambda: Gpus(True, 1), rank=3) == Choice("cuda", 0)


@pytest.mark.parametrize("visible", [1, 2, 8])
def test_the_choice_is_the_one_that_the_binding_table_shows(visible: int) -> None:
    for rank in range(visible):
        assert choose("cuda", lambda: Gpus(True, visible), rank=rank).index == gpu_index(rank, visible)
