"""Which rank sits where: host, cores, NUMA domains, GPU. Gathered at the start, printed by rank 0, and checked.

A :class:`Place` is plain data and every decision a function of places; the probes below read what Linux and the GPU's
driver say to this process. Visibility variables that a launcher has set are obeyed (visibility.py), and never changed,
but for lists of slices of a GPU (MIG), of which CUDA shows each process one.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchinfer.cluster.visibility import check_visibility, intel_devices, own_slice
from batchinfer.types import ExitCode, JobError

SHOWN = 64
"""Ranks in the printed table; a thousand lines help nobody."""

NODES = Path("/sys/devices/system/node")
PCI = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Place:
    """One rank's. ``cpus`` it may run on, and the NUMA domains ``numa`` in which they lie. ``gpu`` is the PCI address
    of the GPU that it will use, which lies in domain ``gpu_numa`` (None where unknown); "" if it uses none. ``part``:
    the UUID of that GPU or of the slice of it (MIG) that the rank sees, where the driver tells, or Intel's "tile 1"; ""
    is all of it. ``shares``: it computes on the
    CPU, and may do so with weights that another rank has packed (sharing.py)."""

    host: str
    cpus: tuple[int, ...]
    numa: tuple[int, ...] = ()
    gpu: str = ""
    gpu_numa: int | None = None
    shares: bool = False
    part: str = ""


def place(host: str, local_rank: int, gpus: bool, shares: bool = False) -> Place:
    """This process's. ``gpus``: the engine may use GPUs. JobError(69) for visibility variables that contradict."""
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    numa = numa_of(cpus, {int(path.name[4:]): _read(path / "cpulist") for path in NODES.glob("node[0-9]*")})
    if not gpus:
        return Place(host, cpus, numa, shares=shares)
    check_visibility(os.environ)
    if mine := own_slice(os.environ, local_rank):
        os.environ["CUDA_VISIBLE_DEVICES"] = mine
    visible = _visible_gpus() or intel_gpus(os.environ)
    gpu, part = visible[gpu_index(local_rank, len(visible))] if visible else ("", "")
    near = _read(PCI / gpu.lower() / "numa_node") if gpu else ""
    return Place(host, cpus, numa, gpu, int(near) if near.isdecimal() else None, part=part)


def gpu_index(local_rank: int, visible: int) -> int:
    """Which of the ``visible`` GPUs a rank takes. A launcher that binds shows each rank one, else they go round."""
    return local_rank % visible


def check_places(places: Sequence[Place]) -> None:
    """JobError(69) if two ranks use one GPU, or one slice of it. (Each would take it for its own, and its memory.)"""
    users: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for rank, at in enumerate(places):
        if at.gpu:
            users[at.host, at.gpu, at.part].append(rank)
    for (host, gpu, _), ranks in users.items():
        if len(ranks) > 1:
            shared = ", ".join(str(rank) for rank in ranks)
            raise JobError(
                f"ranks {shared} would share one GPU ({gpu} on {host}): start as many ranks per node as it has GPUs "
                "(--ntasks-per-node), or give each its own (--gpus-per-task=1 --gpu-bind=closest); "
                "engine.device=cpu computes without",
                ExitCode.UNFIT,
            )


def table(places: Sequence[Place]) -> str:
    """A line for each rank, with a remark where its cores are far from its GPU."""
    lines = ["rank  host              cores                 NUMA   GPU"]
    for rank, at in enumerate(places[:SHOWN]):
        far = at.gpu_numa is not None and at.numa and at.gpu_numa not in at.numa
        remark = f"  its cores are far from it: it is in NUMA domain {at.gpu_numa}" if far else ""
        gpu = f"{at.gpu} {at.part}" if at.part.startswith("tile") else at.gpu or "-"
        line = f"{rank:4}  {at.host:16}  {ranges(at.cpus):20}  {ranges(at.numa) or '-':5}  {gpu}{remark}"
        lines.append(line)
    if len(places) > SHOWN:
        lines.append(f"      and {len(places) - SHOWN:,} ranks more")
    return "\n".join(lines)


def cpu_share(places: Sequence[Place], rank: int) -> int:
    """CPUs for one rank: ranks of a host that a launcher did not bind apart share theirs."""
    mine = places[rank]
    sharing = sum((at.host, at.cpus) == (mine.host, mine.cpus) for at in places)
    return max(1, len(mine.cpus) // sharing)


def numa_of(cpus: Sequence[int], domains: Mapping[int, str]) -> tuple[int, ...]:
    """NUMA domains of these CPUs. ``domains``: number -> list of CPUs as Linux writes it, "0-3,8-11"."""
    return tuple(sorted(number for number, text in domains.items() if set(cpus) & set(parse_ranges(text))))


def parse_ranges(text: str) -> list[int]:
    """0-3,8 -> [0, 1, 2, 3, 8]."""
    spans = [part.split("-") for part in text.strip().split(",") if part]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


def ranges(numbers: Sequence[int]) -> str:
    """The inverse: (0, 1, 2, 3, 8) -> 0-3,8."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _visible_gpus() -> list[tuple[str, str]]:
    """PCI addresses and UUIDs of the GPUs that the driver shows this process, in its order; cgroups and visibility
    variables are its business. No device is opened: cuInit and hipGetDeviceCount make no context."""
    for library, count, address in (
        ("libcuda.so.1", "cuDeviceGetCount", "cuDeviceGetPCIBusId"),
        ("libamdhip64.so", "hipGetDeviceCount", "hipDeviceGetPCIBusId"),
    ):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        number, text = ctypes.c_int(0), ctypes.create_string_buffer(64)
        if library.startswith("libcuda") and driver.cuInit(0) != 0:
            continue
        if getattr(driver, count)(ctypes.byref(number)) != 0:
            continue
        found = []
        for device in range(number.value):
            if getattr(driver, address)(text, len(text), device) == 0:
                pci = re.sub(r"^0000(?=[0-9A-Fa-f]{4}:)", "", text.value.decode()).lower()
                found.append((pci, _uuid(driver, device)))
        if found:
            return found
    return []


def intel_gpus(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """PCI addresses and tiles of Intel's GPUs that Level Zero will show, by what Linux knows of them: cards in the
    order of their addresses, which ZE_ENABLE_PCI_ID_DEVICE_ORDER=1 makes the driver's."""
    cards = [
        path
        for path in sorted(PCI.glob("*"))
        if _read(path / "vendor") == "0x8086" and any(path.glob("drm/renderD*")) and _read(path / "class")[:4] == "0x03"
    ]
    tiles = [len(list(path.glob("tile*")) or list(path.glob("drm/card*/gt/gt*"))) or 1 for path in cards]  # xe, i915
    return [(cards[device.card].name, device.part) for device in intel_devices(tiles, environment)]


def _uuid(driver: ctypes.CDLL, device: int) -> str:
    """By NVIDIA's driver (of CUDA 11.4 and later), whose slices of a GPU have its address and a UUID of their own."""
    data = ctypes.create_string_buffer(16)
    known = hasattr(driver, "cuDeviceGetUuid_v2") and driver.cuDeviceGetUuid_v2(data, device) == 0
    return data.raw.hex() if known else ""
