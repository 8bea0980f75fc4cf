"""Weights that stay codes on a GPU: products against the weights they stand for in float64, and a model's logits
against the dequantised model on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine.tiny_engine import run
from gpu.backend import put
from gpu.test_gpu_engine import BOUND, SPECS, make_engine, prompts, step_logits, weights_of
from ops.group_cases import KINDS, draw

from batchinfer.models.decoder import Decoder
from batchinfer.models.model_spec import ModelSpec
from batchinfer.models.packing import Suiting, bytes_of, pack
from batchinfer.ops import Ops
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.reference import ReferenceOps
from batchinfer.ops.triton.grouped import FROM_DENSE
from batchinfer.types import Request, SamplingParams

TRUTH = ReferenceOps(torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.feature("CUDA kernels", "products with codes: int4, int8 and float8 in groups, with zeros and orders")
@pytest.mark.hardware("weights kept as codes")
def test_products(real_gpu, kind: str, dtype: torch.dtype) -> None:
    """Codes are exact in 16 bits; from FROM_DENSE rows on the weights are rounded to them."""
    eps = torch.finfo(dtype).eps
    for outputs, depth in ((96, 128), (1000, 4096), (4096, 1056)):
        weight = draw(kind, outputs, depth)
        dense, packed = weight.dense(torch.float64), real_gpu.pack_weight(weight)
        bias = torch.randn(outputs)
        for rows in (1, 16, 33, 100, FROM_DENSE, 500):
            x = torch.randn(rows, depth).to(dtype)
            want, sizes = x.double() @ dense.T + bias, x.double().abs() @ dense.abs().T
            for out_dtype in {dtype, torch.float32}:
                out = torch.empty(rows, outputs, dtype=out_dtype, device=real_gpu.device)
                real_gpu.linear(put(x), packed, out, put(bias))
                error = (out.cpu().double() - want).abs()
                weights_rounded = eps / 2 if rows >= FROM_DENSE and dtype is not torch.float32 else 0.0
                # An old torch's product gives 16 bits only, and that of float8 matrices does.
                bound = sizes * (weights_rounded + 2**-17) + (want.abs() + 1) * eps
                # With a scale for each output, one block over the depth among them, activations become float8 too.
                if dtype is torch.bfloat16 and kind.startswith("float8") and weight.scales.shape[1] == 1:
                    bound += sizes * 2**-4 + x.double().abs().amax(1, keepdim=True) / 448 * dense.abs().sum(1) * 2**-10
                assert (error <= bound).all(), (outputs, depth, rows, out_dtype)


def test_float8_is_multiplied_by_the_library_where_it_can(real_gpu) -> None:
    """A product that only rounds activations as it does."""
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    weight, x = draw("float8 of outputs", 512, 1024), torch.randn(40, 1024).bfloat16()
    scales = x.float().abs().amax(1, keepdim=True) / 448
    rounded = (x.float() / scales).to(torch.float8_e4m3fn).double() * scales
    out = torch.empty(40, 512, dtype=torch.bfloat16, device=real_gpu.device)
    real_gpu.linear(put(x), real_gpu.pack_weight(weight), out)
    want = rounded @ weight.dense(torch.float64).T
    # An H100 adds such products in 14 bits (arXiv 2412.19437, 3.3.2). float8 by itself is 2e-2 away from x's product.
    assert (out.cpu().double() - want).norm() < 7e-3 * want.norm()


@pytest.mark.parametrize("kind", ["int4 with zeros", "float8 in blocks"])
def test_a_captured_product_is_replayed_with_other_rows(real_gpu, kind: str) -> None:
    packed = real_gpu.pack_weight(draw(kind, 512, 2048))
    x = torch.randn(7, 2048, device=real_gpu.device, dtype=torch.bfloat16)
    out = x.new_empty(7, 512)
    real_gpu.linear(x, packed, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        real_gpu.linear(x, packed, out)
    x.copy_(torch.randn(7, 2048))
    graph.replay()
    again = torch.empty_like(out)
    real_gpu.linear(x, packed, again)
    assert torch.equal(out, again)


def coded(kind: str, shape: torch.Size) -> GroupQuantized:
    """Numbers as large as the weights of :func:`weights_of`."""
    weight = draw(kind, *shape)
    return replace(weight, scales=weight.scales * (2 * shape[1] ** -0.5))


def decoder(spec: ModelSpec, ops: Ops, dtype: torch.dtype, kind: str) -> tuple[Decoder, int]:
    weights = {
        name: coded(kind, t.shape) if t.ndim == 2 and name.startswith("layers") and "router" not in name else t
        for name, t in weights_of(spec).items()
    }
    weights = {name: t.to(dtype) if isinstance(t, torch.Tensor) and t.ndim == 2 else t for name, t in weights.items()}
    packed = pack(spec, Suiting(ops, dtype)(weights.items()), ops)
    sizes = {"max_positions": 512, "max_step_tokens": 512, "max_samples": 256}
    return Decoder(spec, packed, ops, dtype, **sizes), bytes_of(packed)


@pytest.mark.parametrize("kind", ["int4", "int4 in another order", "int8 with zeros", "float8 in blocks"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixture"])
@pytest.mark.feature("engine", "quantised weights on CUDA: logits in float32 are the dequantised model's, to rounding")
@pytest.mark.hardware("weights kept as codes")
def test_logits(real_gpu, name: str, kind: str) -> None:
    want, _ = decoder(SPECS[name], ReferenceOps(), torch.float32, kind)
    got, _ = decoder(SPECS[name], real_gpu, torch.float32, kind)
    want, got = step_logits(want), step_logits(got)
    assert (got - want).norm() <= BOUND[torch.float32] * want.norm()  # false for NaN


@pytest.mark.parametrize(("kind", "bits"), [("int4", 5.2), ("float8 of outputs", 8.3)])
def test_the_engine_with_codes(real_gpu, kind: str, bits: float) -> None:
    """Graphs and the step ahead; the memory of what is not table or norm."""
    spec = SPECS["llama"]
    held, size = decoder(spec, real_gpu, torch.bfloat16, kind)
    texts = prompts(20)
    requests = [Request(i, text, SamplingParams(max_tokens=12, ignore_eos=True)) for i, text in enumerate(texts)]
    engine = make_engine(held)
    done = run(engine, requests)
    assert all(len(done[i].samples[0].token_ids) == 12 for i in range(len(texts)))
    engine.close()
    matrices = sum(t.numel() for name, t in weights_of(spec).items() if t.ndim == 2 and name != "embed")
    tables = 2 * 2 * spec.vocab_size * spec.width  # the embedding, and packed as the head
    assert size < tables + matrices * bits / 8 + (1 << 16)
