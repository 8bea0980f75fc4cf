# Copyright Spack Project Developers. See COPYRIGHT file for details.
#
# SPDX-License-Identifier: (Apache-2.0 OR MIT)

import json
import os

from spack_repo.builtin.build_systems.cuda import CudaPackage
from spack_repo.builtin.build_systems.python import PythonPackage
from spack_repo.builtin.build_systems.rocm import ROCmPackage

from spack.package import *


class Batchinfer(PythonPackage, CudaPackage, ROCmPackage):
    """Offline LLM batch inference for HPC: Parquet in, Parquet out, one output row for every
    input row, exactly once, over MPI ranks with a compiled paged-attention engine."""

    # The recipe builds the tree that it travels in: a clone of it has both.
    git = f"file://{ancestor(__file__, 7)}"

    license("Apache-2.0")

    version("main", branch="main")

    variant("sycl", default=False, description="Build for Intel GPUs with SYCL")
    variant("mpi", default=True, description="Spread a job over MPI ranks")
    variant("triton", default=False, description="GPU kernels in Triton beside the compiled ones")

    # One build is for one vendor; the CPU kernels are in each.
    conflicts("+cuda+rocm", msg="One build is for one vendor: choose +cuda or +rocm")
    conflicts("+cuda+sycl", msg="One build is for one vendor: choose +cuda or +sycl")
    conflicts("+rocm+sycl", msg="One build is for one vendor: choose +rocm or +sycl")
    conflicts("+triton", when="~cuda~rocm", msg="+triton needs a GPU: add +cuda or +rocm")
    conflicts("platform=windows")

    # py-torch has to be compiled for the same GPUs, for hours: never guessed.
    conflicts(
        "cuda_arch=none",
        when="+cuda",
        msg="+cuda needs the compute capability of the GPUs: add for example cuda_arch=90 (H100), "
        "cuda_arch=80 (A100) or cuda_arch=70 (V100, with cuda@:12)",
    )
    # ROCmPackage refuses this too, without saying what to add.
    conflicts(
        "amdgpu_target=none",
        when="+rocm",
        msg="+rocm needs the GPUs' target: add for example amdgpu_target=gfx90a (MI200), "
        "amdgpu_target=gfx942 (MI300) or amdgpu_target=gfx1100 (Radeon RX 7900)",
    )

    depends_on("c", type="build")
    depends_on("cxx", type="build")

    with default_args(type="build"):
        depends_on("cmake@3.25:")
        depends_on("ninja@1.11:")
        depends_on("py-scikit-build-core@0.10:")
        depends_on("py-pybind11@2.12:")

    # pyproject.toml's
    with default_args(type=("build", "run")):
        depends_on("python@3.10:")
        depends_on("py-torch@2.4:")
        depends_on("py-transformers@4.45:")
        depends_on("py-tokenizers@0.20:")
        depends_on("py-safetensors@0.4.3:")
        depends_on("py-gguf@0.10:")
        depends_on("py-jinja2@3.1.6:")
        depends_on("py-hydra-core@1.3:")
        depends_on("py-pyarrow@15:")
        depends_on("py-numpy@1.24:")
        depends_on("py-rich@13:")
        depends_on("py-mpi4py@4:", when="+mpi")
        depends_on("py-triton", when="+triton")

    # By default Arrow has neither Parquet nor its usual codecs.
    depends_on("arrow+parquet+zstd+snappy+lz4+zlib+brotli")

    # torch of the same device. Its cuda variant is on by default, and it has none for Intel.
    depends_on("py-torch~cuda~rocm", when="~cuda~rocm", type=("build", "run"))
    depends_on("py-torch+cuda~rocm", when="+cuda", type=("build", "run"))
    depends_on("py-torch~cuda+rocm", when="+rocm", type=("build", "run"))
    for _arch in CudaPackage.cuda_arch_values:
        _same = f"+cuda cuda_arch={_arch}"
        depends_on(f"py-torch cuda_arch={_arch}", when=_same, type=("build", "run"))
        if int(_arch.rstrip("af")) < 70:
            conflicts(f"cuda_arch={_arch}", msg="GPUs before compute capability 7.0 can't be used")
    for _arch in ROCmPackage.amdgpu_targets:
        _same = f"+rocm amdgpu_target={_arch}"
        depends_on(f"py-torch amdgpu_target={_arch}", when=_same, type=("build", "run"))

    # The toolkits that centres have. CudaPackage knows which of them compile for which GPU.
    depends_on("cuda@11.8,12.6,12.8:12.9,13", when="+cuda")

    depends_on("hip@6.3", when="+rocm")
    depends_on("hsa-rocr-dev@6.3", when="+rocm")
    depends_on("llvm-amdgpu@6.3", when="+rocm", type="build")

    requires("%oneapi@2024.2", when="+sycl", msg="+sycl needs Intel's icpx: add %oneapi@2024.2")

    def config_settings(self, spec, prefix):
        settings = {"cmake.define.BATCHINFER_DEVICE": self._device(spec)}
        if spec.satisfies("+cuda"):
            archs = spec.variants["cuda_arch"].value
            settings["cmake.define.CMAKE_CUDA_ARCHITECTURES"] = ";".join(archs)
        if spec.satisfies("+rocm"):
            llvm = spec["llvm-amdgpu"].prefix
            targets = spec.variants["amdgpu_target"].value
            settings["cmake.define.CMAKE_HIP_ARCHITECTURES"] = ";".join(targets)
            # CMake refuses hipcc as the compiler of its HIP language.
            settings["cmake.define.CMAKE_HIP_COMPILER"] = join_path(llvm.bin, "amdclang++")
        return settings

    @staticmethod
    def _device(spec):
        """BATCHINFER_DEVICE of the build; never left to what happens to be on the PATH."""
        for variant_name, device in (("cuda", "cuda"), ("rocm", "rocm"), ("sycl", "xpu")):
            if spec.satisfies(f"+{variant_name}"):
                return device
        return "cpu"

    def setup_build_environment(self, env: EnvironmentModifications) -> None:
        env.set("MAX_JOBS", str(determine_number_of_jobs(parallel=True)))
        if self.spec.satisfies("+cuda"):
            env.set("CUDACXX", self.spec["cuda"].prefix.bin.nvcc)

    @property
    def import_modules(self):
        return ["batchinfer", "batchinfer.llm", "batchinfer._engine", "batchinfer._ops"]

    def test_help(self):
        """the command line starts"""
        batchinfer = which(self.prefix.bin.batchinfer, required=True)
        out = batchinfer("--help", output=str.split, error=str.split)
        assert "Parquet in, Parquet out" in out

    def test_engine(self):
        """the engine computes with random weights, on the CPU kernels that every build has"""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
        mkdirp("model")
        with open(os.path.join("model", "config.json"), "w") as file:
            json.dump(config, file)
        batchinfer = which(self.prefix.bin.batchinfer, required=True)
        out = batchinfer(
            "bench",
            "model.path=model",
            "model.dummy_weights=true",
            "bench.workload=decode",
            "bench.rows=2",
            "engine.device=cpu",
            "engine.kv_cache_gb=0.1",
            output=str.split,
            error=str,
        )
        assert json.loads(out)["output_tokens"] == 2048
