"""The doctor's probes of Linux, on trees of files that stand for nodes that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.doctor.facts import Nic
from batchinfer.doctor.software import gpu_aware
from batchinfer.doctor.system import file_system, installed_gpus, mount_of, nics, node, nvidia_driver


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def pci(address: str, vendor: str, kind: str) -> dict[str, str]:
    return {f"sys/bus/pci/devices/{address}/{name}": text for name, text in (("vendor", vendor), ("class", kind))}


@pytest.mark.parametrize(
    ("devices", "found"),
    [
        ([("0x10de", "0x030200")] * 4 + [("0x1a03", "0x030000")], {"cuda": 4}),  # and a console
        ([("0x10de", "0x030000"), ("0x10de", "0x040300")], {"cuda": 1}),  # a workstation's card, and its sound
        ([("0x1002", "0x038000")] * 8, {"rocm": 8}),
        ([("0x1002", "0x120000")] * 4, {"rocm": 4}),  # MI300A
        ([("0x8086", "0x038000")] * 6 + [("0x8086", "0x030000")], {"xpu": 6}),
        ([("0x8086", "0x060400")], {}),
    ],
)
def test_gpus_on_the_bus_are_counted_without_a_driver(
    devices: list[tuple[str, str]], found: dict[str, int], tmp_path: Path
) -> None:
    for index, (vendor, kind) in enumerate(devices):
        write(tmp_path, pci(f"0000:{index:02x}:00.0", vendor, kind))
    assert installed_gpus(tmp_path) == found


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 01:01:27 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@host)",
    ],
)
def test_the_version_of_the_driver(line: str, tmp_path: Path) -> None:
    assert nvidia_driver(tmp_path) == ""
    assert nvidia_driver(write(tmp_path, {"proc/driver/nvidia/version": line})) == "570.86.15"


def test_adapters(tmp_path: Path) -> None:
    ethernet = {
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/eno1/operstate": "up",
        "sys/class/net/eno1/speed": "10000",
        "sys/class/net/eno1/device/vendor": "0x8086",
        "sys/class/net/eno2/operstate": "down",
        "sys/class/net/eno2/device/vendor": "0x8086",
    }
    assert nics(write(tmp_path, ethernet)) == (Nic("eno1", "Ethernet", "up", 10),)
    slingshot = {"operstate": "up", "speed": "200000", "device/vendor": "0x17db"}
    write(tmp_path, {f"sys/class/net/hsn0/{name}": text for name, text in slingshot.items()})
    infiniband = {"link_layer": "InfiniBand", "state": "1: DOWN", "rate": "400 Gb/sec (4X NDR)"}
    write(tmp_path, {f"sys/class/infiniband/mlx5_0/ports/1/{name}": text for name, text in infiniband.items()})
    assert nics(tmp_path) == (
        Nic("mlx5_0:1", "InfiniBand", "DOWN", 400),
        Nic("hsn0", "Slingshot", "up", 200),
    )


MOUNTS = r"""
overlay / overlay rw,relatime 0 0
tmpfs /dev/shm tmpfs rw 0 0
10.1.1.1@o2ib:/scratch /scratch lustre rw,flock 0 0
server:/home /home nfs4 rw 0 0
server:/models /home/shared\040models nfs4 ro,vers=4.2 0 0
"""


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/scratch/me/out", ("/scratch", "lustre", "rw,flock")),
        ("/scratch2", ("/", "overlay", "rw,relatime")),
        ("/home/shared models/llama", ("/home/shared models", "nfs4", "ro,vers=4.2")),
        ("/dev/shm", ("/dev/shm", "tmpfs", "rw")),
    ],
)
def test_a_path_lies_on_the_innermost_mount(path: str, mount: tuple[str, str, str]) -> None:
    assert mount_of(path, MOUNTS) == mount


def test_a_file_system_is_that_of_the_links_target(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    found = file_system(str(link), f"x / ext4 rw 0 0\ny {real} lustre ro 0 0\n")
    assert (found.path, found.mounted_at, found.kind, found.read_only) == (str(link), str(real), "lustre", True)
    assert found.free > 0


def test_the_processor(tmp_path: Path) -> None:
    text = "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1"
    found = node(write(tmp_path, {"proc/cpuinfo": text}))
    assert found.cpu == "AMD EPYC 9654"
    assert found.flags == {"fpu", "avx2", "avx512_bf16"}
    assert set(found.cpus_here) <= set(range(1024))


@pytest.mark.parametrize(
    ("library", "info", "cray", "gtl", "aware"),
    [
        ("Open MPI v4.1.4", "mca:mpi:base:param:mpi_built_with_cuda_support:value:true", None, False, True),
        ("Open MPI v4.1.4", "mca:mpi:base:param:mpi_built_with_cuda_support:value:false", None, False, False),
        ("Open MPI v5.0.3", "mca:accelerator:rocm:version:5.0.3", None, False, True),
        ("Open MPI v5.0.3", "", None, False, None),
        ("MPI VERSION    : CRAY MPICH version 8.1", "", "1", True, True),
        ("MPI VERSION    : CRAY MPICH version 8.1", "", None, True, False),
        ("MPICH Version:      5.0.2", "", None, False, None),
    ],
)
def test_gpu_awareness(library: str, info: str, cray: str | None, gtl: bool, aware: bool | None) -> None:
    assert gpu_aware(library, info, cray, gtl) is aware
