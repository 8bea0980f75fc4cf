#!/usr/bin/env bash
# Builds the GPU kernels, as CUDA and as HIP, for the emulator, with AddressSanitizer and UndefinedBehaviorSanitizer, and runs the kernel
# tests on it. Needs the .venv of `make test`, and GCC on x86-64; no GPU and no nvcc.
#   tests/simt/run.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
cmake=$(command -v .venv/bin/cmake || command -v cmake)
build=build/emulated

"$cmake" -S . -B $build -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBATCHINFER_DEVICE=cpu -DBATCHINFER_GPU_EMULATION=ON \
  -DBATCHINFER_SANITIZE=ON -DPython_EXECUTABLE="$PWD/$python" -Dpybind11_DIR="$($python -m pybind11 --cmakedir)"
"$cmake" --build $build --parallel 2 --target gpu_emulator

# The interpreter is not built with the sanitizer: its library comes first, and libstdc++ so that it finds exceptions.
export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)"
emulate() { # extension, capability, tests
  BATCHINFER_GPU_EMULATOR=$PWD/$build/tests/simt/$1.so BATCHINFER_EMULATED_CAPABILITY=$2 LD_PRELOAD=$preload \
    .venv/bin/pytest -p no:cacheprovider --capture=sys "${@:3}"
}

# The attention of 8.0, and HIP with warps of 64 lanes and of 32, beside the tests of 9.0. Reports of the sanitizers go to file
# descriptor 2: --capture=sys lets them.
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
(
  emulate _gpu 8 tests/gpu/test_gpu_attention.py "$@"
  emulate _gpu_hip64 9 tests/gpu --ignore=tests/gpu/test_emulator.py "$@"
  emulate _gpu_hip32 9 tests/gpu/test_gpu_attention.py tests/gpu/test_gpu_float8.py "$@"
) & others=$!
emulate _gpu 9 tests/gpu "$@"
wait "$others"
