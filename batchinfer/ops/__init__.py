"""The op list: every computation on a device, with its contract.

``reference.py`` is the plain torch truth of each op, ``native.py`` the compiled one for CPUs, ``gpu.py`` the one for
GPUs, ``triton/`` the portable one for GPUs. The backend is chosen once, by :func:`load`, and handed to the model as an
argument; nothing above this package but the engine's runner asks which device it runs on.

Notation: T tokens of the step, S sequences of the step, N rows that sample, D model width, H query heads, G key/value
heads (H is a multiple of G), E head width, V vocabulary, P pages, B tokens per page. Weights have the engine's dtype
(float32 or bfloat16), and so has the KV cache, unless it has the other one of these, float8_e4m3fn, or int8: rows of E
codes and their scale then, [P, G, B, E + 4]. ``quantized.encode_kv`` makes its rows. Activations have the dtype that
``activations`` gives, and those that only ``linear`` and ``gated_linear`` read the one of ``linear_inputs``. All
tensors lie on ``device``.
Every op writes into the ``out`` it is given, which is contiguous and may not alias an input unless the op says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from batchinfer.ops.choice import choose, find_gpus

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from batchinfer.ops.grouped import GroupQuantized
    from batchinfer.ops.quantized import Quantized

Activation = Literal["gelu", "gelu_tanh", "relu"]
"""Functions of an MLP without a gate."""


Lack = Literal[
    "mix_experts",
    "norm of all heads",
    "quantised weights",
    "groups of codes",
    "KV cache of another dtype",
    "int8 KV cache",
    "float16",
    "float8 KV cache beside float32",
]
"""Ops, options of ``rope_and_cache`` and ``pack_weight``, caches and dtypes that not every backend has."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), first half against second half of the rotated width.

    ``cos_sin`` float32 [positions, rotary width]: cosines in the first half, sines in the second, already scaled.
    """

    cos_sin: Tensor


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of the queries and keys before rope: weights float32 [E] of each head (Qwen3), or [H*E] and [G*E] of
    all heads together (OLMo 2)."""

    q: Tensor
    k: Tensor
    eps: float


@dataclass(frozen=True)
class Clamp:
    """GPT-OSS's gate in place of silu(gate) * up: gate * sigmoid(alpha * gate) * (up + 1), where gate is at most
    ``limit``, and up at most that on either side."""

    alpha: float
    limit: float


Scores = Literal["softmax", "sigmoid"]
"""What a router's logits become: together, or each by itself."""


@dataclass(frozen=True)
class Experts:
    """Gated MLPs (SiLU, or ``clamp``), packed: gate_up[j] [2*I, D] and down[j] [D, I], with I = widths[j]; biases
    float32 [X, 2*I] and [X, D] of all X choices, or None.

    A token goes through the ``top_k`` of the choices with the best ``scores``, weighted by these times ``scale``
    (``renormalise``: divided by their sum first). ``correction`` float32 [X] is added for the choice alone. With
    ``groups`` of equal size, only the ``kept_groups`` best of them have choices, by their best score (softmax), or the
    sum of their two best (sigmoid). ``shared``: the last MLP is no choice, all tokens go through it, weighted by the
    sigmoid of the router's last logit (Qwen2-MoE), or as it is where there is no ``shared_gate`` (DeepSeek-V2, V3:
    arXiv:2405.04434, arXiv:2412.19437).
    """

    gate_up: tuple[Any, ...]
    down: tuple[Any, ...]
    widths: tuple[int, ...]
    top_k: int
    renormalise: bool
    shared: bool = False
    shared_gate: bool = True
    scores: Scores = "softmax"
    scale: float = 1.0
    correction: Tensor | None = None
    groups: int = 1
    kept_groups: int = 1
    clamp: Clamp | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def choices(self) -> int:
        """Experts that a router chooses from."""
        return len(self.down) - self.shared

    @property
    def logits(self) -> int:
        """What a router gives for each token."""
        return self.choices + (self.shared and self.shared_gate)


