"""Dealing volumes to ranks: all of them, once, evenly."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.data.dealing import dealt

COSTS = np.random.default_rng(0).lognormal(18, 0.6, 100).astype(int).tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 11])
def test_each_volume_is_dealt_to_one_rank_and_each_share_is_in_order(count: int, num_ranks: int) -> None:
    shares = dealt(COSTS[:count], num_ranks)
    assert len(shares) == num_ranks and sorted(place for share in shares for place in share) == [*range(count)]
    assert all(share == sorted(share) for share in shares)
    assert shares == dealt(COSTS[:count], num_ranks) and (count == 0 or shares[0][0] == 0)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_shares_are_even(num_ranks: int) -> None:
    loads = [sum(COSTS[place] for place in share) for share in dealt(COSTS, num_ranks)]
    best = max(sum(COSTS) / num_ranks, max(COSTS))
    in_turn = max(sum(COSTS[rank::num_ranks]) for rank in range(num_ranks))
    assert max(loads) < min(1.02 * best, in_turn) and max(loads) - min(loads) <= max(COSTS)
    assert dealt([3, 1, 5, 4], 2) == [[0, 3], [1, 2]]  # 5 to one, 4 and 3 to the other, 1 to the first


def test_equal_volumes_go_round() -> None:
    assert dealt([7] * 8, 3) == [[0, 3, 6], [1, 4, 7], [2, 5]] and dealt([1, 1], 4) == [[0], [1], [], []]
