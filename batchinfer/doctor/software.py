"""Probes of what is installed: the extension, torch, GPU drivers, MPI, Python packages. Nothing is changed, no GPU
memory is touched, MPI is not initialised."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version

from batchinfer.cluster.launch import srun_mpi_type
from batchinfer.cluster.world import mpi_library
from batchinfer.doctor.facts import Build, Gpu, Gpus, Mpi, Torch
from batchinfer.doctor.system import installed_gpus, nvidia_driver
from batchinfer.ops import choice
from batchinfer.ops.choice import find_gpus, torch_build

VARIABLES = re.compile(
    r"(CUDA|HIP|ROCR)_VISIBLE_DEVICES|ZE_\w+|MPICH_GPU_SUPPORT_ENABLED|MPICH_OFI_NIC_POLICY|SLURM_JOB_ID|SLURM_NTASKS|"
    r"SLURM_CPUS_PER_TASK|SRUN_CPUS_PER_TASK|BATCHINFER_(?!TEST)\w+|OMP_NUM_THREADS|LOADEDMODULES"
)


def build() -> Build:
    try:
        from batchinfer import _engine, _ops  # noqa: F401

        cpu = _ops.Cpu(1)
    except (ImportError, RuntimeError, ValueError) as error:
        return Build(error=str(error))
    info = _ops.build_info
    isas = {"compiler": info["compiler"], "isas": info["isas"], "usable": info["usable_isas"], "isa": cpu.isa}
    if importlib.util.find_spec("batchinfer._gpu") is None:
        return Build(**isas)
    from batchinfer import _gpu

    gpu = _gpu.build_info
    return Build(**isas, device=_gpu.compiled_for, toolkit=gpu["toolkit"], architectures=tuple(gpu["architectures"]))


def torch() -> Torch:
    try:
        return Torch(**torch_build())
    except (ImportError, OSError, RuntimeError) as error:
        return Torch(error=str(error).split("\n")[0])


def gpus(loaded: Torch) -> Gpus:
    supports, visible = nvidia_gpus()
    found = choice.Gpus(reason="torch can't be imported") if loaded.error else find_gpus()
    driver = nvidia_driver() or ("unknown" if supports else "")
    return Gpus(installed_gpus(), driver, supports, visible, found.count, found.reason, found.triton)


def nvidia_gpus() -> tuple[str, tuple[Gpu, ...]]:
    """The CUDA version that the driver runs ("" without a driver), and the GPUs that it shows. No context is made."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "", ()
    number, text, memory = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    cuda.cuDriverGetVersion(ctypes.byref(number))
    supports = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return supports, ()

    def attribute(which: int, device: int) -> int:
        value = ctypes.c_int(0)
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    found = []
    for device in range(number.value):
        cuda.cuDeviceGetName(text, len(text), device)
        name = text.value.decode()
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        cuda.cuDeviceGetPCIBusId(text, len(text), device)
        capability = f"{attribute(75, device)}.{attribute(76, device)}"  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        found.append(Gpu(name, capability, memory.value, text.value.decode().lower()))
    return supports, tuple(found)


def mpi() -> Mpi:
    library, error = mpi_library()
    srun = shutil.which("srun")
    listed = subprocess.run([srun, "--mpi=list"], capture_output=True, text=True) if srun else None
    types = listed.stdout + listed.stderr if listed else ""
    try:
        with open("/proc/self/maps") as file:
            gtl = "libmpi_gtl_" in file.read()
    except OSError:
        gtl = False
    aware = gpu_aware(library or "", _ompi_info(), os.environ.get("MPICH_GPU_SUPPORT_ENABLED"), gtl)
    return Mpi(library, error, shutil.which("mpiexec"), srun, types, srun_mpi_type(library, types), aware, gtl)


def gpu_aware(library: str, ompi_info: str, cray_enabled: str | None, gtl: bool) -> bool | None:
    """Whether an MPI library takes addresses of GPU memory: Open MPI says so (``ompi_info --parsable --all``), Cray
    MPICH does with its transport ``gtl`` loaded and MPICH_GPU_SUPPORT_ENABLED=1; others do not tell (None)."""
    if "CRAY" in library.upper():
        return gtl and cray_enabled == "1"
    if library.startswith("Open MPI"):
        told = re.search(
            r"mpi_built_with_cuda_support:value:(true|false)|accelerator:(cuda|rocm|ze):version", ompi_info
        )
        return None if not ompi_info else bool(told and told[0].find("false") < 0)
    return None


def _ompi_info() -> str:
    program = shutil.which("ompi_info")
    if not program:
        return ""
    return subprocess.run([program, "--parsable", "--all"], capture_output=True, text=True, errors="replace").stdout


def packages() -> tuple[tuple[str, str | None, str], ...]:
    """What this installation requires: name, installed version or None, lower bound."""
    wanted = [re.fullmatch(r"([\w.-]+)>=([\w.]+)", line) for line in requires("batchinfer") or ()]
    return tuple((match[1], _version(match[1]), match[2]) for match in wanted if match)


def optional_packages() -> dict[str, str | None]:
    return {name: _version(name) for name in ("mpi4py", "llguidance", "triton")}


def variables() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value) for key, value in os.environ.items() if VARIABLES.fullmatch(key)))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
