"""Facts -> findings: what does not fit together, and how to repair it. Pure: no file, no device, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from batchinfer.cluster.visibility import check_visibility
from batchinfer.doctor.facts import VENDORS, Facts, FileSystem
from batchinfer.types import JobError

REBUILD = "BATCHINFER_DEVICE={} pip install --force-reinstall --no-deps --no-build-isolation ."

GIB = 2**30
LITTLE_SPACE = GIB
FEW_FILES = 1000

FLAGS = {"avx2": {"avx2", "fma", "f16c", "bmi2"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
FLAGS["avx512vnni"] = FLAGS["avx512"] | {"avx512_vnni"}
FLAGS["avx512bf16"] = FLAGS["avx512vnni"] | {"avx512_bf16"}
FLAGS["amx"] = FLAGS["avx512bf16"] | {"amx_tile", "amx_bf16", "amx_int8"}
FLAGS["neondotprod"] = {"asimddp"}
FLAGS["neonbf16"] = {"asimddp", "bf16", "i8mm"}
"""Set of kernels -> names in /proc/cpuinfo without which a CPU can't run it."""


@dataclass(frozen=True)
class Finding:
    """``unfit``: a job can't run so, or would not compute where its owner thinks; else it runs, but worse than it
    could. ``fix``: what to do, mostly a command."""

    unfit: bool
    subject: str
    text: str
    fix: str


def judge(facts: Facts) -> list[Finding]:
    """All findings, the ones that make the node unfit first."""
    rules = (
        extension,
        instruction_set,
        missing_gpu,
        gpu_build,
        driver,
        architectures,
        torch_device,
        visibility,
    )
    rules += (packages, mpi, cores, network, file_systems)
    return sorted((finding for rule in rules for finding in rule(facts)), key=lambda finding: not finding.unfit)


def extension(facts: Facts) -> Iterator[Finding]:
    if not facts.build.error:
        return
    text = f"the compiled extension can't be used ({facts.build.error}): plan, status and verify work, run does not"
    yield Finding(True, "build", text, REBUILD.format("cpu"))


def instruction_set(facts: Facts) -> Iterator[Finding]:
    """The CPU can more than the compiler could: kernels that were left out of the build."""
    build, flags = facts.build, facts.node.flags
    lost = [isa for isa, needed in FLAGS.items() if needed <= flags and isa not in build.isas]
    if build.error or not lost:
        return
    text = (
        f"this CPU runs {lost[-1]} kernels, and {build.compiler} compiled none: products take {build.isa or 'others'}"
    )
    yield Finding(False, "build", text, "load a newer compiler (gcc 11 or newer), then " + REBUILD.format("cpu"))


def missing_gpu(facts: Facts) -> Iterator[Finding]:
    """GPUs for which the build has no kernels: a job takes Triton's, or leaves them idle (ops/choice.py)."""
    build, gpus, torch = facts.build, facts.gpus, facts.torch
    for device, count in gpus.installed.items():
        if build.error or not count or build.device != "cpu":
            continue
        node = f"this node has {count} GPU{'s' * (count > 1)} of {VENDORS[device]}"
        rebuild, meant = REBUILD.format(device), "engine.device=cpu, if that is meant"
        if torch.device == device and gpus.usable and gpus.triton:
            text = f"{node}, and this build has no kernels for them: jobs take Triton's"
            text += "" if device == "cuda" else ", which have run on no such GPU yet"
            yield Finding(False, "gpu", text, f"{rebuild} or {meant}")
        elif torch.device == device and gpus.usable:
            text = f"{node}, and neither this build nor Triton has kernels for them: jobs stop at once"
            yield Finding(True, "gpu", text, f"{rebuild} or pip install triton or {meant}")
        else:
            text = f"{node}, and this build computes on the CPU alone: a job would leave them idle"
            yield Finding(True, "gpu", text, f"{rebuild}, with a torch for {device} (or give {meant})")


