"""The ranks of a job: who they are, and small messages between them. The only module that imports mpi4py.

No call of a live job blocks inside MPI: blocking calls spin (2.6 CPU seconds per 4 s of MPI_Barrier, measured) and
take the core from the engine. Everything here starts an operation and polls it with short sleeps, for a bounded time:
a rank that has died answers nothing, and no launcher option makes all MPI libraries say so.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import re
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from batchinfer.cluster.channel import Channel, MpiChannel
from batchinfer.cluster.fabric import fabric_settings, has_fast_network
from batchinfer.cluster.outlive import lifeline
from batchinfer.types import ExitCode, JobError

_MESSAGE, _GATHER = 0, 1

POLL_SECONDS = 0.005
"""Sleep between two looks at an operation under way: far below a step of any engine, and no load on the core."""

LAST_WORDS_SECONDS = 0.5
"""Between an error message and the abort: launchers drop what they have not forwarded by then."""

START_SECONDS = 900
"""Most time between the first rank that is ready and the last: importing over a slow network file system has taken 4
minutes on 64 ranks, and rank 0 may look at a large input. Also the most that an exchange among all ranks may take."""

LEAVE_SECONDS = 30
"""Most time between the first rank that wants to end and the last; what they had to say is said by then."""

RANK_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),  # MPICH and Intel MPI under mpiexec, srun --mpi=pmi2, PALS
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI under mpirun
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # any srun step; absent in the batch script itself
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("PMIX_RANK", ""),
    ("PALS_RANKID", ""),
)
"""Where launchers write rank and size, the nearest launcher first: mpiexec inside a Slurm job has its own."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says. ``size`` is None where it does not say; ``variable`` tells where it was read."""

    rank: int = 0
    size: int | None = 1
    variable: str = ""

    @property
    def parallel(self) -> bool:
        return self.size is None or self.size > 1


def launcher(environment: Mapping[str, str] | None = None) -> Launch:
    """Who started this process; rank 0 of 1 if nobody did."""
    env = os.environ if environment is None else environment
    for rank, size in RANK_VARIABLES:
        in_batch_script = rank == "SLURM_PROCID" and "SLURM_STEP_ID" not in env
        if env.get(rank, "").isdecimal() and (not size or env.get(size, "").isdecimal()) and not in_batch_script:
            return Launch(int(env[rank]), int(env[size]) if size else None, size or rank)
    return Launch()


class World:
    """A job of one process: no MPI needed, nobody to talk to. ``place`` says in messages who speaks."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    threads = True  # whether send, receive and the channel may be used in other threads than the main one
    channel: Channel | None = None  # for bulk data; None where nobody is there

    def __init__(self) -> None:
        self.hostname = socket.gethostname()
        self.place = ""

    def bcast(self, value: Any) -> Any:
        """Rank 0's value on every rank. All ranks call it; any that pickle takes."""
        return value

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0 the values of all ranks in rank order, elsewhere None. All ranks call it."""
        return [value]

    def send(self, rank: int, message: Any) -> None:
        """Start a message; it arrives once, in order, after the messages sent there before, or is dropped where the
        MPI library knows that the rank is dead."""
        raise ValueError(f"rank {rank} does not exist: this job has one rank")

    def receive(self) -> tuple[int, Any] | None:
        """A message that has arrived as (sender, message), or None at once."""
        return None

    def abort(self, code: int) -> None:
        """End the processes of all ranks with this exit code; a single process just returns."""

    def leave(self, code: int, whole: bool) -> None:
        """The last call of a rank that ends with ``code``. ``whole``: no rank is lost. Otherwise this ends the process
        here, and the job too if it is complete: MPI_Finalize would wait for the lost rank for ever."""


class Unjoined(World):
    """A process among others before MPI is up: they can't hear it, but wait for it in MPI_Init."""

    def __init__(self, launch: Launch):
        super().__init__()
        self.place = f" [rank {launch.rank} on {self.hostname}]"

    def abort(self, code: int) -> None:
        """Ask the launcher to end all, in the PMI-1 wire protocol (Balaji et al. 2010, "PMI: A Scalable Parallel
        Process-Management Interface for Extreme-Scale Systems"). MPICH's mpiexec takes no notice of a process that
        ends before it has said hello, whatever its exit code; other launchers do, and give no PMI_FD."""
        time.sleep(LAST_WORDS_SECONDS)
        try:
            channel = int(os.environ["PMI_FD"])
            os.write(channel, b"cmd=init pmi_version=1 pmi_subversion=1\n")
            if select.select([channel], [], [], 1.0)[0]:
                os.read(channel, 1024)
            os.write(channel, f"cmd=abort exitcode={code}\n".encode())
            select.select([channel], [], [], 5.0)  # the end comes from outside; leaving first would hide the code
        except (KeyError, ValueError, OSError):
            return