@dataclass(frozen=True)
class AttentionInput:
    """Which tokens attend to what; the same for every layer of a step. int32 tensors.

    ``q_start`` [S+1]: tokens q_start[i]..q_start[i+1] of the step belong to sequence i, and are its last ones.
    ``kv_len`` [S]: length of sequence i, this step's tokens included. ``slot`` [S]: its row of ``page_table``
    [slots, pages per slot], where entry j is the page of positions j*B..(j+1)*B-1. ``decode_only`` promises that no
    sequence has more than one token in the step, so that a backend need not look for others. After ``feed_back`` a
    kv_len -n is of a sequence of n positions, one of them of the step, that has ended: what its token attends to is
    wanted by nobody, and becomes some finite numbers.
    """

    q_start: Tensor
    kv_len: Tensor
    slot: Tensor
    page_table: Tensor
    decode_only: bool = False


@dataclass(frozen=True)
class SampleInput:
    """Per sampled row: how to choose. Fields as in ``types.SamplingParams``; all tensors of length N.

    ``seed`` int64 (bits of the unsigned seed of the sample), ``position`` int32: how many tokens the sample has
    already. ``history_ids`` int32 with ``history_start`` int32 [N+1]: prompt and output tokens of the rows that are
    penalised (empty for others); the first ``history_prompt`` int32 [N] of each are prompt. ``bias_ids`` int32 and
    ``bias_values`` float32 with ``bias_start`` int32 [N+1]: what is added to a token's logit; no token twice in a row.
    ``banned_ids`` int32 with ``banned_start`` int32 [N+1]: tokens that may not be chosen (stop tokens before
    min_tokens, ends of bad words). ``allowed`` int32 [N, ceil(V / 32)]: only tokens t may be chosen whose bit t % 32 of
    word t // 32 is set. ``num_logprobs`` int32 [N]: -1 off, else the number of alternatives. Each of the five groups is
    None if no row needs it.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    penalties: tuple[Tensor, Tensor, Tensor] | None = None  # repetition, presence, frequency: float32 [N]
    history_ids: Tensor | None = None
    history_start: Tensor | None = None
    history_prompt: Tensor | None = None
    bias_ids: Tensor | None = None
    bias_start: Tensor | None = None
    bias_values: Tensor | None = None
    banned_ids: Tensor | None = None
    banned_start: Tensor | None = None
    allowed: Tensor | None = None
    num_logprobs: Tensor | None = None


@dataclass(frozen=True)
class SampleOutput:
    """``tokens`` int32 [N]; with logprobs: ``chosen`` float32 [N], ``top_ids`` int32 and ``top`` float32 [N, K], K the
    largest ``num_logprobs``, most likely first, ties by smaller id. Log-softmax of the unmodified logits."""

    tokens: Tensor
    chosen: Tensor | None = None
    top_ids: Tensor | None = None
    top: Tensor | None = None


class Ops(Protocol):
    """What a backend provides. Raises ValueError on shapes or dtypes outside the contract."""

    device: torch.device
    lacks: frozenset[Lack]
    """What of the below this backend has not got yet."""

    def activations(self, weights: torch.dtype) -> torch.dtype:
        """The dtype of q, the residual stream and what ``linear`` gives, where weights and cache have ``weights``."""

    def linear_inputs(self, weights: torch.dtype) -> torch.dtype:
        """The dtype of normalised x, attention's output and gated products: ``activations``, or a shorter one where
        ``linear`` would round them to it anyway."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros on the device, for a KV cache. May take memory only when it is first written."""

    def pack_weight(self, weight: Tensor | Quantized | GroupQuantized, gated: bool = False) -> Any:
        """[N, K] weight, in the engine's dtype or quantised -> opaque packed form for ``linear``, or with ``gated`` for
        ``gated_linear``; done once at load. A Quantized one multiplies activations that are quantised too, as
        ``quantized.encode`` has it; a GroupQuantized one is as good as the weights it stands for."""

    def linear(self, x: Tensor, weight: Any, out: Tensor, bias: Tensor | None = None) -> None:
        """out [T, N] = x [T, K] @ weight.T (+ bias float32 [N]). A row's result does not depend on T or on the other
        rows (same order of additions), which is what makes tokens independent of the batch."""

    def gated_linear(self, x: Tensor, weight: Any, out: Tensor, sums: Tensor, bias: Tensor | None = None) -> None:
        """out [T, I] = silu_mul of what ``linear`` gives for weight [2I, K], the first half of which are the gates.
        ``sums`` [T, 2I], of the dtype of ``activations``, is room for a backend that needs it."""

    def embed(self, ids: Tensor, table: Tensor, out: Tensor, scale: float = 1.0) -> None:
        """out [T, D] = scale * table[ids]; ids int32 [T], table [V, D] in the engine's dtype.
        Out-of-range ids raise."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
        """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467). x, out [T, D], weight float32 [D].
        With ``residual`` [T, D]: residual += x first, in place, and the sum is normalised. out may be x, if both have
        the same dtype."""

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out: Tensor,
        residual: Tensor | None = None,
    ) -> None:
        """LayerNorm (Ba et al. 2016, arXiv:1607.06450). x, out [T, D], weight and bias float32 [D]. ``residual`` as in
        ``rms_norm``. out may be x."""

    def add(self, x: Tensor, residual: Tensor) -> None:
        """residual [T, D] += x, in place."""

    def softcap(self, x: Tensor, softcap: float) -> None:
        """x [N, V] float32 = softcap * tanh(x / softcap), in place (Gemma 2, arXiv:2408.00118); softcap > 0."""

    def rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        kv_index: Tensor,
        rope: Rope | None,
        k_cache: Tensor,
        v_cache: Tensor,
        q_out: Tensor,
        norm: HeadNorm | None = None,
    ) -> None:
        """Split qkv [T, (H+2G)*E] into q, k, v; normalise heads; rotate q and k by positions int32 [T]; write q to
        q_out [T, H, E] and k, v to token kv_index int64 [T] (= page*B + offset) of the caches [P, G, B, E]."""

    def copy_pages(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        """Page target[i] of both caches [P, G, B, E], of any dtype, becomes a copy of page source[i]; int32 [C]. No
        page is a target twice, or source and target."""

    def feed_back(self, ids: Tensor, kv_len: Tensor, slot: Tensor, last_token: Tensor, stop_ids: Tensor) -> None:
        """What the step before sampled, to those who go on with it; on devices alone whose steps run ahead of the host.
        All int32: an id -1 of ids [R], R leading sequences of one token, becomes last_token[slot[i]], slot [R]. Where
        that is among stop_ids[i] [R, K], -1 for none, the sequence has ended, and kv_len[i] [R] becomes negative."""

    def plan_attention(self, inputs: AttentionInput, num_heads: int, k_cache: Tensor, window: int = 0) -> Any:
        """Host work of the step's attention (work list), done once and used by every layer with this ``window``: a
        token at position p sees the positions above p - window only (0: all up to its own)."""

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Any,
        scale: float,
        out: Tensor,
        lse: Tensor,
        softcap: float = 0.0,
    ) -> None:
        """Causal attention over pages: out [T, H, E], lse float32 [T, H] (natural log of the sum of exponentials of
        the scores). A score is s = scale * q.k, or softcap * tanh(s / softcap) with a ``softcap`` above 0. Query head
        h reads key/value head h // (H // G). The order of additions depends on the sequence alone. K/V of this step's
        tokens are already in the caches."""

    def sink(self, attn: Tensor, lse: Tensor, sinks: Tensor) -> None:
        """attn [T, H, E], the output of ``attention`` with its ``lse``, in place becomes that of softmaxes with one
        more score in their sums, ``sinks`` float32 [H] (Xiao et al. 2023, arXiv:2309.17453; GPT-OSS): the keys' share
        of the sum scales it."""

    def copy(self, x: Tensor, out: Tensor) -> None:
        """out = x, of one shape and dtype, or one that broadcasts; both may be views with strides."""

    def attend_texts(
        self, qkv: Tensor, starts: Sequence[int], scale: float, out: Tensor, reach: int | None = None
    ) -> None:
        """Attention of each token to all of its text, or to the tokens up to ``reach`` before and behind it, without a
        cache: qkv [T, 3, H, E] and out [T, H, E] of the dtype of ``activations``; text i is the tokens
        starts[i]..starts[i + 1], from 0 to T, none of them empty. A text's result does not depend on the others."""

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """out [T, I] = silu(gate_up[:, :I]) * gate_up[:, I:]."""

    def gelu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """out [T, I] = gelu(gate_up[:, :I]) * gate_up[:, I:], the GELU in its tanh form (``activate``)."""

    def activate(self, kind: Activation, x: Tensor, out: Tensor) -> None:
        """out [T, I] = f(x), where f is "relu", "gelu" or "gelu_tanh", its approximation by tanh (Hendrycks & Gimpel
        2016, arXiv:1606.08415). out may be x."""

    def mix_experts(self, x: Tensor, router: Tensor, experts: Experts, out: Tensor) -> None:
        """out [T, D] = the weighted sum of the outputs of x's experts (Shazeer et al. 2017, arXiv:1701.06538). router
        float32 [T, experts.logits]. Of equal logits the smaller expert is chosen; a token's sum is in the order of the
        experts' numbers, whatever tokens stand beside it. out may be x."""

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        """out [N, D] = x[index]; index int32 [N]."""

    def sample(self, logits: Tensor, inputs: SampleInput) -> SampleOutput:
        """Choose one token per row of logits float32 [N, V] (may be overwritten).

        Order: logprobs of the raw logits; biases; penalties (repetition as in Keskar et al. 2019 over prompt and
        output, presence and frequency over output); banned tokens and those not allowed; temperature; top-k, then
        top-p, then min-p on the softmax of what is left; Gumbel-max with Philox4x32-10 (Salmon et al. 2011) keyed by
        seed and counted by (position, token id). Ties in the filters keep all tied tokens; ties in the maximum take the
        smallest id. Temperature 0 is the arg max after penalties and bans."""