def gpu_build(facts: Facts) -> Iterator[Finding]:
    """A build for GPUs that can use none; engine.device=auto refuses to run there."""
    build, gpus = facts.build, facts.gpus
    if build.error or build.device == "cpu" or gpus.usable:
        return
    maker, text = VENDORS[build.device], f"this build is for {build.device}, and no GPU can be used: "
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES")
    installed = gpus.installed.get(build.device, 0)
    if not installed and not gpus.visible:
        others = ", ".join(f"{n} of {VENDORS[d]}" for d, n in gpus.installed.items() if n)
        text += f"there is none of {maker} on this node" + (f", but {others}" if others else "")
        fix = "ask the scheduler for a node with GPUs, as in salloc --gpus-per-node=1, or give engine.device=cpu"
    elif hidden is not None and not gpus.visible:
        text += f"CUDA_VISIBLE_DEVICES={hidden} shows none of the {installed} on this node"
        fix = "unset CUDA_VISIBLE_DEVICES, or ask the scheduler for GPUs: --gpus-per-task=1"
    elif not gpus.driver:
        text += f"{maker}'s driver does not answer, though {installed} lie on the PCI bus"
        fix = "tell the centre; in a container start it with the GPUs: apptainer run --nv, docker run --gpus all"
    elif not gpus.visible:
        text += "the driver shows none to this process"
        fix = "ask the scheduler for GPUs: --gpus-per-task=1"
    else:
        text += gpus.reason or "torch shows none"
        fix = f"install a torch for {build.device}"
    yield Finding(True, "gpu", text, fix)


def driver(facts: Facts) -> Iterator[Finding]:
    """NVIDIA's drivers run what was compiled with the same major version of CUDA or an older one."""
    gpus = facts.gpus
    if not gpus.supports:
        return
    for what, device, toolkit in (
        ("this build", facts.build.device, facts.build.toolkit),
        (f"torch {facts.torch.version}", facts.torch.device, facts.torch.toolkit),
    ):
        if device != "cuda" or not toolkit or _major(toolkit) <= _major(gpus.supports):
            continue
        text = f"{what} is of CUDA {toolkit}, and the driver {gpus.driver} runs CUDA {gpus.supports} and older"
        other = f"a torch for CUDA {_major(gpus.supports)}"
        rebuild = f"load a CUDA {_major(gpus.supports)} module, then " + REBUILD.format("cuda")
        yield Finding(True, "driver", text, rebuild if what == "this build" else f"install {other}")


def architectures(facts: Facts) -> Iterator[Finding]:
    """Every visible GPU needs machine code of its generation, or PTX of an older one."""
    build = facts.build
    for capability in sorted({gpu.capability for gpu in facts.gpus.visible if gpu.capability}):
        name = next(gpu.name for gpu in facts.gpus.visible if gpu.capability == capability)
        arch = capability.replace(".", "")
        if _number(arch) < 70:
            text = f"{name} has compute capability {capability}, and kernels need 7.0"
            yield Finding(True, "gpu", text, "use newer GPUs, or give engine.device=cpu")
        elif build.device == "cuda" and build.architectures and not runs_on(build.architectures, capability):
            text = f"{name} has compute capability {capability}; the build has {' '.join(build.architectures)}"
            fix = f"CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES={arch} {REBUILD.format('cuda')}"
            yield Finding(True, "gpu", text, fix)
        torch = facts.torch
        named = tuple(_cmake_name(a) for a in torch.architectures)
        if torch.device == "cuda" and named and not runs_on(named, capability):
            text = (
                f"{name} has compute capability {capability}; torch {torch.version} has {' '.join(torch.architectures)}"
            )
            yield Finding(True, "torch", text, "install a torch that was built for it (older CUDA for older GPUs)")


def runs_on(architectures: tuple[str, ...], capability: str) -> bool:
    """Whether code of one of these ("80-real", "90a-real", "100-virtual", or "80": both) runs on compute capability
    ``capability``: machine code on the same major version and no older minor one (90a on 9.0 alone), PTX on anything
    newer."""
    major, minor = (int(part) for part in capability.split("."))
    for architecture in architectures:
        number, special, kind = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", architecture).groups()
        of_major, of_minor = divmod(int(number), 10)
        if special == "a":
            found = (of_major, of_minor) == (major, minor)
        elif kind == "-real" or special:
            found = of_major == major and of_minor <= minor
        else:
            found = (of_major, of_minor) <= (major, minor)
        if found:
            return True
    return False


def torch_device(facts: Facts) -> Iterator[Finding]:
    build, torch = facts.build, facts.torch
    if torch.error:
        yield Finding(True, "torch", f"torch can't be imported: {torch.error}", "pip install --force-reinstall torch")
    elif build.device != "cpu" and torch.device != build.device and facts.gpus.visible:
        text = f"this build is for {build.device}, and torch {torch.version} for {torch.device}"
        yield Finding(True, "torch", text, f"install a torch for {build.device}; batchinfer need not be built again")


def visibility(facts: Facts) -> Iterator[Finding]:
    try:
        check_visibility(facts.variables)
    except JobError as error:
        yield Finding(True, "environment", str(error), f"unset {str(error).split('=')[0]}")


