"""Which GPUs the visibility variables leave to a process, by their own rules: slices of NVIDIA's (MIG), UUIDs of AMD's,
tiles of Intel's. Pure: neither a driver nor torch is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchinfer.types import ExitCode, JobError

HIERARCHIES = ("FLAT", "COMBINED", "COMPOSITE")
"""Values of ZE_FLAT_DEVICE_HIERARCHY: every tile is a device (the default since 2023, and the same with COMBINED, which
also knows the cards), or every card is one."""

_UUID = r"[0-9a-fA-F]+(-[0-9a-fA-F]+)*"  # a beginning of one is enough for the drivers
_AMD = (rf"\d+|-1|GPU-{_UUID}", "an index (0) or a UUID (GPU-...)")
FORMS = {
    "CUDA_VISIBLE_DEVICES": (
        rf"\d+|-1|NoDevFiles|GPU-{_UUID}|MIG-{_UUID}|MIG-GPU-{_UUID}/\d+/\d+",
        "an index (0), a UUID (GPU-...) or that of a slice (MIG-...)",
    ),
    "ROCR_VISIBLE_DEVICES": _AMD,
    "HIP_VISIBLE_DEVICES": _AMD,
    "ZE_AFFINITY_MASK": (r"\d+(\.\d+)?", "a device (0) or a tile of one (0.1)"),
}
"""What the entries of each variable, separated by commas, may be. Drivers take what they don't understand for the end
of the list, without a word."""


@dataclass(frozen=True)
class IntelDevice:
    """A device as Level Zero shows it: ``tiles`` of ``card``; ``whole``: these are all that the card has."""

    card: int
    tiles: tuple[int, ...]
    whole: bool

    @property
    def part(self) -> str:
        """ "" of a whole card, else "tile 1"."""
        return "" if self.whole else f"tile {', '.join(map(str, self.tiles))}"


def check_visibility(environment: Mapping[str, str]) -> None:
    """JobError(69) for a list that its driver would not understand, and if ROCR_VISIBLE_DEVICES is set together with
    HIP_ or CUDA_VISIBLE_DEVICES.

    These compose: the indices of the latter count within what the former leaves, so that a rank gets the wrong GPU, or
    none ("invalid device ordinal"); see AMD's "GPU isolation techniques"."""
    for name, (form, allowed) in FORMS.items():
        for entry in entries(environment, name):
            if not re.fullmatch(form, entry):
                raise JobError(f"{name}={environment[name]}: {entry!r} is not {allowed}", ExitCode.UNFIT)
    names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    given = [f"{name}={environment[name]}" for name in names if environment.get(name)]
    if environment.get("ROCR_VISIBLE_DEVICES") and len(given) > 1:
        text = f"{' and '.join(given)} are both set, and the second counts within the first: unset one of them, "
        raise JobError(text + "best in the job script, before srun", ExitCode.UNFIT)


def entries(environment: Mapping[str, str], name: str) -> list[str]:
    return [entry.strip() for entry in environment.get(name, "").split(",") if entry.strip()]


def own_slice(environment: Mapping[str, str], local_rank: int) -> str | None:
    """What CUDA_VISIBLE_DEVICES has to be in this rank where it lists several slices (MIG), of which CUDA shows a
    process the first alone; None where nothing is to change."""
    given = entries(environment, "CUDA_VISIBLE_DEVICES")
    if len(given) < 2 or not all(entry.startswith("MIG-") for entry in given):
        return None
    return given[local_rank % len(given)]


def intel_devices(tiles: Sequence[int], environment: Mapping[str, str]) -> list[IntelDevice]:
    """The devices that Level Zero shows, in its order, on a node with ``tiles`` in each of its cards. See "Affinity
    Mask" and "Device hierarchy" in the programming guide of its specification (1.9).

    ZE_AFFINITY_MASK chooses among what the hierarchy shows, in whatever order it is written; what is not there is
    passed over. Empty where ONEAPI_DEVICE_SELECTOR chooses further, whose language is SYCL's affair.
    JobError(69) for a hierarchy that there is not, and for tiles in a mask of devices that are tiles already.
    """
    hierarchy = environment.get("ZE_FLAT_DEVICE_HIERARCHY", "").upper() or "FLAT"
    if hierarchy not in HIERARCHIES:
        text = f"ZE_FLAT_DEVICE_HIERARCHY={hierarchy}: it must be one of {', '.join(HIERARCHIES)}"
        raise JobError(text, ExitCode.UNFIT)
    if environment.get("ONEAPI_DEVICE_SELECTOR", "level_zero:*") not in ("level_zero:*", "level_zero:gpu", "*:gpu"):
        return []
    mask = entries(environment, "ZE_AFFINITY_MASK")
    if hierarchy == "COMPOSITE":
        return _cards(tiles, mask)
    if any("." in entry for entry in mask):
        raise JobError(
            f"ZE_AFFINITY_MASK={environment['ZE_AFFINITY_MASK']} names tiles of cards, but with "
            f"ZE_FLAT_DEVICE_HIERARCHY={hierarchy} every tile is a device: number them through, or set it to COMPOSITE",
            ExitCode.UNFIT,
        )
    every = [IntelDevice(card, (tile,), count == 1) for card, count in enumerate(tiles) for tile in range(count)]
    return [device for i, device in enumerate(every) if not mask or str(i) in mask]


def _cards(tiles: Sequence[int], mask: Sequence[str]) -> list[IntelDevice]:
    """With COMPOSITE: a device for each card that the mask names, or of which it names tiles."""
    found = []
    for card, count in enumerate(tiles):
        whole = not mask or str(card) in mask
        shown = tuple(tile for tile in range(count) if whole or f"{card}.{tile}" in mask)
        if shown:
            found.append(IntelDevice(card, shown, len(shown) == count))
    return found