def load(device: str, threads: int = 0, *, rank: int = 0, ops: str = "auto", kernels: str | None = None) -> Ops:
    """The ops for ``device`` and ``ops``, values of ``engine.device`` and ``engine.ops``, in the process that is number
    ``rank`` of its node. ``threads`` (of the CPU backend) 0: the CPUs that this process may use. ``kernels``: a bundle
    of Triton's, which every GPU backend may take some of.

    Raises RuntimeError, saying what to do, where the build or the node lacks the device.
    """
    choice = choose(device, ops, find_gpus, rank)
    if choice.backend in ("native", "triton"):
        from batchinfer.ops.triton.cache import use_local_cache

        cache = use_local_cache(rank)
        if kernels is not None:
            try:
                from batchinfer.ops.triton.bundle import use_bundle
            except ImportError as error:
                raise RuntimeError(f"engine.kernels={kernels} is for Triton 3.4 or newer ({error})") from None
            use_bundle(Path(kernels), cache)
    if choice.backend == "native":
        from batchinfer.ops.gpu import open_gpu

        return open_gpu(choice.device)
    if choice.backend == "triton":
        from batchinfer.ops.triton.backend import TritonOps

        return TritonOps(choice.device)
    if choice.backend == "reference":
        from batchinfer.ops.reference import ReferenceOps

        return ReferenceOps()
    from batchinfer.ops.native import NativeOps

    return NativeOps(choice.backend, threads)
