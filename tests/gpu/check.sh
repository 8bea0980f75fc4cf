#!/bin/bash
# Builds the GPU extension into the source tree, runs the GPU tests and times the ops. For a machine with an NVIDIA GPU,
# nvcc, torch, pybind11 and pytest; nothing else of the project needs to be built.
#   tests/gpu/check.sh            build, test, time
#   tests/gpu/check.sh build      one or more of: build test sanitize sanitize-engine bench
# sanitize-engine, whole steps of the engine, wants the project built for the CPU in the source tree too.
# ARCH=sm_80 for another GPU, ARCH=sm_90 to run the 8.0 kernels on a 9.0 one; PYTHON for another interpreter;
# SANITIZER_ARGS for compute-sanitizer, PYTEST_ARGS and BENCH_ARGS for the others.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
arch=${ARCH:-sm_90a}
steps=${*:-build test bench}
small='split_boundaries or wild or (mixed_batches and 0-shape) or other_widths or penalties or (tokens and 1000-ties)'
small+=' or test_windows or soft_caps or rope_and_cache or copy_pages or (rms_norm and 8192) or gates or embed'

build() {
  local objects=build/gpu-check
  mkdir -p "$objects"
  flags=(-O3 -Icsrc -Icsrc/include -gencode "arch=${arch/sm/compute},code=$arch" -Xcompiler -fPIC,-Wall -Xptxas -v)
  if [ "$arch" = sm_90a ]; then flags+=(-DBATCHINFER_SM90A); fi
  pids=()
  for source in csrc/gpu/*.cu; do
    name=$(basename "$source" .cu)
    nvcc -std=c++17 "${flags[@]}" -c "$source" -o "$objects/$name.o" > "$objects/$name.log" 2>&1 & pids+=($!)
  done
  # shellcheck disable=SC2046
  g++ -std=c++20 -O2 -fPIC -Wall -Icsrc -Icsrc/include $("$python" -m pybind11 --includes) \
    '-DBATCHINFER_GPU_VENDOR="cuda"' -c csrc/bindings/gpu.cpp -o "$objects/binding.o" & pids+=($!)
  for pid in "${pids[@]}"; do wait "$pid" || { cat "$objects"/*.log | grep -E 'error|fatal'; exit 1; }; done
  grep -H -E '[1-9][0-9]* bytes spill' "$objects"/*.log || true
  nvcc -shared -cudart static "$objects"/*.o \
    -o "batchinfer/_gpu$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
}

# memcheck (addresses) or racecheck over tests.
sanitize() {
  local tool=$1
  shift
  PYTHONPATH=. compute-sanitizer --tool "$tool" --error-exitcode 9 ${SANITIZER_ARGS:-} \
    "$python" -m pytest -q -x "$@" || exit 9
}

for step in $steps; do
  case $step in
    build) build ;;
    test) PYTHONPATH=. "$python" -m pytest -q tests/gpu ${PYTEST_ARGS:-} ;;
    sanitize) # long contexts and large vocabularies would take hours
      sanitize memcheck tests/gpu -k "$small"
      sanitize racecheck tests/gpu -k "$small" ;;
    sanitize-engine) # launched and captured, in float32 and bfloat16
      sanitize memcheck tests/gpu/test_gpu_engine.py -k greedy
      # racecheck does not get through cuBLAS's kernels. Of captured steps it takes 111 GB of the host's memory, and more
      # than 125 if it need not wait for each launch.
      for tests in 'greedy and not bfloat16' greedy_in_bfloat16; do
        SANITIZER_ARGS="--kernel-name kns=batchinfer --force-synchronization-limit 1 ${SANITIZER_ARGS:-}" \
          BATCHINFER_PLAIN_PRODUCTS=1 sanitize racecheck tests/gpu/test_gpu_engine.py -k "$tests"
      done ;;
    bench) PYTHONPATH=. "$python" tests/gpu/bench_ops.py ${BENCH_ARGS:-} ;;
    *) echo "unknown step $step: build, test, sanitize, sanitize-engine, bench"; exit 64 ;;
  esac
done
