"""The doctor's judgement of nodes that are not here: what does not fit is found, named, and has its fix."""

from __future__ import annotations

from dataclasses import replace

import pytest
from doctor.nodes import CPU_BUILD, CPU_TORCH, GPU_NODE, H100, LOGIN, V100, change

from batchinfer.doctor.facts import Build, Facts, FileSystem, Nic, Torch
from batchinfer.doctor.judge import FLAGS, judge, runs_on

pytestmark = pytest.mark.feature(
    "commands", "doctor: each misfit of build, driver, GPU, torch, MPI, files with its fix"
)


@pytest.mark.parametrize("facts", [LOGIN, GPU_NODE], ids=["cpu", "cuda"])
def test_a_node_and_a_build_that_fit_have_no_findings(facts: Facts) -> None:
    assert judge(facts) == []


def visible(facts: Facts, **variables: str) -> Facts:
    return replace(facts, environment=tuple(variables.items()))


NO_GPUS = {"installed": {}, "driver": "", "supports": "", "visible": (), "usable": 0}
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.29.30"

UNFIT = {
    "no extension": (change(LOGIN, build={"error": "No module named 'batchinfer._ops'"}), "plan, status", "=cpu pip"),
    "a CPU build on a GPU node": (
        replace(GPU_NODE, build=CPU_BUILD, torch=CPU_TORCH),
        "4 GPUs of NVIDIA, and this build computes on the CPU alone",
        "BATCHINFER_DEVICE=cuda pip install",
    ),
    "a CPU build on a GPU node, with a torch for GPUs and no Triton": (
        replace(GPU_NODE, build=CPU_BUILD),
        "4 GPUs of NVIDIA, and neither this build nor Triton has kernels for them",
        "or pip install triton or engine.device=cpu",
    ),
    "a GPU build on a login node": (change(GPU_NODE, gpus=NO_GPUS), "none of NVIDIA on this node", "--gpus-per-node"),
    "a CUDA build on an AMD node": (
        change(GPU_NODE, gpus={**NO_GPUS, "installed": {"rocm": 8}}),
        "none of NVIDIA on this node, but 8 of AMD",
        "engine.device=cpu",
    ),
    "hidden GPUs": (
        visible(change(GPU_NODE, gpus={"visible": (), "usable": 0}), CUDA_VISIBLE_DEVICES="7"),
        "CUDA_VISIBLE_DEVICES=7 shows none of the 4",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "a container without the driver": (
        change(GPU_NODE, gpus={**NO_GPUS, "installed": {"cuda": 4}}),
        "driver does not answer, though 4 lie on the PCI bus",
        "apptainer run --nv",
    ),
    "a CPU build on a node with Intel's GPUs": (
        replace(change(GPU_NODE, gpus={**NO_GPUS, "installed": {"xpu": 6}}), build=CPU_BUILD, torch=CPU_TORCH),
        "6 GPUs of Intel, and this build computes on the CPU alone",
        "BATCHINFER_DEVICE=xpu pip install",
    ),
    "no GPU in the cgroup": (
        change(GPU_NODE, gpus={"visible": (), "usable": 0}),
        "the driver shows none to this process",
        "--gpus-per-task=1",
    ),
    "an old driver": (
        change(GPU_NODE, gpus={"driver": "535.54", "supports": "12.2"}, build={"toolkit": "13.0.88"}),
        "this build is of CUDA 13.0.88, and the driver 535.54 runs CUDA 12.2 and older",
        "load a CUDA 12 module",
    ),
    "a torch that is too new for the driver": (
        change(GPU_NODE, gpus={"driver": "535.54", "supports": "12.2"}, torch={"toolkit": "13.0"}),
        "torch 2.9.0+cu128 is of CUDA 13.0",
        "install a torch for CUDA 12",
    ),
    "kernels for other GPUs": (
        change(GPU_NODE, build={"architectures": ("80-real",)}),
        "compute capability 9.0; the build has 80-real",
        "CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=90 BATCHINFER_DEVICE=cuda",
    ),
    "a torch for other GPUs": (
        change(GPU_NODE, gpus={"visible": (V100,)}, build={"architectures": ("70-real",)}),
        "compute capability 7.0; torch 2.9.0+cu128 has sm_80 sm_90",
        "older CUDA for older GPUs",
    ),
    "GPUs that are too old": (
        change(GPU_NODE, gpus={"visible": (replace(H100, name="Tesla P100", capability="6.0"),)}),
        "Tesla P100 has compute capability 6.0, and kernels need 7.0",
        "newer GPUs",
    ),
    "a torch for another device": (
        replace(
            change(GPU_NODE, gpus={"usable": 0, "reason": "torch 2.9.0+cpu is built without CUDA"}), torch=CPU_TORCH
        ),
        "torch 2.9.0+cpu is built without CUDA",
        "install a torch for cuda",
    ),
    "a broken torch": (
        replace(LOGIN, torch=Torch(error="libmkl.so.2: no such file")),
        "libmkl.so.2",
        "force-reinstall",
    ),
    "two masks at once": (
        visible(LOGIN, ROCR_VISIBLE_DEVICES="0", HIP_VISIBLE_DEVICES="1"),
        "the second counts within the first",
        "unset ROCR",
    ),
    "a mask that the driver would not understand": (
        visible(LOGIN, CUDA_VISIBLE_DEVICES="gpu0"),
        "'gpu0' is not an index (0), a UUID (GPU-...) or that of a slice",
        "CUDA_VISIBLE_DEVICES",
    ),
    "a missing package": (
        replace(LOGIN, packages=(("pyarrow", None, "15"),)),
        "package pyarrow is missing",
        "pip install 'pyarrow>=15'",
    ),
    "an old package": (
        replace(LOGIN, packages=(("pyarrow", "9.0.1", "15"),)),
        "pyarrow 9.0.1 is too old: 15 or newer",
        "pip install 'pyarrow>=15'",
    ),
    "Cray MPICH without its GPU transport": (
        visible(change(LOGIN, mpi={"library": CRAY}), MPICH_GPU_SUPPORT_ENABLED="1"),
        "MPI_Init would abort",
        "unset MPICH_GPU_SUPPORT_ENABLED",
    ),
}


@pytest.mark.parametrize(("facts", "text", "fix"), UNFIT.values(), ids=UNFIT)
def test_what_makes_a_node_unfit(facts: Facts, text: str, fix: str) -> None:
    findings = judge(facts)
    assert [f for f in findings if f.unfit and text in f.text and fix in f.fix], findings


def place(**values: object) -> Facts:
    return replace(LOGIN, file_systems=(replace(FileSystem("/o", "/o", "lustre", 1 << 40, 10**6), **values),))


SRUN = {"srun": "/usr/bin/srun", "srun_types": "MPI plugin types are...\nnone\n"}

REMARKS = {
    "an old compiler": (
        replace(change(LOGIN, node={"flags": frozenset(FLAGS["avx512bf16"])}), build=CPU_BUILD),
        "this CPU runs avx512bf16 kernels, and gcc 12.2.0 compiled none",
        "newer compiler",
    ),
    "an old compiler on ARM": (
        replace(change(LOGIN, node={"flags": frozenset(FLAGS["neonbf16"])}), build=replace(CPU_BUILD, isas=("neon",))),
        "this CPU runs neonbf16 kernels, and gcc 12.2.0 compiled none",
        "newer compiler",
    ),
    "GPUs that take Triton's kernels": (
        change(LOGIN, gpus={"installed": {"rocm": 8}, "usable": 8, "triton": True}, torch={"device": "rocm"}),
        "8 GPUs of AMD, and this build has no kernels for them: jobs take Triton's",
        "engine.device=cpu, if that is meant",
    ),
    "srun but no MPI": (change(LOGIN, mpi={**SRUN, "error": "libmpi.so.12: not found"}), "libmpi.so.12", "mpi4py"),
    "no common language with srun": (
        change(LOGIN, mpi={**SRUN, "library": "Open MPI v5.0.3"}),
        "srun knows no way to start ranks of Open MPI v5.0.3",
        "cluster.mpi=off",
    ),
    "a node outside of the cluster": (
        change(LOGIN, mpi={"library": "MPICH", "srun": "/usr/bin/srun", "srun_types": "srun: error: no host\nmore"}),
        "srun does not work here (srun: error: no host)",
        "mpiexec",
    ),
    "one core": (
        visible(change(LOGIN, node={"cpus_here": (3,)}), SLURM_JOB_ID="1"),
        "may use 1 of the node's 128 CPUs",
        "SRUN_CPUS_PER_TASK",
    ),
    "a cable that is out": (
        replace(LOGIN, nics=(Nic("mlx5_0:1", "InfiniBand", "DOWN", 200),)),
        "InfiniBand adapter mlx5_0:1 is down",
        "--exclude",
    ),
    "output in memory": (place(kind="tmpfs"), "lies in memory", "shared file system"),
    "output in a container": (place(kind="overlay"), "container's own file system", "--bind"),
    "a full disk": (place(free=1 << 28), "0.25 GiB left (lustre at /o)", "make room"),
    "no inodes": (place(free_files=12), "room for 12 more files", "rows_per_chunk"),
    "a read-only file system": (place(read_only=True), "not for output", "output.path"),
}


@pytest.mark.parametrize(("facts", "text", "fix"), REMARKS.values(), ids=REMARKS)
def test_what_is_worth_a_remark_leaves_a_node_fit(facts: Facts, text: str, fix: str) -> None:
    (finding,) = judge(facts)
    assert text in finding.text
    assert fix in finding.fix
    assert not finding.unfit


@pytest.mark.parametrize(
    "facts",
    [
        visible(change(LOGIN, node={"cpus_here": (3,)})),  # not in a job: a person's own taskset
        change(LOGIN, mpi={"library": CRAY, "gtl": True}),
        visible(change(LOGIN, mpi={"library": CRAY, "gtl": True}), MPICH_GPU_SUPPORT_ENABLED="1"),
        change(GPU_NODE, gpus={"supports": "13.0"}),
        replace(LOGIN, nics=(Nic("hsn0", "Slingshot", "up", 200), Nic("mlx5_0:1", "InfiniBand", "ACTIVE", 200))),
        place(free_files=None),
        change(
            GPU_NODE,
            build={"device": "xpu", "toolkit": "2024.2.1", "architectures": ("spir64",)},
            gpus={**NO_GPUS, "installed": {"xpu": 4}, "driver": "yes", "usable": 4},
            torch={"device": "xpu", "architectures": ()},
        ),
    ],
)
def test_what_is_in_order_is_not_remarked(facts: Facts) -> None:
    assert judge(facts) == []


def test_what_makes_a_node_unfit_comes_first() -> None:
    facts = replace(place(kind="tmpfs"), build=Build(error="gone"))
    assert [finding.unfit for finding in judge(facts)] == [True, False]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("80-real",), "8.0", True),
        (("80-real",), "8.6", True),  # a minor version runs the code of older ones
        (("86-real",), "8.0", False),
        (("80-real",), "9.0", False),
        (("80",), "9.0", True),  # both kinds of code
        (("90a-real",), "9.0", True),
        (("90a-real",), "10.0", False),
        (("90a-real", "90-virtual"), "12.0", True),
        (("100-virtual",), "9.0", False),
        (("100f-real",), "10.3", True),
        (("103a-real",), "10.0", False),
    ],
)
def test_which_code_runs_where(architectures: tuple[str, ...], capability: str, runs: bool) -> None:
    assert runs_on(architectures, capability) is runs
