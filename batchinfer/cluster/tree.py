"""From whom each rank gets the weights, and whom it passes them to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """One rank's neighbours. ``parent`` None: it reads the files itself."""

    parent: int | None = None
    children: tuple[int, ...] = ()


def tree(hosts: Sequence[str | None], hosts_per_reader: int) -> list[Links]:
    """Links of the ranks 0, 1, ..., which run on ``hosts``; those of None are no part of the tree.

    The first rank of every ``hosts_per_reader`` hosts reads. Binary trees: one over the first ranks of the hosts, and
    one in each host, so that the data crosses the network once per host, and a rank has four children at most. (A
    chain would need less of each link, but a thousand ranks deep.) ``hosts_per_reader`` 0: every rank reads.
    """
    if hosts_per_reader == 0:
        return [Links() for _ in hosts]
    on_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        if host is None:
            continue
        on_host.setdefault(host, []).append(rank)
    firsts = [ranks[0] for ranks in on_host.values()]
    groups = [firsts[i : i + hosts_per_reader] for i in range(0, len(firsts), hosts_per_reader)]
    parent: dict[int, int] = {}
    children: dict[int, list[int]] = {rank: [] for rank in range(len(hosts))}
    for ranks in (*groups, *on_host.values()):
        for i, rank in enumerate(ranks[1:], 1):
            parent[rank] = ranks[(i - 1) // 2]
            children[parent[rank]].append(rank)
    return [Links(parent.get(rank), tuple(children[rank])) for rank in range(len(hosts))]
