"""Launches the kernels of experts.py, for any backend whose weights torch can reach on the device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from triton import cdiv

from batchinfer.ops import Clamp, Experts
from batchinfer.ops.triton import experts as kernels
from batchinfer.ops.triton.blocks import expert_blocks, power_of_2, row_block


class Mixture:
    """``shared``: bytes of shared memory of a program. Keeps the addresses of the experts' weights, one table a layer,
    and the weights with them."""

    def __init__(self, shared: int, rdna: bool):
        self._shared, self._rdna = shared, rdna
        self._tables: dict[int, tuple[Experts, Tensor, Tensor]] = {}

    def mix(
        self,
        launch: Callable[..., None],
        x: Tensor,
        router: Tensor,
        experts: Experts,
        shared: Tensor | None,
        out: Tensor,
    ) -> None:
        """``Ops.mix_experts`` by ``launch(kernel, grid, arguments ..., options=...)``; ``shared`` [T, D]: what the
        shared expert makes of x."""
        tokens, width = x.shape
        logits, choices = experts.logits, experts.choices
        top_k, inner = experts.top_k, experts.widths[0]
        count = tokens * top_k
        gate_up, down = self._addresses(experts, choices)
        chosen, order = (x.new_empty(count, dtype=torch.int32) for _ in range(2))
        starts, weights = x.new_empty(choices + 1, dtype=torch.int32), x.new_empty(count, dtype=torch.float32)
        gated, parts = x.new_empty(count, inner), x.new_empty(count, width)
        together = power_of_2(choices)
        options = {
            "CHOICES": choices,
            "TOP_K": top_k,
            "RENORMALISE": experts.renormalise,
            "SIGMOID": experts.scores == "sigmoid",
            "GROUPS": experts.groups,
            "KEPT": experts.kept_groups,
            "BLOCK": together,
        }
        routed = (router, experts.correction, chosen, weights, logits, experts.scale)
        launch(kernels.route, (tokens,), *routed, **options, num_warps=1)
        launch(kernels.arrange, (choices,), chosen, order, starts, count, BLOCK=1024)
        blocks = expert_blocks(cdiv(count, choices), x.element_size(), self._shared, self._rdna)
        tiles = min(cdiv(count, blocks.rows) + choices, count)
        shape = {
            "EXPERTS": choices,
            "EXPERT_BLOCK": together,
            "WIDTH": width,
            "INNER": inner,
            "ROWS": blocks.rows,
            "COLUMNS": blocks.columns,
            "DEPTH": blocks.depth,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
        grid = (tiles, cdiv(inner, blocks.columns))
        clamp = experts.clamp or Clamp(0.0, 0.0)
        given = (x, gate_up, experts.gate_up_bias, gated, order, starts, clamp.alpha, clamp.limit)
        clamped = experts.clamp is not None
        launch(kernels.gated_products, grid, *given, CLAMPED=clamped, TOP_K=top_k, **shape)
        grid = (tiles, cdiv(width, blocks.columns))
        launch(kernels.down_products, grid, gated, down, experts.down_bias, parts, order, starts, **shape)
        block = row_block(width)
        grid = (tokens, cdiv(width, block))
        options = {"TOP_K": top_k, "SHARED_GATE": experts.shared_gate, "BLOCK": block}
        launch(kernels.add_up, grid, parts, weights, shared, router, out, logits, width, **options)

    def _addresses(self, experts: Experts, choices: int) -> tuple[Tensor, Tensor]:
        key = experts.gate_up[0].data_ptr()
        if key not in self._tables:
            addresses = [[t.data_ptr() for t in weights[:choices]] for weights in (experts.gate_up, experts.down)]
            if any(address % kernels.ALIGNMENT.value for address in chain(*addresses)):
                raise ValueError(f"experts: a weight does not lie at a multiple of {kernels.ALIGNMENT.value} bytes")
            tables = torch.tensor(addresses, dtype=torch.int64, device=experts.gate_up[0].device)
            self._tables[key] = (experts, *tables)
        return self._tables[key][1:]
