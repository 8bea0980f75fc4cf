"""A private Slurm cluster on this machine: munged, slurmctld and one slurmd for each virtual node.

Every node lives in namespaces of its own (pid, host name, IPC, mounts): killing their first process is the crash of a
node. All ports lie on 127.0.0.1, all files in one folder; nothing in /etc is read or written. Needs root, and Debian's
packages slurm-wlm and munge (Slurm 22.05 and up, built with multiple-slurmd). Up in about a second, down in less.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "setpriv")

START_SECONDS = 30.0

CONFIGURATION = """
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
KillWait=3
InactiveLimit=0
JobRequeue=1
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
NodeName=node[1-{nodes}] NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire=5: a requeued job waits for it (121 s by default). config_overrides: the nodes claim more CPUs than there
# are. TmpFS per node: two nodes' PMIx servers must not share a folder. KillWait and SlurmdTimeout: shorter waits.

NODE = """
hostname "$1"; mount --make-rprivate /; mount -t tmpfs tmpfs /dev/shm; mount --bind "$2/hosts" /etc/hosts
slurmd -D -N "$1" -f "$2/slurm.conf" & wait
"""


def why_not() -> str | None:
    """The reason why this machine cannot have a cluster, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a private Slurm cluster needs root: slurmd starts the tasks, and its nodes have namespaces"
    tried = subprocess.run(["unshare", "--pid", "--uts", "--ipc", "--mount", "--fork", "true"], capture_output=True)
    return f"namespaces are not allowed here: {tried.stderr.decode().strip()}" if tried.returncode else None


class Cluster:
    """``nodes`` virtual nodes node1, node2 ... of 4 CPUs; :attr:`environment` is what its clients need."""

    def __init__(self, folder: Path, nodes: int = 3):
        self.folder = folder
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _path(),
        }
        self._processes: dict[str, subprocess.Popen] = {}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Bring all up. RuntimeError with the logs' ends if the nodes are not idle within START_SECONDS."""
        for name in ("munge", "state", "log", "spool", "tmp"):
            (self.folder / name).mkdir(parents=True)
        for path in (self.folder, *self.folder.parents):  # munged refuses a socket that others could not reach
            if path.stat().st_uid == os.geteuid() and path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o011)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        port = _free_ports(len(self.nodes) + 1)
        configuration = CONFIGURATION.format(
            folder=self.folder, port=port, first=port + 1, last=port + len(self.nodes), nodes=len(self.nodes)
        )
        (self.folder / "slurm.conf").write_text(configuration)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loads; nothing above uses it
        hosts = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", "--num-threads=2", *files)
        self.wait(lambda: (munge / "socket").exists(), START_SECONDS, "munged")
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), START_SECONDS, "idle nodes")

    def stop(self) -> None:
        """End every process that :meth:`start` and :meth:`start_node` began, and all that runs on the nodes."""
        for process in (*self._processes.values(), *self._daemons):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        (self.folder / "tmp" / node).mkdir(exist_ok=True)
        spaces = ["--pid", "--uts", "--ipc", "--mount", "--mount-proc", "--fork", "--kill-child=KILL"]
        script = ["bash", "-c", NODE, "node", node, str(self.folder)]
        self._processes[node] = self._spawn(["unshare", *spaces, *script], f"node-{node}.log")

    def crash_node(self, node: str) -> None:
        """Kill a node with all that runs on it, and let Slurm know at once, which else takes it 25 s and more."""
        self._processes[node].kill()
        self._processes[node].wait(10)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")

    def call(self, *command: str, timeout: float = 60.0, **environment: str) -> str:
        """Output of a client command; CalledProcessError if it fails."""
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"], env=self.environment, capture_output=True, text=True, timeout=60
        )
        return dict(line.split() for line in done.stdout.splitlines())

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList ..."""
        words = self.call("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, job_id: str, *states: str, timeout: float = 120.0) -> dict[str, str]:
        """Wait until the job is in one of ``states``; RuntimeError after ``timeout`` seconds."""
        self.wait(lambda: self.job(job_id)["JobState"] in states, timeout, f"job {job_id} {' or '.join(states)}")
        return self.job(job_id)

    def wait(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} after {timeout:g} s\n{self.logs()}")
            time.sleep(0.2)

    def logs(self, characters: int = 2000) -> str:
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-characters:]}" for path in files)

    def _daemon(self, *command: str) -> None:
        self._daemons.append(self._spawn(list(command), f"{command[0]}.out"))

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen:
        with open(self.folder / "log" / log, "ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            mortal = ["setpriv", "--pdeathsig", "KILL", *command]  # the cluster goes when the tests are killed
            return subprocess.Popen(mortal, env=self.environment, start_new_session=True, **streams)


def _path() -> str:
    """Debian keeps the daemons where only root's PATH looks."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive free ports."""
    for start in range(17000 + os.getpid() % 4000, 32000, count):
        taken = []
        try:
            for port in range(start, start + count):
                taken.append(socket.socket())
                taken[-1].bind(("127.0.0.1", port))
            return start
        except OSError:
            continue
        finally:
            for listener in taken:
                listener.close()
    raise RuntimeError(f"no {count} free ports in a row between 17000 and 32000")
