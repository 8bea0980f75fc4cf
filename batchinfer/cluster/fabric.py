"""What an MPICH is told before MPI_Init, so that it comes up, and lives when a rank dies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROOT = Path("/")

NETMOD, PROVIDER = "MPIR_CVAR_CH4_NETMOD", "FI_PROVIDER"


def has_fast_network(root: Path = ROOT) -> bool:
    """Whether the node has InfiniBand, RoCE, Omni-Path (all are infiniband devices to Linux) or Slingshot (hsn*)."""
    return any((root / "sys/class/infiniband").glob("*")) or any((root / "sys/class/net").glob("hsn*"))


def fabric_settings(library: str, environment: Mapping[str, str], fast: bool) -> dict[str, str]:
    """Variables to set, none that the user has set. ``library``: what MPI says of its version; ``fast``: the node has
    :func:`has_fast_network`.

    Of two network layers take libfabric: with UCX, MPICH's first choice, a message to a dead rank is a segmentation
    fault of the sender (MPICH 5.0.2). Over plain TCP take libfabric's connections by ofi_rxm: its own endpoints over
    TCP (libfabric 2.5) left 6 ranks of 3 nodes in MPI_Init for ever in 25 of 395 starts, those by ofi_rxm in 0 of 230.
    """
    device = next((line for line in library.splitlines() if line.startswith("MPICH Device:")), "")
    if "ofi" not in device or environment.get(NETMOD, "ofi") != "ofi":
        return {}
    wanted = {NETMOD: "ofi"} if "ucx" in device else {}
    if not fast:
        wanted[PROVIDER] = "tcp;ofi_rxm"
    return {name: value for name, value in wanted.items() if name not in environment}
