"""A conda channel made of this machine: its Python, Python packages and compilers under the names that the recipe asks
for. It shows that the recipe builds, tests, installs and is chosen as meant; not that conda-forge's packages fit."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from gpu.cuda_toolkit import install_nvcc

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

PYTHON_PACKAGES = {
    "pip": "99",
    "scikit-build-core": "99",
    "pybind11": "99",
    "transformers": "99",
    "tokenizers": "99",
    "safetensors": "99",
    "gguf": "99",
    "jinja2": "99",
    "hydra-core": "99",
    "pyarrow": "99",
    "numpy": "99",
    "rich": "99",
    "mpi4py": "99",
}
"""Empty packages: the modules are those of the environment that runs the tests."""


class LocalChannel:
    """Packages are made below ``folder``/linux-64; ``index()`` makes them known."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.uri = folder.resolve().as_uri()
        self._stage = folder.parent / f"{folder.name}-staging"

    def add(
        self,
        name: str,
        version: str = "99",
        build: str = "local_0",
        files: dict[str, str] | None = None,
        depends: Sequence[str] = (),
        constrains: Sequence[str] = (),
        number: int = 0,
    ) -> None:
        """``files``: name -> text; a text that is an absolute path makes a link to it."""
        from rattler_build import assemble_package

        staging = self._stage / f"{name}-{version}-{build}"
        for path, text in (files or {f"share/{name}.txt": "nothing but its name\n"}).items():
            target = staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("/"):
                target.symlink_to(text)
            else:
                target.write_text(text)
                target.chmod(0o755)
        assemble_package(
            *(name, version, "linux-64", build, self.folder / "linux-64"),
            files_dir=staging,
            depends=list(depends),
            constrains=list(constrains),
            build_number=number,
            compression_level=1,
            license="LicenseRef-local",
            detect_prefix=False,
        )

    def index(self) -> None:
        from rattler.index import index_fs

        (self.folder / "noarch").mkdir(exist_ok=True)
        asyncio.run(index_fs(self.folder))

    def solve(self, *specs: str, cuda: str = "") -> dict[str, str]:
        """Name -> version=build of what a user gets, with a driver for this version of ``cuda`` or none."""
        return {r.name.normalized: f"{r.version}={r.build}" for r in self._records(specs, cuda)}

    def install(self, prefix: Path, *specs: str, cuda: str = "") -> None:
        import rattler

        records = self._records(specs, cuda)
        asyncio.run(rattler.install(records, prefix, cache_dir=prefix.parent / "cache", show_progress=False))

    def _records(self, specs: Sequence[str], cuda: str = "") -> list:
        from rattler import BuildString, Gateway, GenericVirtualPackage, PackageName, Version, solve

        found = [("__unix", "0"), ("__linux", "6.1"), ("__glibc", "2.36"), *([("__cuda", cuda)] if cuda else [])]
        machine = [GenericVirtualPackage(PackageName(n), Version(v), BuildString("0")) for n, v in found]
        request = solve(
            sources=[self.uri],
            specs=list(specs),
            gateway=Gateway(),
            platforms=["linux-64", "noarch"],
            virtual_packages=machine,
        )
        return asyncio.run(request)


def add_nvcc(channel: LocalChannel, folder: Path) -> None:
    """What the build for CUDA 13 needs besides, with NVIDIA's wheels installed in ``folder``. For one architecture: all
    of them take eight times as long."""
    toolkit = install_nvcc(folder)
    script = f"export CUDACXX={toolkit}/bin/nvcc CUDAARCHS=80-real\n"
    channel.add("cuda-nvcc_linux-64", "13.0.88", files={"etc/conda/activate.d/nvcc.sh": script})
    channel.add("cuda-version", "13.0", constrains=["__cuda >=13"])
    channel.add("cuda-cudart-dev", "13.0.96")
    pins = ["__cuda", "cuda-version 13.0.*", "modules-of-this-machine"]
    channel.add("pytorch", build="cuda_local_0", depends=pins, number=200)


def add_this_machine(channel: LocalChannel) -> None:
    """Everything that the CPU build needs, and enough for a job with it."""
    python = os.path.join(sys.base_prefix, "bin", f"python{VERSION}")
    assert os.path.exists(python), f"there is no {python}"
    # A prefix with this file and a link is a virtual environment of Python: it brings the standard library along.
    files = {"pyvenv.cfg": f"home = {os.path.dirname(python)}\ninclude-system-site-packages = false\n"}
    files |= {f"bin/{name}": python for name in ("python", "python3", f"python{VERSION}")}
    channel.add("python", sys.version.split()[0], f"0_cp{VERSION.replace('.', '')}", files)
    here = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    modules = {f"lib/python{VERSION}/site-packages/zz_this_machine.pth": here}
    channel.add("modules-of-this-machine", files=modules, depends=["python"])
    for name, version in PYTHON_PACKAGES.items():
        channel.add(name, version, depends=["modules-of-this-machine"])
    channel.add("pytorch", build="cpu_local_0", depends=["modules-of-this-machine"])
    for language, variable, command in (("gcc", "CC", "gcc"), ("gxx", "CXX", "g++")):
        script = f"export {variable}={shutil.which(command)}\n"
        channel.add(f"{language}_linux-64", "13.99", files={f"etc/conda/activate.d/{language}.sh": script})
    channel.add("sysroot_linux-64", "2.28")
    for tool in ("cmake", "ninja"):
        path = shutil.which(tool) or shutil.which(tool, path=os.path.dirname(sys.executable))
        assert path, f"{tool} is not installed: pip install {tool}"
        channel.add(tool, files={f"bin/{tool}": f'#!/bin/sh\nexec {path} "$@"\n'})
