#!/bin/sh
# What the final image needs beside /opt/batchinfer: Python, MPICH's library, OpenMP's for torch.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv libmpich12 libgomp1
rm -rf /var/lib/apt/lists/*
