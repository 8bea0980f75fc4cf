# Copyright Spack Project Developers. See COPYRIGHT file for details.
#
# SPDX-License-Identifier: (Apache-2.0 OR MIT)

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyGguf(PythonPackage):
    """Read and write models in the GGUF format of ggml and llama.cpp."""

    homepage = "https://ggml.ai"
    pypi = "gguf/gguf-0.19.0.tar.gz"
    git = "https://github.com/ggml-org/llama.cpp"

    license("MIT")

    version("0.19.0", sha256="dbadcd6cc7ccd44256f2229fe7c2dff5e8aa5cf0612ab987fd2b1a57e428923f")

    depends_on("py-poetry-core@1:", type="build")

    with default_args(type=("build", "run")):
        depends_on("python@3.10:")
        depends_on("py-numpy@1.17:")
        depends_on("py-pyyaml@5.1:")
        depends_on("py-requests@2.25:")
        depends_on("py-tqdm@4.27:")
