"""What an MPICH is told, by its own description and what the user and the node have."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer.cluster.fabric import fabric_settings, has_fast_network

OFI, RXM = {"MPIR_CVAR_CH4_NETMOD": "ofi"}, {"FI_PROVIDER": "tcp;ofi_rxm"}


@pytest.mark.parametrize(
    ("device", "given", "fast", "expected"),
    [
        ("ch4:ucx ofi", {}, False, OFI | RXM),
        ("ch4:ucx ofi", {}, True, OFI),
        ("ch4:ofi", {}, False, RXM),
        ("ch4:ofi", {}, True, {}),
        ("ch4:ofi", {"FI_PROVIDER": "verbs"}, False, {}),
        ("ch4:ucx ofi", {"FI_PROVIDER": "tcp"}, False, OFI),
        ("ch4:ucx ofi", {"MPIR_CVAR_CH4_NETMOD": "ofi"}, False, RXM),
        ("ch4:ucx ofi", {"MPIR_CVAR_CH4_NETMOD": "ucx"}, False, {}),
        ("ch4:ucx", {}, False, {}),
    ],
)
def test_settings(device: str, given: dict[str, str], fast: bool, expected: dict[str, str]) -> None:
    library = f"MPICH Version:      5.0.2\nMPICH Device:       {device}\nMPICH CC: cc --with-ofi"
    assert fabric_settings(library, given, fast) == expected
    assert fabric_settings("Open MPI v5.0.3, package: ofi ucx", given, fast) == {}


def test_fast_networks_are_seen(tmp_path: Path) -> None:
    (tmp_path / "sys/class/net/eth0").mkdir(parents=True)
    assert not has_fast_network(tmp_path)
    (tmp_path / "sys/class/net/hsn0").mkdir()
    assert has_fast_network(tmp_path)
    assert not has_fast_network(tmp_path / "nowhere")
    (tmp_path / "nowhere/sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert has_fast_network(tmp_path / "nowhere")
