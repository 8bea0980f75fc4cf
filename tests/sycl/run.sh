#!/usr/bin/env bash
# Runs the SYCL kernels on Intel's CPU device against the reference, and compiles them to the code of Intel's GPUs. Needs
# the .venv of `make test` and g++; no icpx and no GPU. The wheels (1.5 GB installed) go into build/sycl.
#   tests/sycl/run.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
cmake=$(command -v .venv/bin/cmake || command -v cmake)
build=build/sycl
runtime=$PWD/$build/runtime

if [ ! -e "$runtime/installed" ]; then
  python3 -m venv "$runtime"
  "$runtime/bin/pip" install --quiet --disable-pip-version-check intel-sycl-rt==2026.2.0 intel-opencl-rt==2026.2.0
  touch "$runtime/installed"
fi

"$cmake" -S . -B $build -DCMAKE_BUILD_TYPE=None -DBATCHINFER_DEVICE=cpu -DBATCHINFER_SYCL_TESTS=ON \
  -DBATCHINFER_SYCL_RUNTIME="$runtime" -DPython_EXECUTABLE="$PWD/$python" -Dpybind11_DIR="$($python -m pybind11 --cmakedir)"
"$cmake" --build $build --parallel 2 --target sycl_tests

# The wheel's own entry for the OpenCL loader has a path of conda's.
export OCL_ICD_FILENAMES=$runtime/lib/libintelocl.so OMP_NUM_THREADS=1
BATCHINFER_GPU_EMULATOR=$PWD/$build/tests/sycl/_gpu.so .venv/bin/pytest -p no:cacheprovider tests/gpu tests/sycl "$@"

PYTHONPATH=tests $python tests/sycl/compile.py $build/tests/sycl/sycl_device_pass
