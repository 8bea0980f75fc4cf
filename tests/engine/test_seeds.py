from __future__ import annotations

from batchinfer.engine.seeds import mix, sample_seed


def test_mix_is_splitmix64() -> None:
    """The generator's first outputs for two seeds, as its authors' reference implementation gives them."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317


def test_samples_of_requests_have_their_own_seeds() -> None:
    seeds = {sample_seed(request, index) for request in range(100) for index in range(100)}
    assert len(seeds) == 100 * 100
    assert all(0 <= seed < 2**64 for seed in seeds)
