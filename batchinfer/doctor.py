"""What this installation was built for, what the node has, and whether the two fit: JSON on standard output."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from batchinfer import __version__
from batchinfer.types import ExitCode

REBUILD = "rebuild with: BATCHINFER_DEVICE=cpu pip install --force-reinstall --no-deps ."


def main() -> int:
    """Print the report; 0, or 69 (unfit) when a job could not run here. Each finding names its fix."""
    findings: list[str] = []
    report = {
        "batchinfer": __version__,
        "python": platform.python_version(),
        "extension": _extension(findings),
        "gpu": _gpu(findings),
        "node": _node(),
        "mpi": _mpi(),
        "packages": _packages(findings),
        "findings": findings,
        "fit": not findings,
    }
    print(json.dumps(report, indent=2))
    return ExitCode.UNFIT if findings else ExitCode.COMPLETE


def _extension(findings: list[str]) -> dict[str, Any]:
    try:
        from batchinfer import _ops

        cpu = _ops.Cpu(1)
    except ImportError as error:
        findings.append(
            f"the compiled extension is missing ({error}): plan, status and verify work, run does not; {REBUILD}"
        )
        return {"compiled_for": []}
    except (RuntimeError, ValueError) as error:
        findings.append(f"the CPU kernels can't run here: {error}")
        return {"compiled_for": list(_ops.compiled_for)}
    return {"compiled_for": list(_ops.compiled_for), "isa": cpu.isa, **_ops.build_info}


def _gpu(findings: list[str]) -> dict[str, Any]:
    """A build for GPUs on a node without one, or a GPU without kernels, is a finding: engine.device=auto refuses to run
    there."""
    from batchinfer.ops.choice import choose, find_gpus

    gpus = find_gpus()
    try:
        choice = choose("auto", "auto", lambda: gpus)
    except RuntimeError as error:
        findings.append(str(error))
        choice = None
    return {
        "compiled_for": [gpus.compiled] if gpus.compiled else [],
        "torch_for": gpus.torch or None,
        "triton": gpus.triton,
        "usable": gpus.count,
        "chosen": choice and {"backend": choice.backend, "device": choice.device},
    }


def _node() -> dict[str, Any]:
    from batchinfer.engine.memory import free_memory

    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus_of_node": os.cpu_count(),
        "cpus_of_this_process": sorted(os.sched_getaffinity(0)),
        "free_memory_bytes": free_memory(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _mpi() -> dict[str, Any]:
    """Whether ranks can be started, and how; a missing MPI is no finding, since a plain run needs none."""
    from batchinfer.cluster.launch import srun_mpi_type
    from batchinfer.cluster.world import mpi_library

    library, srun = mpi_library(), shutil.which("srun")
    types = subprocess.run([srun, "--mpi=list"], capture_output=True, text=True) if srun else None
    listed = types.stdout + types.stderr if types else ""
    return {
        "mpiexec": shutil.which("mpiexec"),
        "srun": srun,
        "library": library,
        "srun_mpi": srun_mpi_type(library, listed),
    }


def _packages(findings: list[str]) -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "hydra-core", "mpi4py"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            if name != "mpi4py":
                findings.append(f"the Python package {name} is missing: pip install {name}")
    if importlib.util.find_spec("batchinfer._engine") is None and not findings:
        findings.append(f"the scheduler is not compiled; {REBUILD}")
    return found


if __name__ == "__main__":
    sys.exit(main())
