"""Kernels compiled ahead in one file: a rank that has it needs no compiler and no time to compile.

A zip archive: ``bundle.json`` says which Triton made it and for which targets; ``kernels/KEY/...`` are entries of
Triton's cache, which looks for a kernel under a hash of its source, its arguments' types and Triton itself;
``modules/HASH.so`` are the C modules through which Triton talks to the driver, by a hash of their source. Unpacked, the
former lie in a rank's own cache; the latter are handed to Triton when it wants to build one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import triton
from triton import knobs

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
"""Of a C module: it fits one version of Python alone."""

MODULES = "batchinfer-modules"
"""Their folder in a cache."""

ENTRY = re.compile(r"(kernels/[A-Z2-7]+|modules)/[\w.+-]+")

GROUP = "__grp__"
"""Begins the name of the file in which Triton lists a kernel's others, with their paths."""


def made_with() -> dict[str, str]:
    """What a bundle fits."""
    return {"triton": triton.__version__, "python": SUFFIX}


def write_bundle(file: Path, cache: Path, targets: Collection[str]) -> int:
    """Put what a cache holds into one file, which then is there as a whole. The number of kernels."""
    kernels = [path for path in sorted(cache.glob("*/*")) if path.is_file() and path.suffix != ".so"]
    groups = [path for path in kernels if path.name.startswith(GROUP)]
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", json.dumps({**made_with(), "targets": sorted(targets)}))
        for path in sorted(kernels, key=lambda path: path in groups):  # the list of a kernel's files behind them
            archive.write(path, f"kernels/{path.parent.name}/{path.name}")
        for path in sorted((cache / MODULES).glob("*")):
            archive.write(path, f"modules/{path.name}")
    partial.replace(file)
    return len(groups)


def use_bundle(file: Path, cache: Path) -> None:
    """Unpack a bundle into the cache that Triton uses, and have its C modules taken from there. RuntimeError where it
    can't be read, or is another Triton's or Python's."""
    try:
        with zipfile.ZipFile(file) as archive:
            made, ours = json.loads(archive.read("bundle.json")), made_with()
            if any(made.get(name) != version for name, version in ours.items()):
                raise RuntimeError(f"{file} was made with {_words(made)}, and this is {_words(ours)}: make it anew")
            for entry in archive.infolist():
                if ENTRY.fullmatch(entry.filename):
                    _unpack(archive.read(entry), cache, entry.filename)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise RuntimeError(f"{file} is no bundle of kernels ({error}): make one with batchinfer bundle") from None
    knobs.build.impl = Modules(cache / MODULES)


def _words(made: dict[str, Any]) -> str:
    return f"Triton {made.get('triton')} for Python{made.get('python')}"


def _unpack(data: bytes, cache: Path, entry: str) -> None:
    """Where it is not there yet; another process of this user may be at the same."""
    folder, name = entry.rsplit("/", 1)
    folder = cache / (MODULES if folder == "modules" else folder.removeprefix("kernels/"))
    if (folder / name).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if name.startswith(GROUP):
        files = json.loads(data)["child_paths"]
        data = json.dumps({"child_paths": {file: str(folder / file) for file in files}}).encode()
    partial = folder / f"{name}.{os.getpid()}.tmp"
    partial.write_bytes(data)
    partial.replace(folder / name)


class Modules:
    """What Triton calls for a C module (knobs.build.impl): one of ``folder``, or else a C compiler, whose result stays
    there."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(
        self,
        name: str,
        source: str,
        folder: str,
        library_dirs: Iterable[str],
        include_dirs: Iterable[str],
        libraries: Iterable[str],
    ) -> str:
        module = self._folder / f"{hashlib.sha256(Path(source).read_bytes()).hexdigest()}{SUFFIX}"
        if not module.exists():
            compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
            if compiler is None:
                raise RuntimeError(
                    f"Triton's module {name} is not in the bundle of engine.kernels, and there is no C compiler (CC, "
                    "gcc, clang): make the bundle where there is one"
                )
            built = Path(folder) / f"{name}{SUFFIX}"
            command = [compiler, source, "-O3", "-shared", "-fPIC", "-Wno-psabi", "-Wl,--no-as-needed", "-o", built]
            command += [f"-L{path}" for path in library_dirs]
            command += [f"-l:{library}" if ".so" in library else f"-l{library}" for library in libraries]
            command += [f"-I{path}" for path in (folder, sysconfig.get_path("include"), *include_dirs)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(built, module)
        return str(module)


def build_modules(kernels: Iterable[Any], vendor: str, cache: Path) -> None:
    """Build the C modules of the driver (``vendor`` cuda or hip), and in Triton before 3.9 those that launch
    ``kernels``, into ``cache``. RuntimeError where there is no C compiler; for hip, no runtime of ROCm.

    They are linked against libcuda, which login nodes lack: an empty library stands in for it, and none of the modules
    is loaded here.
    """
    knobs.build.impl = Modules(cache / MODULES)
    with tempfile.TemporaryDirectory() as folder:
        if vendor == "cuda":
            from triton.backends.nvidia import driver

            if not _loads("libcuda.so.1"):
                stub = Path(folder) / "libcuda.so.1"
                command = [os.environ.get("CC", "gcc"), "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1"]
                subprocess.run([*command, "-o", stub], check=True)
                os.environ["TRITON_LIBCUDA_PATH"] = folder
            utils, launcher = driver.CudaUtils, driver.CudaLauncher
        else:
            from triton.backends.amd import driver

            utils, launcher = driver.HIPUtils, driver.HIPLauncher
        _without_loading(utils)
        if hasattr(driver, "make_launcher"):
            for kernel in kernels:
                _without_loading(launcher, kernel.src, kernel.metadata)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _without_loading(make: Any, *args: Any) -> None:
    """Triton builds a module and loads it at once, which fails without a driver; by then it has been built."""
    with contextlib.suppress(ImportError):
        make(*args)
