"""The table of ranks and what it refuses, from places made up for the purpose."""

from __future__ import annotations

import ctypes
import os

import pytest

from batchinfer.cluster import binding
from batchinfer.cluster.binding import (
    SHOWN,
    Place,
    check_places,
    check_visibility,
    cpu_share,
    gpu_index,
    numa_of,
    parse_ranges,
    place,
    ranges,
    table,
)
from batchinfer.types import ExitCode, JobError


def test_ranks_with_the_same_cpus_share_them() -> None:
    cpus = [("a", (0, 1, 2, 3)), ("a", (0, 1, 2, 3)), ("b", (0, 1, 2, 3)), ("b", (4, 5)), ("b", (6,))]
    places = [Place(host, of) for host, of in cpus]
    assert [cpu_share(places, rank) for rank in range(5)] == [2, 2, 4, 2, 1]
    assert cpu_share([Place("a", (0, 1), gpu=str(i)) for i in range(5)], 3) == 1


@pytest.mark.parametrize("numbers", [(), (0,), (0, 1, 2, 3), (0, 2, 4), (1, 2, 8, 10, 11)])
def test_lists_of_cpus_are_written_as_linux_does(numbers: tuple[int, ...]) -> None:
    assert tuple(parse_ranges(ranges(numbers))) == numbers


def test_the_domains_of_some_cores() -> None:
    domains = {0: "0-3,16-19", 1: "4-7,20-23", 2: ""}
    assert numa_of((16, 17), domains) == (0,)
    assert numa_of((3, 4), domains) == (0, 1)
    assert numa_of((99,), domains) == ()


def test_the_table_shows_each_rank_and_what_is_far() -> None:
    places = [
        Place("node1", (0, 1, 2, 3), (0,), "0000:c1:00.0", 0),
        Place("node1", (4, 5), (1,), "0000:d1:00.0", 3),
        Place("node2", (0, 2), ()),
    ]
    head, *lines = table(places).splitlines()
    assert head.split() == ["rank", "host", "cores", "NUMA", "GPU"]
    assert lines[0].split() == ["0", "node1", "0-3", "0", "0000:c1:00.0"]
    assert lines[1].split()[:5] == ["1", "node1", "4-5", "1", "0000:d1:00.0"]
    assert lines[1].endswith("its cores are far from it: it is in NUMA domain 3")
    assert lines[2].split() == ["2", "node2", "0,2", "-", "-"]
    many = table([Place("n", (0,))] * (SHOWN + 1000)).splitlines()
    assert len(many) == SHOWN + 2
    assert many[-1].strip() == "and 1,000 ranks more"


def test_two_ranks_on_one_gpu_are_refused() -> None:
    check_places([Place("a", (0,), gpu="x"), Place("b", (0,), gpu="x"), Place("a", (0,)), Place("a", (0,))])
    check_places([Place("a", (0,), gpu="x", uuid=slice_of_it) for slice_of_it in "12"])
    with pytest.raises(JobError, match=r"ranks 0, 2 would share one GPU \(x on a\).*--ntasks-per-node") as caught:
        check_places([Place("a", (0,), gpu="x"), Place("a", (1,), gpu="y"), Place("a", (2,), gpu="x")])
    assert caught.value.exit_code == ExitCode.UNFIT


@pytest.mark.parametrize("second", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
def test_visibility_variables_that_compose_are_refused(second: str) -> None:
    check_visibility({})
    check_visibility({"ROCR_VISIBLE_DEVICES": "0"})
    check_visibility({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"})  # ROCm takes them for one
    with pytest.raises(JobError, match=f"ROCR_VISIBLE_DEVICES=1 and {second}=0.*unset one") as caught:
        check_visibility({"ROCR_VISIBLE_DEVICES": "1", second: "0"})
    assert caught.value.exit_code == ExitCode.UNFIT


def test_ranks_go_round_the_gpus_that_they_see() -> None:
    assert [gpu_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0]  # the launcher shows each its own


def test_this_process_has_a_place() -> None:
    found = place("here", 0, gpus=False)
    assert found.host == "here"
    assert set(found.cpus) == os.sched_getaffinity(0)
    assert found.gpu == ""


class Driver:
    """What the probe asks of libcuda.so.1 and libamdhip64.so. ``status``: what each call returns, 0 for success."""

    def __init__(self, addresses: list[str], status: int = 0):
        self.addresses, self.status = addresses, status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = len(self.addresses)
        return self.status

    def cuDeviceGetPCIBusId(self, text: ctypes.Array, length: int, device: int) -> int:
        text.value = self.addresses[device].encode()
        return self.status

    hipGetDeviceCount, hipDeviceGetPCIBusId = cuDeviceGetCount, cuDeviceGetPCIBusId


@pytest.mark.parametrize("library", ["libcuda.so.1", "libamdhip64.so"])
def test_the_driver_says_which_gpus_a_rank_sees(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        if name != library:
            raise OSError(name)
        return Driver(["0000:C1:00.0", "00000000:D1:00.0"])

    monkeypatch.setattr(binding.ctypes, "CDLL", load)
    for name in binding.VISIBILITY:
        monkeypatch.delenv(name, raising=False)
    assert [place("here", rank, gpus=True).gpu for rank in range(3)] == ["0000:c1:00.0", "0000:d1:00.0", "0000:c1:00.0"]


def test_a_driver_that_fails_shows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding.ctypes, "CDLL", lambda name: Driver(["0000:c1:00.0"], status=100))
    assert place("here", 0, gpus=True).gpu == ""
