"""The table of ranks and what it refuses, from places made up for the purpose."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from batchinfer.cluster import binding
from batchinfer.cluster.binding import (
    SHOWN,
    Place,
    check_places,
    cpu_share,
    gpu_index,
    intel_gpus,
    numa_of,
    parse_ranges,
    place,
    ranges,
    table,
)
from batchinfer.cluster.visibility import FORMS
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
        Place("node2", (1,), (), "0000:1a:00.0", part="tile 1"),
    ]
    head, *lines = table(places).splitlines()
    assert head.split() == ["rank", "host", "cores", "NUMA", "GPU"]
    assert lines[0].split() == ["0", "node1", "0-3", "0", "0000:c1:00.0"]
    assert lines[1].split()[:5] == ["1", "node1", "4-5", "1", "0000:d1:00.0"]
    assert lines[1].endswith("its cores are far from it: it is in NUMA domain 3")
    assert lines[2].split() == ["2", "node2", "0,2", "-", "-"]
    assert lines[3].split() == ["3", "node2", "1", "-", "0000:1a:00.0", "tile", "1"]
    many = table([Place("n", (0,))] * (SHOWN + 1000)).splitlines()
    assert len(many) == SHOWN + 2
    assert many[-1].strip() == "and 1,000 ranks more"


def test_two_ranks_on_one_gpu_are_refused() -> None:
    check_places([Place("a", (0,), gpu="x"), Place("b", (0,), gpu="x"), Place("a", (0,)), Place("a", (0,))])
    check_places([Place("a", (0,), gpu="x", part=slice_of_it) for slice_of_it in "12"])
    with pytest.raises(JobError, match=r"ranks 0, 2 would share one GPU \(x on a\).*--ntasks-per-node") as caught:
        check_places([Place("a", (0,), gpu="x"), Place("a", (1,), gpu="y"), Place("a", (2,), gpu="x")])
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
    for name in FORMS:
        monkeypatch.delenv(name, raising=False)
    assert [place("here", rank, gpus=True).gpu for rank in range(3)] == ["0000:c1:00.0", "0000:d1:00.0", "0000:c1:00.0"]


def test_a_driver_that_fails_shows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding.ctypes, "CDLL", lambda name: Driver(["0000:c1:00.0"], status=100))
    assert place("here", 0, gpus=True).gpu == ""


@pytest.mark.parametrize("driver", ["xe", "i915"])
def test_linux_says_which_tiles_there_are(driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards of two tiles, one of one, and what is no GPU of Intel's."""
    for address, vendor, kind, tiles in (
        ("0000:9a:00.0", "0x8086", "0x038000", 2),
        ("0000:18:00.0", "0x8086", "0x038000", 2),
        ("0000:31:00.0", "0x8086", "0x030000", 1),
        ("0000:41:00.0", "0x8086", "0x020000", 0),
        ("0000:51:00.0", "0x10de", "0x030200", 1),
    ):
        device = tmp_path / address
        (device / "drm/renderD128").mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
        for tile in range(tiles):
            (device / (f"tile{tile}" if driver == "xe" else f"drm/card0/gt/gt{tile}")).mkdir(parents=True)
    monkeypatch.setattr(binding, "PCI", tmp_path)
    first, second, third = "0000:18:00.0", "0000:31:00.0", "0000:9a:00.0"
    every = [(first, "tile 0"), (first, "tile 1"), (second, ""), (third, "tile 0"), (third, "tile 1")]
    assert intel_gpus({}) == every
    assert intel_gpus({"ZE_AFFINITY_MASK": "1,3"}) == [every[1], every[3]]
    assert intel_gpus({"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}) == [(first, ""), (second, ""), (third, "")]


def test_a_list_of_slices_is_narrowed_to_the_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding.ctypes, "CDLL", lambda name: Driver(["0000:c1:00.0"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a,MIG-2b")
    assert place("here", 1, gpus=True).gpu == "0000:c1:00.0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-2b"
