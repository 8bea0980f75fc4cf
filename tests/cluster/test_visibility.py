"""The visibility variables, by the rules of those who read them."""

from __future__ import annotations

import pytest

from batchinfer.cluster.visibility import check_visibility, intel_devices, own_slice
from batchinfer.types import ExitCode, JobError

AURORA = [2, 2, 2]
"""Tiles of the cards: a piece of a node with Data Center GPU Max 1550."""

ALL_TILES = [(card, (tile,)) for card in range(3) for tile in range(2)]
ALL_CARDS = [(card, (0, 1)) for card in range(3)]
COMPOSITE = [
    ("", ALL_CARDS),
    ("0,1,2", ALL_CARDS),
    ("2,0", [(0, (0, 1)), (2, (0, 1))]),  # in the driver's order, not the mask's
    ("0.1,1.0", [(0, (1,)), (1, (0,))]),
    ("1.1, 1.0", [(1, (0, 1))]),
    ("1.1,1", [(1, (0, 1))]),
    ("0.1", [(0, (1,))]),
    ("7,0.5", []),
]
FLAT = [("", ALL_TILES), ("0", ALL_TILES[:1]), ("5,2", [ALL_TILES[2], ALL_TILES[5]]), ("3,9", ALL_TILES[3:4])]


@pytest.mark.parametrize(
    ("hierarchy", "mask", "expected"),
    [
        *(("COMPOSITE", mask, expected) for mask, expected in COMPOSITE),
        *((hierarchy, mask, expected) for hierarchy in ("", "FLAT", "flat", "COMBINED") for mask, expected in FLAT),
    ],
)
def test_which_tiles_level_zero_shows(hierarchy: str, mask: str, expected: list[tuple[int, tuple[int, ...]]]) -> None:
    shown = intel_devices(AURORA, {"ZE_FLAT_DEVICE_HIERARCHY": hierarchy, "ZE_AFFINITY_MASK": mask})
    assert [(device.card, device.tiles) for device in shown] == expected
    assert all(device.whole == (len(device.tiles) == 2) for device in shown)


def test_cards_of_one_tile_are_whole_in_every_hierarchy() -> None:
    for hierarchy in ("FLAT", "COMPOSITE"):
        shown = intel_devices([1, 1], {"ZE_FLAT_DEVICE_HIERARCHY": hierarchy, "ZE_AFFINITY_MASK": "1"})
        assert [(device.card, device.part) for device in shown] == [(1, "")]
    assert [device.part for device in intel_devices([4], {"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"})] == [""]
    (some,) = intel_devices([4], {"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE", "ZE_AFFINITY_MASK": "0.3,0.1"})
    assert some.part == "tile 1, 3"


def test_what_sycl_chooses_further_is_not_guessed() -> None:
    assert intel_devices([2], {"ONEAPI_DEVICE_SELECTOR": "level_zero:1"}) == []
    assert len(intel_devices([2], {"ONEAPI_DEVICE_SELECTOR": "level_zero:gpu"})) == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ZE_FLAT_DEVICE_HIERARCHY": "TREE"}, "must be one of FLAT, COMBINED, COMPOSITE"),
        ({"ZE_AFFINITY_MASK": "0.1"}, "ZE_AFFINITY_MASK=0.1 names tiles of cards, .* or set it to COMPOSITE"),
    ],
)
def test_masks_that_mean_nothing_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        intel_devices([2], environment)
    assert caught.value.exit_code == ExitCode.UNFIT


@pytest.mark.parametrize(
    ("given", "local_rank", "own"),
    [
        ("MIG-1a,MIG-2b,MIG-3c", 1, "MIG-2b"),
        ("MIG-1a,MIG-2b", 3, "MIG-2b"),
        ("MIG-GPU-1a-2b/1/0, MIG-GPU-1a-2b/2/0", 1, "MIG-GPU-1a-2b/2/0"),
        ("MIG-1a", 1, None),  # its launcher's choice
        ("0,1", 1, None),
        ("GPU-1a,MIG-2b", 1, None),
        ("", 0, None),
    ],
)
def test_a_slice_for_each_rank(given: str, local_rank: int, own: str | None) -> None:
    assert own_slice({"CUDA_VISIBLE_DEVICES": given}, local_rank) == own


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", "0,1"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles"),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"),
        ("CUDA_VISIBLE_DEVICES", "MIG-2a1b3c4d-d72c-4106-c12f-20bd9faed9f6,MIG-GPU-8932f937/1/0"),
        ("ROCR_VISIBLE_DEVICES", "0,GPU-4b2c1a9f88d0e6f1"),
        ("HIP_VISIBLE_DEVICES", "GPU-4b2c1a9f88d0e6f1"),
        ("ZE_AFFINITY_MASK", "0.1, 1.0,2"),
    ],
)
def test_what_drivers_understand(name: str, value: str) -> None:
    check_visibility({name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CUDA_VISIBLE_DEVICES", "0,gpu1", "CUDA_VISIBLE_DEVICES=0,gpu1: 'gpu1' is not an index"),
        ("ROCR_VISIBLE_DEVICES", "MIG-1a", "is not an index .0. or a UUID .GPU-"),
        ("HIP_VISIBLE_DEVICES", "0-3", "'0-3' is not"),
        ("ZE_AFFINITY_MASK", "0.1.2", "is not a device .0. or a tile of one"),
    ],
)
def test_what_they_would_pass_over_without_a_word(name: str, value: str, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        check_visibility({name: value})
    assert caught.value.exit_code == ExitCode.UNFIT


@pytest.mark.parametrize("second", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
def test_visibility_variables_that_compose_are_refused(second: str) -> None:
    check_visibility({})
    check_visibility({"ROCR_VISIBLE_DEVICES": "0"})
    check_visibility({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"})  # ROCm takes them for one
    with pytest.raises(JobError, match=f"ROCR_VISIBLE_DEVICES=1 and {second}=0.*unset one") as caught:
        check_visibility({"ROCR_VISIBLE_DEVICES": "1", second: "0"})
    assert caught.value.exit_code == ExitCode.UNFIT
