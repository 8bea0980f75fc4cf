"""The portable GPU backend: every op as a Triton kernel, for NVIDIA, AMD and Intel GPUs, without a compiled extension.

A file of kernels for each duty, and ``backend.py``, which checks nothing itself (``ops/device.py`` does) and launches
them. Sizes that a model fixes are compile-time constants, sizes that change with the step are not, so that a job
compiles each kernel once or twice. Nothing here knows a vendor but ``blocks.py``, which holds the block sizes.
"""