class MpiWorld(World):
    """The ranks of MPI's COMM_WORLD. One thread may send and receive, and another one use the channel."""

    def __init__(self, mpi: Any):
        super().__init__()
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self._comm.Set_errhandler(mpi.ERRORS_RETURN)  # a connection that breaks is an exception here, not the end
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        node = self._comm.Split_type(mpi.COMM_TYPE_SHARED, key=self.rank)  # the launcher's map of nodes
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        node.Free()
        self.place = f" [rank {self.rank} on {self.hostname}]"
        self.threads = mpi.Query_thread() >= mpi.THREAD_SERIALIZED
        self._lock = Lock()
        bulk = self._comm.Dup()
        self._dead: set[int] = set()  # ranks to which a message failed
        self._sending: list[Any] = []
        self._inbox: deque[tuple[int, Any]] = deque()
        self._gathered: list[deque[Any]] = [deque() for _ in range(self.size)]
        self._lifeline = lifeline(os.environ)
        self._within = self._lifeline.call if self._lifeline else contextlib.nullcontext
        self.channel: MpiChannel = MpiChannel(mpi, bulk, self._lock, self._within)

    def bcast(self, value: Any) -> Any:
        data = pickle.dumps(value) if self.rank == 0 else b""
        length = bytearray(len(data).to_bytes(8, "little"))
        self._finish(self._comm.Ibcast([length, self._mpi.BYTE], root=0))
        buffer = bytearray(data) if self.rank == 0 else bytearray(int.from_bytes(length, "little"))
        self._finish(self._comm.Ibcast([buffer, self._mpi.BYTE], root=0))
        return value if self.rank == 0 else pickle.loads(buffer)

    def gather(self, value: Any) -> list[Any] | None:
        """Afterwards no message sent before is under way: a job that ends with it may finalise MPI."""
        if self.rank != 0:
            self._start(0, _GATHER, value)
            self._wait(self._all_sent)
            return None
        self._wait(lambda: self._all_sent() and self._arrived() and all(self._gathered[1:]))
        return [value, *(values.popleft() for values in self._gathered[1:])]

    def send(self, rank: int, message: Any) -> None:
        with self._lock:
            self._all_sent()
            self._start(rank, _MESSAGE, message)

    def receive(self) -> tuple[int, Any] | None:
        with self._lock:
            self._all_sent()
            self._arrived()
        return self._inbox.popleft() if self._inbox else None

    def abort(self, code: int) -> None:
        time.sleep(LAST_WORDS_SECONDS)
        self._reach_launcher()
        self._comm.Abort(code)

    def leave(self, code: int, whole: bool) -> None:
        clean = whole and not self._dead and not self.channel.abandoned
        if clean and self._in_time(self._comm.Ibarrier().Test, LEAVE_SECONDS):
            faulthandler.dump_traceback_later(LEAVE_SECONDS, exit=True, file=sys.__stderr__)
            self._reach_launcher()
            self._mpi.Finalize()
            faulthandler.cancel_dump_traceback_later()
            return
        sys.stdout.flush()
        sys.stderr.flush()
        if code in (ExitCode.COMPLETE, ExitCode.TOO_MANY_ERRORS):
            self.abort(code)
        os._exit(code)

    def _reach_launcher(self) -> None:
        if self._lifeline:
            self._lifeline.give_back()

    def _start(self, rank: int, kind: int, value: Any) -> None:
        if rank in self._dead:
            return
        try:
            with self._within():
                self._sending.append(self._comm.isend((kind, value), dest=rank))
        except self._mpi.Exception:
            self._dead.add(rank)

    def _all_sent(self) -> bool:
        """Give the buffers of finished messages back; whether none is left."""
        self._sending = [request for request in self._sending if not self._is_over(request)]
        return not self._sending

    def _is_over(self, request: Any) -> bool:
        try:
            with self._within():
                return request.test()[0]
        except self._mpi.Exception:  # the receiver has died
            return True

    def _arrived(self) -> bool:
        """Sort what has arrived. Both kinds come in one stream per sender, so that none overtakes the other. An error
        of MPI is a connection that broke: the rank behind it is found out by its silence."""
        status = self._mpi.Status()
        with contextlib.suppress(self._mpi.Exception), self._within():
            while self._comm.Iprobe(status=status):
                sender = status.Get_source()
                kind, value = self._comm.recv(source=sender)
                if kind == _GATHER:
                    self._gathered[sender].append(value)
                else:
                    self._inbox.append((sender, value))
        return True

    def _finish(self, request: Any) -> None:
        self._wait(request.Test)

    def _wait(self, ready: Callable[[], bool]) -> None:
        if not self._in_time(ready, START_SECONDS):
            raise JobError(f"not all ranks have answered, within {START_SECONDS} s: one is lost", ExitCode.LOST_RANK)

    def _in_time(self, ready: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        try:
            while not ready():
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_SECONDS)
        except self._mpi.Exception:
            return False
        return True


