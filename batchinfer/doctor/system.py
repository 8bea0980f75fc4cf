"""Probes of Linux: CPU, PCI bus, network adapters, file systems. They read /proc and /sys below ``root``."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from pathlib import Path

from batchinfer.doctor.facts import FileSystem, Nic, Node
from batchinfer.engine.memory import free_memory

PCI_VENDORS = {"0x10de": "cuda", "0x1002": "rocm", "0x8086": "xpu"}
PCI_GPU_CLASSES = ("0x0302", "0x0380", "0x1200")
"""3D and other display controllers, processing accelerators: what computes. 0x0300 drives a screen, but NVIDIA's
workstation cards are of it too; an Intel or AMD one is mostly a console."""
PCI_SCREEN = "0x0300"

ROOT = Path("/")


def node(root: Path = ROOT) -> Node:
    cpu, flags = platform.processor(), frozenset[str]()
    for line in read(root / "proc/cpuinfo").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name":
            cpu = value
        elif name in ("flags", "Features"):
            flags = frozenset(value.split())
            break
    try:
        free = free_memory()
    except OSError:  # not Linux
        free = 0
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Node(
        host=platform.node(),
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cpu=cpu,
        cpus=os.cpu_count() or 1,
        cpus_here=tuple(sorted(here)),
        flags=flags,
        free_memory=free,
    )


def installed_gpus(root: Path = ROOT) -> dict[str, int]:
    """Device name (cuda, rocm, xpu) -> GPUs on the PCI bus, whether or not a driver shows them to anybody."""
    found: Counter[str] = Counter()
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor, kind = PCI_VENDORS.get(read(device / "vendor")), read(device / "class")[:6]
        if vendor and (kind in PCI_GPU_CLASSES or (kind == PCI_SCREEN and vendor == "cuda")):
            found[vendor] += 1
    return dict(found)


def nvidia_driver(root: Path = ROOT) -> str:
    """Version of NVIDIA's kernel module, "" without one."""
    match = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", read(root / "proc/driver/nvidia/version"))
    return match[1] if match else ""


def nics(root: Path = ROOT) -> tuple[Nic, ...]:
    """Adapters of InfiniBand, RoCE and Slingshot (hsn*); plain Ethernet only where there is none of them."""
    fast, plain = [], []
    for device in sorted((root / "sys/class/infiniband").glob("*")):
        for port in sorted((device / "ports").glob("*")):
            kind = read(port / "link_layer") or "InfiniBand"
            state, rate = read(port / "state").partition(":")[2].strip(), re.match(r"\d+", read(port / "rate"))
            fast.append(Nic(f"{device.name}:{port.name}", kind, state, int(rate[0]) if rate else 0))
    for device in sorted((root / "sys/class/net").glob("*")):
        if not (device / "device").exists():  # loopback, bridges, virtual pairs
            continue
        speed = read(device / "speed")
        gbit = int(speed) // 1000 if speed.isdecimal() else 0
        slingshot = device.name.startswith("hsn")
        entry = Nic(device.name, "Slingshot" if slingshot else "Ethernet", read(device / "operstate"), gbit)
        (fast if slingshot else plain).append(entry)
    return tuple(fast or [nic for nic in plain if nic.state == "up"])


def file_system(path: str, mounts: str | None = None) -> FileSystem:
    """Where an existing path lies. ``mounts``: text in the form of /proc/self/mounts."""
    real = os.path.realpath(path)
    mounted_at, kind, options = mount_of(real, read(ROOT / "proc/self/mounts") if mounts is None else mounts)
    space = os.statvfs(real)
    return FileSystem(
        path=path,
        mounted_at=mounted_at,
        kind=kind,
        free=space.f_bavail * space.f_frsize,
        free_files=space.f_favail if space.f_files else None,
        read_only="ro" in options.split(","),
    )


def mount_of(real: str, mounts: str) -> tuple[str, str, str]:
    """Mount point, kind and options of the mount on which the absolute path ``real`` lies: the longest one that it
    begins with, and of equal ones the last. ("/", "unknown", "") where the table says nothing."""
    best = ("/", "unknown", "")
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[1])  # \040 is a blank
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, fields[2], fields[3])
    return best


def read(path: Path) -> str:
    """A small file's text without blanks around it; "" if it can't be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