def packages(facts: Facts) -> Iterator[Finding]:
    for name, version, least in facts.packages:
        if version is None:
            yield Finding(True, "packages", f"the Python package {name} is missing", f"pip install '{name}>={least}'")
        elif _numbers(version) < _numbers(least):
            text = f"{name} {version} is too old: {least} or newer is needed"
            yield Finding(True, "packages", text, f"pip install '{name}>={least}'")


def mpi(facts: Facts) -> Iterator[Finding]:
    """A plain run and a job array need no MPI, so most of this is no reason to call a node unfit."""
    found = facts.mpi
    beside = "pip install --no-binary=mpi4py --no-cache-dir mpi4py, with the site's MPI module loaded"
    if found.library is None and (found.srun or found.mpiexec):
        text = f"ranks can be started here, and MPI can't be loaded ({found.error or 'mpi4py is not installed'})"
        yield Finding(False, "mpi", text, f"{beside}; cluster.mpi=off runs ranks without")
    if found.srun and "error:" in found.srun_types:
        text = f"srun does not work here ({found.srun_types.splitlines()[0].strip()})"
        yield Finding(False, "mpi", text, "use a node of the cluster, or start ranks with mpiexec")
    elif found.library and found.srun and found.srun_mpi is None:
        library = " ".join(found.library.split())
        text = f"srun knows no way to start ranks of {library} (--mpi=list: {' '.join(found.srun_types.split())})"
        fix = f"{beside}; or start the ranks with that library's mpiexec; or cluster.mpi=off"
        yield Finding(False, "mpi", text, fix)
    cray = "CRAY" in (found.library or "").upper()
    if cray and facts.variables.get("MPICH_GPU_SUPPORT_ENABLED") == "1" and not found.gtl:
        text = "MPICH_GPU_SUPPORT_ENABLED=1, and Cray's GPU transport is not linked to mpi4py: MPI_Init would abort"
        yield Finding(True, "mpi", text, "unset MPICH_GPU_SUPPORT_ENABLED: batchinfer sends host memory alone")


def cores(facts: Facts) -> Iterator[Finding]:
    """srun binds to one core unless told otherwise; tokenising and writing have threads of their own."""
    here = len(facts.node.cpus_here)
    if here == 1 and facts.node.cpus > 1 and "SLURM_JOB_ID" in facts.variables:
        text = f"this process may use 1 of the node's {facts.node.cpus} CPUs"
        yield Finding(False, "cpu", text, "srun --cpus-per-task=N, or export SRUN_CPUS_PER_TASK=N")


def network(facts: Facts) -> Iterator[Finding]:
    for nic in facts.nics:
        if nic.state.upper() not in ("ACTIVE", "UP"):
            text = f"the {nic.kind} adapter {nic.name} is {nic.state.lower()}: MPI may take a slower network, or hang"
            yield Finding(False, "network", text, "leave out this node (sbatch --exclude) and tell the centre")


def file_systems(facts: Facts) -> Iterator[Finding]:
    for place in facts.file_systems:
        yield from _file_system(place)


def _file_system(place: FileSystem) -> Iterator[Finding]:
    if place.read_only:
        text = f"{place.path} is on a read-only file system ({place.kind}): good for a model, not for output"
        yield Finding(False, "files", text, "choose another output.path")
        return
    if place.free < LITTLE_SPACE:
        text = f"{place.path} has {place.free / GIB:.2f} GiB left ({place.kind} at {place.mounted_at})"
        yield Finding(
            False, "files", text, "make room, or choose another output.path: a job that finds none stops with 74"
        )
    if place.free_files is not None and place.free_files < FEW_FILES:
        text = f"{place.path} has room for {place.free_files} more files"
        yield Finding(False, "files", text, "remove files, or raise output.rows_per_chunk: a chunk is a file")
    if place.kind in ("tmpfs", "ramfs"):
        text = f"{place.path} lies in memory ({place.kind}): it counts as the job's memory and ends with the node"
        yield Finding(False, "files", text, "choose an output.path on the shared file system")
    elif place.kind in ("overlay", "squashfs"):
        text = f"{place.path} lies in the container's own file system ({place.kind})"
        yield Finding(False, "files", text, "bind a folder of the host: apptainer run --bind /scratch")


def _major(version: str) -> int:
    return _numbers(version)[0]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _number(arch: str) -> int:
    return int(re.match(r"\d+", arch)[0])


def _cmake_name(name: str) -> str:
    """torch's sm_90a -> 90a-real, compute_90 -> 90-virtual."""
    kind, _, number = name.partition("_")
    return f"{number}-{'virtual' if kind == 'compute' else 'real'}"
