"""The Triton backend without a GPU: its kernels in the interpreter, compiled for GPUs that are not here, and where what
is compiled is kept."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.ops.device import PARTIAL_BYTES, fitting_split, parts
from batchinfer.ops.triton.blocks import attention_blocks, head_block, heads_together, norm_warps, power_of_2
from batchinfer.ops.triton.cache import use_local_cache

ROOT = Path(__file__).parent.parent.parent
TRITON = ROOT / "batchinfer/ops/triton"
LAUNCHED = {name for path in TRITON.glob("*.py") for name in re.findall(r"launch\(\s*\w+\.(\w+),", path.read_text())}
"""Every kernel of the backend."""

INTERPRETED = Path(__file__).parent / "interpreted"


def test_every_op_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton looks at the variable when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", INTERPRETED]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert "skipped" not in done.stdout


@pytest.mark.feature("Triton kernels (compiled)", "for sm_80, sm_90, gfx90a, gfx942, gfx1100, within recorded spills")
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx90a", "gfx942", "gfx1100"])
def test_compiles_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ops.triton_targets import LIMITS, compiled, need

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    limits, kernels = LIMITS[name], compiled(name)
    # All of them; attention's in two widths and over a cache of e4m3, for prompts and for decoding; products of 2
    # sizes, clamped, or of 2 sorts of codes; routing with groups of experts and without.
    assert len(kernels) == (34 if name == "sm_90" else 33)
    assert {kernel.split()[0] for kernel in kernels} == LAUNCHED - ({"encode_rows"} if name != "sm_90" else set())
    needs = {name: need(kernel) for name, kernel in kernels.items()}
    assert {name: it for name, it in needs.items() if it.spilled > limits.spills.get(name, 0)} == {}
    assert {name: it for name, it in needs.items() if it.shared > limits.shared} == {}
    for kernel in ("choose", "penalise"):  # tokens are the reference's only if each product is rounded by itself
        assert "fma.rn.f32" not in kernels[kernel].asm.get("ptx", "")
        assert " contract " not in kernels[kernel].asm["llir"]


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("width", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rdna", [False, True])
def test_blocks_are_what_the_kernels_can_take(decode: bool, width: int, itemsize: int, rdna: bool) -> None:
    blocks = attention_blocks(decode, width, itemsize, rdna)
    for size in (blocks.rows, blocks.keys, head_block(width)):
        assert size >= 16
        assert size == power_of_2(size)
    assert 1024 % blocks.keys == 0  # a part begins where a block does
    assert blocks.keys * head_block(width) * itemsize * 2 * blocks.stages <= 64 << 10  # keys and values


def test_rows_have_warps_enough() -> None:
    assert [norm_warps(width) for width in (1, 576, 4096, 32768)] == [1, 1, 4, 16]
    assert [heads_together(width) for width in (64, 80, 128, 2048)] == [16, 8, 8, 1]


def test_the_split_grows_until_partial_results_fit() -> None:
    assert fitting_split(1024, 256, 8192, 32, 128) == 1024
    split = fitting_split(1024, 1024, 131_072, 32, 128)
    needed = [1024 * 32 * 128 * 4 * parts(131_072, s) for s in (split, split // 2)]
    assert needed[0] <= PARTIAL_BYTES < needed[1]


def test_compiled_kernels_are_kept_on_the_node_by_rank(tmp_path: Path) -> None:
    first, second = ({}, {})
    folder = use_local_cache(3, first, str(tmp_path))
    assert first == {"TRITON_CACHE_DIR": str(folder)}
    assert folder.parent.parent == tmp_path
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert use_local_cache(3, {}, str(tmp_path)) == folder  # the next job finds them
    assert use_local_cache(4, second, str(tmp_path)) != folder


def test_a_cache_that_the_user_names_stays(tmp_path: Path) -> None:
    given = {"TRITON_CACHE_DIR": "/scratch/kernels"}
    assert use_local_cache(0, given, str(tmp_path)) == Path("/scratch/kernels")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "file", "open to others"])
def test_a_folder_that_is_not_safely_ours_is_not_used(tmp_path: Path, kind: str) -> None:
    """/tmp belongs to everybody: kernels out of a folder that another user made would be his code."""
    place = tmp_path / f"batchinfer-triton-{os.getuid()}"
    other = tmp_path / "other"
    other.mkdir()
    if kind == "link":
        place.symlink_to(other)
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    folder = use_local_cache(0, {}, str(tmp_path))
    assert folder.is_dir()
    assert place not in folder.parents
    assert not list(other.iterdir())
