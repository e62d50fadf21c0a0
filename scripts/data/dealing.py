"""Volumes dealt to ranks, so that all have about as much to do."""

from __future__ import annotations

from collections.abc import Sequence


def dealt(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The places 0, 1, ... of `costs`, shared out: the costliest first, each to the rank that has least to do so far.

    No rank has more than 4/3 of what the best of all deals would leave it (Graham 1969). Equal costs go round.

    Args:
        costs: of each volume, above 0.
        num_ranks: how many share.

    Returns:
        for each rank its places in ascending order; rank 0 has the first place, as if it did all.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):  # sorted() leaves equals in their order
        rank = loads.index(min(loads))
        shares[rank].append(place)
        loads[rank] += costs[place]
    return sorted(map(sorted, shares), key=lambda share: share[0] if share else len(costs))
