#!/bin/sh
# The steps of every image, Docker or Apptainer: what is compiled, into /opt/batchinfer.
#
# usage: build.sh TREE, with in the environment
#   BATCHINFER_DEVICE   cuda, rocm, xpu or cpu
#   TORCH, TORCH_INDEX  requirement and package index of torch; TORCH empty: the base image has one, and it is kept
#   CMAKE_ARGS          for instance -DCMAKE_CUDA_ARCHITECTURES=80;90
#   MAX_JOBS            compilers at once
set -eu
tree=$1
export DEBIAN_FRONTEND=noninteractive

apt-get update
# MPICH: its library has the ABI of Cray MPICH, Intel MPI and MVAPICH, so that a site's own can be bound over it.
apt-get install -y --no-install-recommends g++ make python3-dev python3-venv libmpich-dev
rm -rf /var/lib/apt/lists/*

# With the base image's torch, if it has one.
python3 -m venv --system-site-packages /opt/batchinfer
pip="/opt/batchinfer/bin/pip install --no-cache-dir"
if [ -n "${TORCH-}" ]; then
  $pip --index-url "$TORCH_INDEX" "$TORCH"
fi
$pip --no-binary mpi4py 'mpi4py>=4'
$pip "$tree"
rm -rf "$tree"/build
/opt/batchinfer/bin/batchinfer --version
