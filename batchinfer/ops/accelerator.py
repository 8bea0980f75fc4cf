"""A GPU as torch drives it: streams, events, pinned memory, what is free, graphs. One object for every vendor; torch's
builds for ROCm call theirs cuda, too."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

XPU_TORCH = (2, 6)
"""The first torch whose events on Intel GPUs tell times, and that knows how much of their memory is free."""


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Within it no garbage is collected."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Event(Protocol):
    """A place in a stream's work, whose time is known once the device has passed it."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Wait until the device has passed it."""

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds from here to there, with the precision of a float32."""


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None: ...


class Accelerator:
    """``device``: its type is cuda (NVIDIA and AMD) or xpu (Intel). ``graphs``: a step can be captured and replayed.
    Intel's graphs came with torch 2.11 and have not been tried: there every step is launched kernel by kernel."""

    OutOfMemory: type[Exception] = torch.cuda.OutOfMemoryError
    """Of every kind of device: torch has one class for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs = device.type == "cuda"
        self._module = torch.get_device_module(device)

    def use(self) -> None:
        """Make it torch's current device of its kind. RuntimeError where this torch is too old for it."""
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if self.device.type == "xpu" and version < XPU_TORCH:
            wanted = ".".join(map(str, XPU_TORCH))
            raise RuntimeError(f"torch {torch.__version__} is too old for Intel GPUs: {wanted} or newer is needed")
        self._module.set_device(self.device)

    def queue(self) -> int:
        """The handle of torch's current stream, for kernels that torch does not launch: a cudaStream_t, a hipStream_t,
        or a sycl::queue* (in order, as all of torch's are)."""
        stream = self._module.current_stream(self.device)
        return stream.sycl_queue if self.device.type == "xpu" else stream.cuda_stream

    def stream(self) -> object:
        """A new one, in which work goes on in order, beside that of others."""
        return self._module.Stream(self.device)

    def on(self, stream: object) -> contextlib.AbstractContextManager:
        """Within it, what is launched goes into ``stream``."""
        return self._module.stream(stream)

    def event(self) -> Event:
        return self._module.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait for all that was launched on the device."""
        self._module.synchronize(self.device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in the host's memory that the device copies to and from while the host goes on."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def capture(self, compute: Callable[[], Tensor], pool: object) -> tuple[Graph, Tensor]:
        """What ``compute`` launches on the current stream, which is not run, and the tensor that it gives: filled by
        each replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device while this one captures (thread_local). A graph that the collector finds
        # meanwhile, of an engine that nobody has closed, would be destroyed, which ends the capture.
        with _uncollected():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            out = compute()
            graph.capture_end()
        return graph, out

    def graph_pool(self) -> object:
        """Memory that the graphs of one runner share, since no two of them run at a time."""
        return torch.cuda.graph_pool_handle()

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all: of the slice or tile that this process sees, where it sees no whole
        device. Some drivers of Intel don't tell what is free: then what torch has not taken."""
        try:
            return self._module.mem_get_info(self.device)
        except RuntimeError:
            total = self._module.get_device_properties(self.device).total_memory
            return total - self._module.memory_reserved(self.device), total

    def peak_bytes(self) -> int:
        """Most bytes that torch has taken of the device's memory so far."""
        return self._module.max_memory_reserved(self.device)

    def empty_cache(self) -> None:
        """Give back what torch holds of the device's memory and does not use."""
        self._module.empty_cache()
