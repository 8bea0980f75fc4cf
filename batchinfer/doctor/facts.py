"""What the doctor looks at, as plain data: the build, the node, the software around it. No probe, no judgement."""

from __future__ import annotations

from dataclasses import dataclass

VENDORS = {"cuda": "NVIDIA", "rocm": "AMD", "xpu": "Intel"}
"""Device name of a build -> who makes such GPUs."""


@dataclass(frozen=True)
class Build:
    """The compiled extension. ``error``: why it can't be used, "" if it can. ``isas``: the sets of CPU kernels in it,
    ``usable`` those that this CPU runs, ``isa`` the one that is taken. ``device``: cuda, rocm, xpu, or cpu alone, with
    the ``toolkit`` version that compiled for it and the ``architectures`` as CMake names them ("90a-real")."""

    error: str = ""
    compiler: str = ""
    isas: tuple[str, ...] = ()
    usable: tuple[str, ...] = ()
    isa: str = ""
    device: str = "cpu"
    toolkit: str = ""
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Torch:
    """``device``: what torch is built for, with the version of its ``toolkit``; ``architectures`` as it names them
    ("sm_90", "compute_90", "gfx90a"). ``usable``: GPUs that it shows; ``error``: why it can't be imported."""

    version: str = ""
    device: str = "cpu"
    toolkit: str = ""
    architectures: tuple[str, ...] = ()
    usable: int = 0
    error: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver shows to this process. ``capability``: "9.0" (NVIDIA). ``memory``: bytes."""

    name: str
    capability: str
    memory: int
    address: str = ""


@dataclass(frozen=True)
class Gpus:
    """``installed``: device name of the vendor -> GPUs of his on the PCI bus, whether or not a driver shows them.
    ``driver``: version of NVIDIA's driver, and ``supports``, the newest CUDA that it runs ("13.0"); "" without one.
    ``visible``: what the driver shows here. ``usable``: the extension and torch together can use so many, and
    ``reason`` why none. ``triton``: Triton is installed, whose kernels serve a build without ones of its own."""

    installed: dict[str, int]
    driver: str = ""
    supports: str = ""
    visible: tuple[Gpu, ...] = ()
    usable: int = 0
    reason: str = ""
    triton: bool = False


@dataclass(frozen=True)
class Mpi:
    """``library``: first line of its version text, None without mpi4py or library; ``error``: why not. ``gpu_aware``:
    whether it takes addresses of GPU memory, None where it does not say. ``srun_types``: what srun --mpi=list prints,
    and ``srun_mpi`` the one for this library."""

    library: str | None = None
    error: str = ""
    mpiexec: str | None = None
    srun: str | None = None
    srun_types: str = ""
    srun_mpi: str | None = None
    gpu_aware: bool | None = None
    gtl: bool = False
    """Cray MPICH's GPU transport is loaded."""


@dataclass(frozen=True)
class Nic:
    """A network adapter that MPI could use. ``state``: "ACTIVE" or "up" when it works; ``gbit``: its rate or 0."""

    name: str
    kind: str
    state: str
    gbit: int = 0


@dataclass(frozen=True)
class FileSystem:
    """Where a path lies. ``kind``: as in /proc/mounts. ``free``: bytes for this user; ``free_files``: inodes, or None
    where the file system does not count them."""

    path: str
    mounted_at: str
    kind: str
    free: int
    free_files: int | None = None
    read_only: bool = False


@dataclass(frozen=True)
class Node:
    host: str
    system: str
    machine: str
    cpu: str
    cpus: int
    cpus_here: tuple[int, ...]
    flags: frozenset[str] = frozenset()
    free_memory: int = 0


@dataclass(frozen=True)
class Facts:
    version: str
    python: str
    build: Build
    torch: Torch
    gpus: Gpus
    node: Node
    mpi: Mpi
    nics: tuple[Nic, ...] = ()
    file_systems: tuple[FileSystem, ...] = ()
    packages: tuple[tuple[str, str | None, str], ...] = ()
    """Name, version (None: not installed), lower bound of each Python package that a job needs."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that decide about devices, MPI and the scheduler, as far as they are set."""

    @property
    def variables(self) -> dict[str, str]:
        return dict(self.environment)
