"""Who gets the weights from whom."""

from __future__ import annotations

import pytest

from batchinfer.cluster.tree import Links, tree


def test_a_rank_alone_reads() -> None:
    assert tree(["a"], 64) == [Links()]


@pytest.mark.parametrize("hosts_per_reader", [1, 3, 64])
@pytest.mark.parametrize("ranks_per_host", [1, 4, 8])
@pytest.mark.parametrize("hosts", [1, 2, 7, 65])
def test_every_rank_hangs_on_a_reader(hosts: int, ranks_per_host: int, hosts_per_reader: int) -> None:
    where = [f"node{host}" for host in range(hosts) for _ in range(ranks_per_host)]
    links = tree(where, hosts_per_reader)
    for rank, link in enumerate(links):
        assert link.parent is None or rank in links[link.parent].children
        assert all(links[child].parent == rank for child in link.children)
        assert len(link.children) <= 4
    assert sum(link.parent is None for link in links) == -(-hosts // hosts_per_reader)
    crossing = [
        rank for rank, link in enumerate(links) if link.parent is not None and where[link.parent] != where[rank]
    ]
    assert len(crossing) == hosts - -(-hosts // hosts_per_reader)  # once into each host that does not read

    def depth(rank: int) -> int:
        return 0 if links[rank].parent is None else 1 + depth(links[rank].parent)

    assert max(map(depth, range(len(links)))) <= 10


def test_hosts_that_alternate() -> None:
    assert tree(["a", "b", "a", "b"], 64) == [Links(None, (1, 2)), Links(0, (3,)), Links(0), Links(1)]


def test_no_reader_for_others() -> None:
    assert tree(["a", "a", "b"], 0) == [Links()] * 3
