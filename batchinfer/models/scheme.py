"""What a checkpoint stores its quantised matrices as: Scheme, out of a config's ``quantization_config``. No torch.

The methods: fp8 and fbgemm_fp8 (e4m3 with a scale for a tensor, an output or a block), AWQ in its gemm layout (Lin et
al. 2023, arXiv:2306.00978), GPTQ in the layouts of AutoGPTQ and GPTQModel (Frantar et al. 2022, arXiv:2210.17323), and
compressed-tensors (https://github.com/vllm-project/compressed-tensors) with codes of 4 or 8 bits. Which matrices are
quantised is not read from the config but seen in the files: the others are there under their plain names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batchinfer.models.files import Keys, ModelError

Kind = Literal["float8", "int8", "awq", "gptq", "packed"]

FLOATS = ("F32", "F16", "BF16")

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, among eight, of each four bits of a word, lowest bits first."""

METHODS = ("fp8", "fbgemm_fp8", "awq", "gptq", "compressed-tensors")

FORMATS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "pack-quantized": ("packed", (4, 8)),
    "int-quantized": ("int8", (8,)),
    "float-quantized": ("float8", (8,)),
}
"""Of compressed-tensors: their layout, and the bits of a code that it may have here."""


@dataclass(frozen=True)
class Component:
    """One of the tensors that a matrix is stored as: what it holds, and the dtypes and shapes that it may have."""

    holds: Literal["codes", "scales", "zeros", "order"]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    needed: bool = True