def outside() -> World:
    """The world of a process before :func:`join`."""
    launch = launcher()
    return Unjoined(launch) if launch.parallel else World()


def join(mode: str) -> World:
    """The world of this process. ``mode`` is cluster.mpi: "off", "on", or anything else for "as the launcher says".

    Raises JobError(69) if MPI is needed and can't be loaded, or if MPI and the launcher disagree about the size:
    then every process would take itself for the whole job.
    """
    launch = launcher()
    if mode == "off" or (mode != "on" and not launch.parallel):
        world = World()
        if launch.parallel:  # without MPI each process is a world of its own, but not alone on its node
            world.local_rank, world.local_size = _place_on_node(os.environ)
        return world
    world = MpiWorld(_wait_for_all_ranks_to_start(launch))
    if launch.size is not None and world.size != launch.size:
        raise JobError(
            f"the launcher started {launch.size} ranks ({launch.variable}={launch.size}), but MPI sees {world.size}: "
            "each process would do the whole job. The MPI library does not understand this launcher: use "
            "srun --mpi=pmi2 with MPICH or Intel MPI, srun --mpi=pmix with Open MPI (srun --mpi=list shows what the "
            "site has), or the library's own mpiexec",
            ExitCode.UNFIT,
        )
    return world


def _place_on_node(env: Mapping[str, str]) -> tuple[int, int]:
    """(rank on the node, ranks on it) as Slurm says, (0, 1) elsewhere. Nodes that differ count like the first."""
    size = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "")) if "SLURM_STEP_ID" in env else None
    return (int(env["SLURM_LOCALID"]), int(size[0])) if size and env.get("SLURM_LOCALID", "").isdecimal() else (0, 1)


def mpi_library() -> tuple[str | None, str]:
    """Version of the MPI library that would be used, first line; or None and the reason. Does not initialise MPI."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return None, str(error).split("\n")[0]
    return MPI.Get_library_version().split("\n")[0].strip(), ""


def _wait_for_all_ranks_to_start(launch: Launch) -> Any:
    """Load and initialise MPI. A rank that dies on the way without a word must not leave the others waiting for ever:
    MPI_Init can't be interrupted, but a watchdog thread of the interpreter can end the process (and print this
    function's name)."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = True  # of a process that does not come to leave()
        from mpi4py import MPI

        os.environ.update(fabric_settings(MPI.Get_library_version(), os.environ, has_fast_network()))
        faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=sys.__stderr__)
        MPI.Init_thread(MPI.THREAD_SERIALIZED)  # while the main thread loads the model, another one talks
    except (ImportError, RuntimeError) as error:
        reason = f"a launcher started several ranks ({launch.variable})" if launch.parallel else "cluster.mpi=on"
        raise JobError(
            f"{reason}, but MPI can't be loaded ({error}): pip install 'batchinfer[mpi]', or pip install mpi4py beside "
            "the site's MPI module; cluster.mpi=off runs without",
            ExitCode.UNFIT,
        ) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    return MPI
