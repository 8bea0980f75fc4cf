"""Ranks of a node with one copy of their packed weights: the same tokens, the memory once, and what they do when the
rank that packs is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mpi.test_ranks import mpiexec, pytestmark  # noqa: F401
from mpi.test_weights import model  # noqa: F401

SHARE = Path(__file__).with_name("share.py")
PACKED = 6_500_000
"""Fewer bytes than the model's 3.3 million weights are in bfloat16."""


def rows(text: str) -> list[list[str]]:
    return [line.split("|") for line in text.splitlines()]


@pytest.fixture(scope="module")
def alone(model: Path) -> str:  # noqa: F811
    """What a rank generates that shares nothing."""
    ((tokens, resident, _, files, _),) = rows(mpiexec(0, SHARE, str(model), "alone").stdout)
    assert (resident, files) == ("0", "2")
    return tokens


@pytest.mark.feature("job", "the CPU ranks of a NUMA domain have one copy of the packed weights in memory")
def test_ranks_of_a_node_have_one_copy(alone: str, model: Path) -> None:  # noqa: F811
    result = mpiexec(3, SHARE, str(model), "three")
    assert result.returncode == 0, result.stderr
    found = rows(result.stdout)
    assert [tokens for tokens, *_ in found] == [alone] * 3
    assert sorted(files for *_, files, _ in found) == ["0", "0", "2"]
    assert len({loaded for *_, loaded in found}) == 1
    assert "None" not in found[0]
    for _, resident, own, *_ in found:
        assert int(resident) > PACKED
        assert int(own) < 0.4 * int(resident)


def test_a_leader_that_hangs_is_not_waited_for(alone: str, model: Path) -> None:  # noqa: F811
    """Under MPI, which would end all ranks if it died."""
    result = mpiexec(3, SHARE, str(model), "hangs", FAIL_WHEN="stopped")
    assert [(tokens, resident, files) for tokens, resident, _, files, _ in rows(result.stdout)] == [
        (alone, "0", "2")
    ] * 2
    assert result.stderr.count("(the rank that packs them is silent): it packs its own") == 2


@pytest.mark.feature("job", "a rank whose packed weights would come from one that dies packs its own")
def test_a_leader_that_dies_takes_no_other_along(alone: str, model: Path) -> None:  # noqa: F811
    """Processes that are no ranks of MPI."""

    def start(rank: int, **fate: str) -> subprocess.Popen:
        environment = {"RANK": str(rank), "SIZE": "3", "PATH": "", **fate}
        command = [sys.executable, str(SHARE), str(model), "dies"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    ranks = [start(rank, FAIL_WHEN="killed") for rank in range(3)]
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert ranks[0].returncode == -9
    for out, err in said[1:]:
        assert [row[:2] for row in rows(out)] == [[alone, "0"]]
        assert "it packs its own" in err