@dataclass(frozen=True)
class Scheme:
    """A weight is scale * (code - zero). ``bits`` of a code; ``group`` weights along K share scale and zero (0: all K),
    and ``rows`` outputs do (0: one, or all, as the file has it). ``zero_offset`` is added to stored zeros."""

    method: str
    kind: Kind
    bits: int
    group: int = 0
    rows: int = 0
    zero_offset: int = 0

    def __str__(self) -> str:
        groups = f"groups of {self.group}" if self.group else "a scale for each output or tensor"
        return f"{self.method} ({self.bits} bits, {groups})"

    def groups(self, depth: int) -> int:
        """Scales along K."""
        return -(-depth // self.group) if self.group else 1

    def components(self, outputs: int, depth: int) -> dict[str, Component]:
        """Of a matrix [outputs, depth]: by what stands in a tensor's name in the place of ``weight``."""
        groups, codes = self.groups(depth), 32 // self.bits
        words, wide, tall = -(-depth // codes), -(-outputs // codes), (groups, outputs)
        if self.kind in ("awq", "gptq"):
            qweight = (depth, wide) if self.kind == "awq" else (words, outputs)
            found = {
                "qweight": Component("codes", ("I32",), (qweight,)),
                "qzeros": Component("zeros", ("I32",), ((groups, wide),)),
                "scales": Component("scales", FLOATS, (tall,)),
            }
            return found | ({"g_idx": Component("order", ("I32",), ((depth,),), False)} if self.kind == "gptq" else {})
        if self.rows:
            scale = Component("scales", FLOATS, ((-(-outputs // self.rows), groups),))
        else:
            single = ((), (1,), (1, 1), (outputs,)) if groups == 1 else ()
            scale = Component("scales", FLOATS, (*single, (outputs, groups)))
        if self.kind == "packed":
            return {
                "weight_packed": Component("codes", ("I32",), ((outputs, words),)),
                "weight_scale": scale,
                "weight_zero_point": Component("zeros", ("I32",), ((wide, groups),), False),
                "weight_g_idx": Component("order", ("I32",), ((depth,),), False),
            }
        dtype = "F8_E4M3" if self.kind == "float8" else "I8"
        found = {
            "weight": Component("codes", (dtype,), ((outputs, depth),)),
            "weight_scale_inv" if self.rows and self.method == "fp8" else "weight_scale": scale,
        }
        if self.kind == "int8":
            found["weight_zero_point"] = Component("zeros", ("I8",), scale.shapes, False)
        return found


UNUSED = ("input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "weight_shape")
"""Names in the place of ``weight`` that say nothing of it: activations are not rounded, or with scales of their own."""


def scheme_from_config(keys: Keys) -> Scheme | None:
    """That of ``quantization_config`` (or ``compression_config``, its older name). Raises ModelError naming the key,
    what is allowed and what to do."""
    name = next((name for name in ("quantization_config", "compression_config") if keys.config.get(name)), None)
    if name is None:
        return None
    config = keys.config[name]
    if not isinstance(config, Mapping):
        raise ModelError(f"{keys.where}: {name}={config!r} must be an object")
    fields = Fields(config, f"{keys.where}: {name}")
    method = fields.one_of("quant_method", METHODS)
    if method == "awq":
        fields.one_of("version", ("gemm",), "gemm")
        fields.one_of("zero_point", (True,), True)
        return Scheme(method, "awq", fields.one_of(fields.either("bits", "w_bit"), (4,)), fields.group("q_group_size"))
    if method == "gptq":
        layout = fields.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        return Scheme(
            method,
            "gptq",
            fields.one_of("bits", (4, 8)),
            fields.group(),
            zero_offset=1 if layout == "gptq" else 0,
        )
    if method == "compressed-tensors":
        return _compressed(fields)
    if method == "fbgemm_fp8":
        return Scheme(method, "float8", 8)
    fields.one_of("fmt", ("e4m3",), "e4m3")
    fields.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    rows, group = fields.block("weight_block_size")
    return Scheme(method, "float8", 8, group, rows)


@dataclass(frozen=True)
class Fields:
    """A config of quantised weights; ``where`` names it."""

    config: Mapping[str, Any]
    where: str

    def refused(self, key: str, allowed: str) -> ModelError:
        return ModelError(
            f"{self.where} has {key}={self.config.get(key)!r}, which is not supported; it must be {allowed}. Otherwise "
            "use the unquantised (bf16, fp16, fp32) weights or a GGUF file of the model"
        )

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise self.refused(key, "one of " + ", ".join(map(repr, allowed)))
        return value

    def either(self, *names: str) -> str:
        """The name that is there, or the first."""
        return next((name for name in names if self.config.get(name) is not None), names[0])

    def group(self, *others: str) -> int:
        """Weights along K that share a scale; 0: all (-1 in the files)."""
        key = self.either("group_size", *others)
        value = self.config.get(key)
        if type(value) is not int or not (value == -1 or (value > 0 and value % 16 == 0)):
            raise self.refused(key, "-1 or a multiple of 16")
        return max(value, 0)

    def block(self, key: str) -> tuple[int, int]:
        """Outputs and weights along K that share a scale; (0, 0) where the key is absent."""
        value = self.config.get(key)
        if value is None:
            return 0, 0
        if not isinstance(value, list) or len(value) != 2 or any(type(n) is not int or n < 1 or n % 16 for n in value):
            raise self.refused(key, "a list of two multiples of 16, or absent")
        return value[0], value[1]

    def inner(self, key: str) -> Fields:
        value = self.config.get(key)
        if not isinstance(value, Mapping):
            raise self.refused(key, "an object")
        return Fields(value, f"{self.where}.{key}")


def _compressed(fields: Fields) -> Scheme:
    """Of compressed-tensors. Its groups may differ in which modules they are of, not in how these are stored."""
    for key in ("sparsity_config", "transform_config"):
        inside = fields.config.get(key)
        if inside and not (isinstance(inside, Mapping) and inside.get("format") == "dense"):
            raise fields.refused(key, "absent, or the format 'dense'")
    groups = fields.inner("config_groups")
    weights = [groups.inner(name).inner("weights") for name in groups.config]
    keys = ("num_bits", "type", "strategy", "group_size", "block_structure")
    stored_as = [[one.config.get(key) for key in keys] for one in weights]
    if not weights or any(one != stored_as[0] for one in stored_as):
        raise fields.refused("config_groups", "groups with the same weights, one at least")
    kind, bits = FORMATS[fields.one_of("format", tuple(FORMATS))]
    first = weights[0]
    first.one_of("type", ("float" if kind == "float8" else "int",))
    strategy = first.one_of("strategy", ("tensor", "channel", "group", "block"))
    rows, group = first.block("block_structure") if strategy == "block" else (0, 0)
    if strategy == "group":
        group = first.group()
    return Scheme("compressed-tensors", kind, first.one_of("num_bits", bits), group, rows)
