"""Reading a model's files: one error type, JSON with the checks that matter, blocks read at an offset."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from batchinfer.types import ExitCode, JobError

MAX_JSON_BYTES = 256 << 20
"""No known tokenizer.json is above 40 MB; a larger file is not one of ours."""


class ModelError(JobError):
    """The model's files cannot be used. The message names the file, what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(message, ExitCode.USAGE)


def read_json(path: str, *, required: bool = True) -> dict[str, Any]:
    """The JSON object in ``path``; {} when it is absent and not ``required``. Raises ModelError."""
    if not required and not os.path.exists(path):
        return {}
    return parse_json(read_whole(path), path)


def read_whole(path: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a file of at most ``limit``. Raises ModelError."""
    with open_for_reading(path) as (fd, size):
        if size > limit:
            raise ModelError(f"{path} is larger than {limit >> 20} MiB, which no model needs: is it the right file?")
        data = bytearray(size)
        read_at(fd, 0, memoryview(data), path)
    return bytes(data)


def read_json_objects(path: str) -> list[dict[str, Any]]:
    """The JSON list of objects in ``path``. Raises ModelError."""
    value = _json(read_whole(path), path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ModelError(f"{path} must hold a JSON list of objects")
    return value


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, from UTF-8 bytes. ``where`` names it in the ModelError."""
    value = _json(data, where)
    if not isinstance(value, dict):
        raise ModelError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value


def _json(data: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise ModelError(f"{where} holds the key {key!r} twice")
            keys[key] = value
        return keys

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not valid JSON ({error}): copy or download the model again") from None


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: ``nbytes`` bytes from byte ``offset`` (of the file) on, row-major. ``dtype`` is the
    container's own name for the element type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Block:
    """``nbytes`` bytes from ``offset`` on of the file ``path``."""

    path: str
    offset: int
    nbytes: int


T = TypeVar("T")
B = TypeVar("B", bound=Block)


class Source(Protocol):
    """Where a rank's weights come from: its own reading, or another rank's (cluster/weights.py)."""

    def value(self, make: Callable[[], T]) -> T:
        """What ``make`` returns here, or on the rank that reads."""

    def stream(self, blocks: Sequence[B], read: Callable[[B, memoryview], None]) -> Iterator[memoryview]:
        """The bytes of each block, valid until the next are asked for. ``read`` fills in a block from its file."""

    @property
    def shares(self) -> bool:
        """Whether other ranks wait for the weights that this one packs."""

    def take(self) -> int | None:
        """The descriptor of the memory in which another rank has packed the weights, the caller's to close; or None,
        and this rank packs for itself."""

    def give(self, fd: int) -> None:
        """Hand on the memory that this rank has filled."""


class OwnReading:
    """A Source that reads all itself, and shares nothing."""

    shares = False

    def take(self) -> None:
        return None

    def give(self, fd: int) -> None:
        raise ValueError("nobody waits for these weights")

    def value(self, make: Callable[[], T]) -> T:
        return make()

    def stream(self, blocks: Sequence[B], read: Callable[[B, memoryview], None]) -> Iterator[memoryview]:
        staging = memoryview(bytearray(max((block.nbytes for block in blocks), default=0)))
        for block in blocks:
            read(block, staging[: block.nbytes])
            yield staging[: block.nbytes]


class BlockReader:
    """Reads blocks of files, of which it keeps the latest open until it is closed (``with``)."""

    def __init__(self) -> None:
        self._path, self._fd, self._open = "", -1, ExitStack()

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, block: Block, out: memoryview) -> None:
        """Fill ``out`` with the block. Raises ModelError."""
        if block.path != self._path:
            self._open.close()
            self._fd, _ = self._open.enter_context(open_for_reading(block.path))
            self._path = block.path
        read_at(self._fd, block.offset, out, block.path)


class Keys:
    """Typed access to a config: a wrong or missing value names its key and file. ``names``: what the file calls some of
    the keys."""

    def __init__(self, config: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None):
        self.config, self.where, self.names = config, where, names or {}

    def value(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            key = self.names.get(key, key)
            raise ModelError(f"{self.where} has no {key!r}, which the architecture needs: the file is incomplete")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            key = self.names.get(key, key)
            raise ModelError(f"{self.where}: {key}={value!r} must be a whole number above 0 (and below 2**31)")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e300:
            key = self.names.get(key, key)
            raise ModelError(f"{self.where}: {key}={value!r} must be a number above 0")
        return float(value)

    def flag(self, key: bool | str) -> bool:
        """A fixed flag, or the boolean under the key (absent: false)."""
        value = key if isinstance(key, bool) else self.value(key, False)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {key}={value!r} must be true or false")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self.value(key)
        if not isinstance(value, list) or len(value) != length:
            raise ModelError(f"{self.where}: {key} must be a list of {length} numbers")
        each = Keys({f"{key}[{i}]": item for i, item in enumerate(value)}, self.where)
        return tuple(each.number(name) for name in each.config)


@contextmanager
def open_for_reading(path: str) -> Iterator[tuple[int, int]]:
    """(file descriptor, size in bytes) of ``path``; an error of opening it is a ModelError.

    A pipe or a device in a model folder has no end, and opening a pipe waits for its writer: neither is read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ModelError(f"{path} is no regular file: copy or download the model again")
        yield fd, info.st_size
    finally:
        os.close(fd)


def read_at(fd: int, offset: int, out: memoryview, path: str) -> None:
    """Fill ``out`` from ``offset`` on.

    Plain reads of large blocks, not mmap: page faults on a parallel file system are small random reads, tens of times
    slower, and a file cut short meanwhile would be SIGBUS and not an error.
    """
    done = 0
    while done < len(out):
        try:
            got = os.preadv(fd, [out[done:]], offset + done)
        except OSError as error:
            raise ModelError(f"{path} cannot be read at byte {offset + done}: {error.strerror}") from None
        if got == 0:
            size = os.fstat(fd).st_size
            raise ModelError(f"{path} ends at byte {size}, but was at least {offset + len(out) - size} bytes longer")
        done += got
