"""Publication of a file: it appears complete and under its final name, once, or not at all.

Protocol: a new file beside the final name, written, fsynced and closed; link() to the final name, which never replaces
(POSIX link(2): EEXIST); fsync of the folder; unlink of the temporary name. Where a file system has no hard links,
renameat2(RENAME_NOREPLACE) takes the place of link and unlink. Where it has neither, a symbolic link to the temporary
name is the claim (symlink(2) never replaces, and is there with its content), and whoever sees a claim may rename() what
it names. A bare rename() would replace silently, and locks are not reliable on network file systems, so neither is
used. Temporary names begin with a dot: readers of Parquet folders pass them over.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from batchinfer.types import ExitCode, JobError

Primitive = Literal["link", "renameat2", "symlink"]

UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
CLAIM = "._claim-"
MAX_CLAIMS = 1000  # of one name; each stands for a process that died between its claim and its rename
RENAME_NOREPLACE = 1
AT_FDCWD = -100


def write_new(path: str, data: bytes | memoryview) -> None:
    """Write ``data`` to a new file and fsync it. OSError leaves no file behind."""
    with new_file(path) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]


@contextmanager
def new_file(path: str) -> Iterator[int]:
    """Descriptor of a new file to be written in the block, and fsynced at its end. An error leaves no file behind.

    After an error the same descriptor is never synced again: the kernel may have dropped the pages and called them
    clean, so that a second fsync would succeed without having written them. The caller starts over with a new file.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        os.close(fd)  # network file systems report quota and write-back errors here
    except BaseException:
        remove(path)
        raise


@contextmanager
def file_for(key: str, path: str) -> Iterator[int]:
    """Descriptor of a new file to be written in the block; at its end it is published as ``path``, the value of the
    configuration's ``key``. JobError(73) if something has that name already, or the file can't be written."""
    taken = JobError(f"{key}={path} exists, and nothing is replaced: give a new name", ExitCode.OUTPUT)
    if os.path.lexists(path):
        raise taken
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(16)}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with new_file(temporary) as fd:
            yield fd
        if not publish(temporary, os.path.join(folder, name)):
            raise taken
    except OSError as error:
        raise JobError(f"{key}={path} cannot be written: {error.strerror or error}", ExitCode.OUTPUT) from None
    finally:
        remove(temporary)


def publish(temporary: str, final: str) -> bool:
    """Give the file its final name unless that is taken, sync the folder and drop the temporary name.

    True: ``final`` is our file. False: another one was first, or somebody removed ours. OSError: neither is certain, or
    the file system has neither primitive (then its errno is one of UNSUPPORTED). An error that nevertheless left our
    file under the final name, as when the reply of a file server is lost, counts as success.
    """
    try:
        ours = os.stat(temporary, follow_symlinks=False)
    except FileNotFoundError:
        return False
    won = _move(ours, temporary, final)
    if won:
        sync_folder(os.path.dirname(final))
    remove(temporary)
    return won


def publish_bytes(folder: str, name: str, data: bytes) -> bool:
    """Publish a small control file. True: it is ours; False: there is one already. OSError as in :func:`publish`."""
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(16)}.tmp")
    write_new(temporary, data)
    try:
        return publish(temporary, os.path.join(folder, name))
    finally:
        remove(temporary)


def probe(folder: str) -> Primitive:
    """Try the primitives on two files in ``folder``, and name the first that publishes one file and refuses the other.
    JobError(73) if none does; OSError if the folder cannot be written."""
    found: list[str] = []
    for name, move in _primitives().items():
        first, second, final = (os.path.join(folder, f".probe-{secrets.token_hex(16)}.tmp") for _ in range(3))
        try:
            write_new(first, b"1")
            write_new(second, b"2")
            move(first, final)
            move(second, final)
            found.append(f"{name} replaced an existing file")
        except FileExistsError:
            return name
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            found.append(f"{name}: {error.strerror}")
        finally:
            for path in (first, second, final, *claims(folder, os.path.basename(final))):
                remove(path)
    raise JobError(
        f"the file system of {folder} cannot publish a file without replacing another ({'; '.join(found)}), so two "
        "processes could both write a part: choose an output.path on another file system",
        ExitCode.OUTPUT,
    )


def claims(folder: str, name: str = "") -> list[str]:
    """Paths of the claims on ``name``, or on every name; none are needed once it is published."""
    with suppress(OSError):
        return [os.path.join(folder, entry) for entry in os.listdir(folder) if entry.startswith(CLAIM + name)]
    return []


def read_bytes(path: str) -> bytes:
    """The whole file; OSError if it is a symbolic link."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return file.read()


def sync_folder(folder: str) -> None:
    """fsync the folder's entries. File systems that cannot do so say EINVAL, and have nothing to be synced."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Drop a temporary name if it is still there; one that stays behind is harmless."""
    with suppress(OSError):
        os.unlink(path)


def _primitives() -> dict[Primitive, Callable[[str, str], None]]:
    return {"link": os.link, "renameat2": _rename_no_replace, "symlink": _claim_and_rename}


def _move(ours: os.stat_result, temporary: str, final: str) -> bool:
    for move in _primitives().values():
        try:
            move(temporary, final)
        except OSError as error:
            refusal = error
            if _has_happened(ours, temporary, final):
                return True
            if error.errno in (errno.EEXIST, errno.ENOENT):
                return False
            if error.errno not in UNSUPPORTED:
                raise
        else:
            return True
    raise refusal


def _has_happened(ours: os.stat_result, temporary: str, final: str) -> bool:
    """Whether our file has the final name. A stale entry in the client's cache can hide that name; then the number of
    links tells."""
    with suppress(FileNotFoundError):
        there = os.stat(final, follow_symlinks=False)
        if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
            return True
    with suppress(FileNotFoundError):
        return os.stat(temporary, follow_symlinks=False).st_nlink == 2
    return False


def _rename_no_replace(temporary: str, final: str) -> None:
    """renameat2(2) with RENAME_NOREPLACE: Linux 3.15 and glibc 2.28."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2", temporary)
    if call(AT_FDCWD, os.fsencode(temporary), AT_FDCWD, os.fsencode(final), RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), temporary, None, final)


def _claim_and_rename(temporary: str, final: str) -> None:
    """FileExistsError: another one was first.

    A claim is never taken back while its name is not published, for its taker may be about to rename: what it names is
    renamed on its behalf, and if that is gone, its taker has given up and the next claim is open. So at every moment
    one temporary file at most can still become ``final``.
    """
    folder, name = os.path.split(final)
    ours = os.path.basename(temporary)
    for number in range(MAX_CLAIMS):
        claim = os.path.join(folder, f"{CLAIM}{name}.{number}")
        try:
            os.symlink(ours, claim)
        except FileExistsError:
            theirs = os.path.basename(os.readlink(claim))
            if theirs != ours:  # else it is ours, and the reply was lost
                with suppress(FileNotFoundError):
                    os.rename(os.path.join(folder, theirs), final)
                if os.path.lexists(final):
                    raise
                continue
        if os.path.lexists(final):  # it was complete before the claims on it were cleared away
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final)
        os.rename(temporary, final)
        return
    raise OSError(errno.EIO, f"{MAX_CLAIMS} processes died while they published it", final)
