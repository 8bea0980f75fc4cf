"""What this installation was built for, what the node has, and what of it does not fit together."""

from __future__ import annotations

import dataclasses
import json
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchinfer import __version__
from batchinfer.doctor import software, system
from batchinfer.doctor.facts import VENDORS, Facts
from batchinfer.doctor.judge import Finding, judge
from batchinfer.types import ExitCode, JobError

GIB = 2**30


def main(paths: Sequence[str] = (), as_json: bool = False) -> int:
    """Print the report on standard output; 0, or 69 (unfit) when a job could not run here as it should. ``paths``:
    where the model or the output lies; JobError(64) for one that does not exist."""
    facts = gather(paths)
    findings = judge(facts)
    print(json.dumps(to_json(facts, findings), indent=2) if as_json else to_text(facts, findings))
    return ExitCode.UNFIT if any(finding.unfit for finding in findings) else ExitCode.COMPLETE


def gather(paths: Sequence[str] = ()) -> Facts:
    for path in paths:
        if not Path(path).exists():
            raise JobError(f"{path}: there is no such file or folder; doctor takes existing paths", ExitCode.USAGE)
    torch = software.torch()
    return Facts(
        version=__version__,
        python=platform.python_version(),
        build=software.build(),
        torch=torch,
        gpus=software.gpus(torch),
        node=system.node(),
        mpi=software.mpi(),
        nics=system.nics(),
        file_systems=tuple(system.file_system(path) for path in paths),
        packages=software.packages(),
        environment=software.variables(),
    )


def to_json(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """The facts by their field names, then the findings. slurm/run.sh reads ``mpi.srun_mpi``."""
    report = dataclasses.asdict(facts)
    report["node"]["flags"] = sorted(facts.node.flags)
    report["packages"] = {name: version for name, version, _ in facts.packages} | software.optional_packages()
    report["environment"] = facts.variables
    report["findings"] = [dataclasses.asdict(finding) for finding in findings]
    return report | {"fit": not any(finding.unfit for finding in findings)}


def to_text(facts: Facts, findings: Sequence[Finding]) -> str:
    """For people: a line for each part, then each finding with its fix."""
    build, torch, gpus, node, mpi = facts.build, facts.torch, facts.gpus, facts.node, facts.mpi
    compiled = f"CPU kernels {' '.join(build.isas)} ({build.isa} is used here), by {build.compiler}"
    if build.device != "cpu":
        compiled += f"; {build.device} {build.toolkit} for {' '.join(build.architectures)}"
    lines = [
        f"batchinfer  {facts.version}, Python {facts.python}",
        f"build       {compiled if not build.error else 'unusable'}",
        f"torch       {torch.version or 'unusable'} for {torch.device} {torch.toolkit}".rstrip(),
        f"node        {node.host}: {node.cpu}, {len(node.cpus_here)} of {node.cpus} CPUs here, "
        f"{node.free_memory / GIB:.0f} GiB free",
    ]
    for device, count in gpus.installed.items():
        driver = f", driver {gpus.driver} (CUDA {gpus.supports})" if device == "cuda" and gpus.driver else ""
        lines.append(f"GPUs        {count} of {VENDORS[device]} on the PCI bus{driver}")
    lines += [
        f"            {gpu.name}, {gpu.capability}, {gpu.memory / GIB:.0f} GiB, {gpu.address}" for gpu in gpus.visible
    ]
    if not gpus.installed and not gpus.visible:
        lines.append("GPUs        none")
    aware = {True: "GPU-aware", False: "not GPU-aware", None: "GPU-awareness unknown"}[mpi.gpu_aware]
    library = " ".join((mpi.library or "").split())
    lines.append(f"MPI         {f'{library} ({aware})' if library else 'none'}")
    if mpi.srun:
        lines.append(
            f"            srun --mpi={mpi.srun_mpi}" if mpi.srun_mpi else "            srun, without a way to it"
        )
    lines += [
        f"network     {nic.name}: {nic.kind}, {nic.state}" + (f", {nic.gbit} Gbit/s" if nic.gbit else "")
        for nic in facts.nics
    ]
    lines += [
        f"files       {place.path}: {place.kind} at {place.mounted_at}, {place.free / GIB:.0f} GiB free"
        for place in facts.file_systems
    ]
    for finding in findings:
        mark = "UNFIT" if finding.unfit else "note"
        lines.append("")
        lines += textwrap.wrap(f"{mark}: {finding.text}", 110)
        lines.append(f"  fix: {finding.fix}")
    verdict = "unfit" if any(finding.unfit for finding in findings) else "fit"
    return "\n".join([*lines, "", f"This node and this installation are {verdict} for jobs."])
