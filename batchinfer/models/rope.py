"""Rotary position embedding: from a model's parameters to the table of cosines and sines.

Sources: Su et al. 2021 (arXiv:2104.09864); linear: Chen et al. 2023 (arXiv:2306.15595); dynamic: NTK-aware scaling
as in Peng et al. 2023 (arXiv:2309.00071, section 3.1), which is also the source of yarn; longrope: Ding et al. 2024
(arXiv:2402.13753); llama3: the Llama 3.1 model card's scaling. Each is checked against transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchinfer.models.files import Keys, ModelError
from batchinfer.models.gguf import GgufFile

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeSpec:
    """What decides the rotation angles. ``width`` is the rotated part of a head, in elements (even).

    ``trained_positions`` is the length up to which the model was trained before scaling; ``magnitude`` multiplies
    cosines and sines (yarn and longrope, else 1), ``score_magnitude`` the scores of DeepSeek's attention. ``short`` and
    ``long`` divide the frequencies, one per pair.
    """

    type: str
    theta: float
    width: int
    trained_positions: int
    factor: float = 1.0
    magnitude: float = 1.0
    score_magnitude: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def frequencies(self, positions: int) -> np.ndarray:
        """Radians per position, float64 [width / 2], for runs whose sequences have at most ``positions`` tokens.

        dynamic and longrope depend on the length. transformers takes the longest sequence of the moment, so that
        a row's text depends on its neighbours; here it is the run's limit, the same for every row.
        """
        pairs = np.arange(0, self.width, 2, dtype=np.float64) / self.width
        plain = self.theta**-pairs
        if self.type == "linear":
            return plain / self.factor
        if self.type == "dynamic":
            stretch = self.factor * max(positions, self.trained_positions) / self.trained_positions - (self.factor - 1)
            return (self.theta * stretch ** (self.width / (self.width - 2))) ** -pairs
        if self.type == "yarn":
            return self._yarn(plain)
        if self.type == "llama3":
            return self._llama3(plain)
        if self.type == "longrope":
            return plain / np.array(self.long if positions > self.trained_positions else self.short)
        return plain

    def _yarn(self, plain: np.ndarray) -> np.ndarray:
        """Pairs that turn often keep their frequency, slow ones are interpolated, with a ramp between."""

        def pair_turning(times: float) -> float:
            turns = self.trained_positions / (times * 2 * math.pi)
            return self.width * math.log(turns) / (2 * math.log(self.theta))

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.width - 1)
        ramp = np.clip((np.arange(self.width // 2) - low) / (high - low or 0.001), 0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Short wavelengths stay, long ones are divided by ``factor``, with a ramp between."""
        turns = self.trained_positions * plain / (2 * math.pi)
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return keep * plain + (1 - keep) * plain / self.factor

    def table(self, positions: int) -> np.ndarray:
        """float32 [positions, width]: cosines in the first half, sines in the second, times ``magnitude``.

        Computed in float64: at position 100,000 a float32 angle is off by 0.004 radians.
        """
        angles = np.arange(positions, dtype=np.float64)[:, None] * self.frequencies(positions)
        out = np.empty((positions, self.width), dtype=np.float32)
        np.multiply(np.cos(angles), self.magnitude, out=out[:, : self.width // 2], casting="same_kind")
        np.multiply(np.sin(angles), self.magnitude, out=out[:, self.width // 2 :], casting="same_kind")
        return out


def yarn_magnitude(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Yarn's scale of cosines and sines where the config does not state it."""
    if mscale and mscale_all_dim:
        return yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim)
    return yarn_scale(factor)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """arXiv:2309.00071, equation 22."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_magnitude(factor: float, trained_positions: int) -> float:
    """LongRoPE's scale of cosines and sines where the config does not state it."""
    return math.sqrt(1 + math.log(factor) / math.log(trained_positions)) if factor > 1 else 1.0


def rope_from_config(keys: Keys, head_dim: int, max_positions: int, partial: bool = False) -> tuple[RopeSpec, int]:
    """Rope parameters of a Hugging Face config, in the old spelling (rope_theta, rope_scaling) or the new one
    (rope_parameters), and how many positions the model reaches with them. ``partial``: partial_rotary_factor says how
    much of a head is rotated. Raises ModelError."""
    name = "rope_parameters" if keys.config.get("rope_parameters") else "rope_scaling"
    scaling = keys.config.get(name) or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{keys.where}: {name} must be an object, not {scaling!r}")
    if isinstance(scaling.get("full_attention"), dict):
        scaling = scaling["full_attention"]
    theta = keys.number("rope_theta", 10000.0)
    return _from_parameters(keys, Keys(scaling, f"{keys.where} ({name})"), theta, head_dim, max_positions, partial)


def local_rope_from_config(keys: Keys, head_dim: int, max_positions: int) -> RopeSpec:
    """Rope parameters of the layers with a window, where they have their own (Gemma 3)."""
    both = keys.config.get("rope_parameters")
    scaling = both.get("sliding_attention") if isinstance(both, dict) else None
    inner = Keys(scaling if isinstance(scaling, dict) else {}, f"{keys.where} (rope_parameters)")
    theta = keys.number("rope_local_base_freq", 10000.0)
    return _from_parameters(keys, inner, theta, head_dim, max_positions, False)[0]


def _from_parameters(
    keys: Keys, inner: Keys, theta: float, head_dim: int, max_positions: int, partial: bool
) -> tuple[RopeSpec, int]:
    """``inner`` are the parameters of one table; the config's own ``keys`` hold some of them in the old spelling."""
    scaling = inner.config
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ModelError(f"{inner.where}: rope_type={kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    share = inner.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    width = int(head_dim * share)
    if share != 1.0 and not partial:
        raise ModelError(f"{inner.where}: partial_rotary_factor must be 1: this architecture rotates whole heads")
    if share > 1 or width < 2 or (share != 1.0 and width % 2):
        raise ModelError(f"{inner.where}: partial_rotary_factor={share} makes {width} of {head_dim} rotate: not even")
    trained = max_positions
    if kind in ("llama3", "yarn", "longrope"):
        key = "original_max_position_embeddings"
        trained = (keys if keys.config.get(key) else inner).count(key, max_positions)
    theta = inner.number("rope_theta", theta)
    given: dict[str, Any] = {"type": kind, "theta": theta, "width": width, "trained_positions": trained}
    if kind in ("linear", "dynamic", "llama3"):
        given["factor"] = inner.number("factor")
    if kind == "llama3":
        given |= {key: inner.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        if given["low_freq_factor"] >= given["high_freq_factor"]:
            raise ModelError(f"{inner.where}: low_freq_factor must be below high_freq_factor")
    if kind == "yarn":
        given["factor"] = factor = inner.number("factor", max_positions / trained)
        given |= {"beta_fast": inner.number("beta_fast", 32.0), "beta_slow": inner.number("beta_slow", 1.0)}
        given["truncate"] = scaling.get("truncate") is not False
        mscale, mscale_all_dim = (
            inner.number(key) if scaling.get(key) else None for key in ("mscale", "mscale_all_dim")
        )
        stated = yarn_magnitude(factor, mscale, mscale_all_dim)
        given["magnitude"] = inner.number("attention_factor", stated)
        given["score_magnitude"] = yarn_scale(factor, mscale_all_dim) ** 2 if mscale_all_dim else 1.0
        # Qwen's configs keep the trained length in max_position_embeddings; rope_scaling alone says how far it reaches.
        max_positions = max(max_positions, int(factor * trained))
    if kind == "longrope":
        if trained < 2:
            raise ModelError(f"{inner.where}: original_max_position_embeddings={trained} must be above 1")
        given["factor"] = factor = inner.number("factor", max_positions / trained)
        given |= {name: inner.numbers(f"{name}_factor", width // 2) for name in ("short", "long")}
        given["magnitude"] = inner.number("attention_factor", longrope_magnitude(factor, trained))
    return RopeSpec(**given), max_positions


def rope_from_gguf(file: GgufFile, arch: str, head_dim: int, positions: int) -> RopeSpec:
    """Rope parameters of GGUF metadata; Llama 3.1's scaling is a tensor of divisors there, one per pair."""
    scaling = f"{arch}.rope.scaling"
    kind = file.get(f"{scaling}.type", str, "none")
    theta = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    divisors = next((tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight"), None)
    if divisors is not None:
        if divisors.dtype != "F32" or divisors.shape != (head_dim // 2,):
            raise ModelError(f"{file.path}: rope_freqs.weight must be F32 [{head_dim // 2}]")
        factors = file.floats(divisors)
        return RopeSpec("longrope", theta, head_dim, positions, short=factors, long=factors)
    if kind == "none":
        return RopeSpec("default", theta, head_dim, positions)
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{file.path}: {scaling}.type={kind!r} is not supported; supported are none, linear, yarn")
    factor = file.get(f"{scaling}.factor", float, required=True)
    if kind == "linear":
        return RopeSpec("linear", theta, head_dim, positions, factor=factor)
    trained = file.get(f"{scaling}.original_context_length", int, positions)
    magnitude = yarn_magnitude(factor) * file.get(f"{scaling}.attn_factor", float, 1.0)
    return RopeSpec("yarn", theta, head_dim, trained, factor=factor, magnitude=magnitude)
