from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.common.errors import UserError
from scripts.data.sampler import EpochSampler


def test_sampler_covers_each_epoch_once_and_resumes_inside_it() -> None:
    sampler = EpochSampler(10, batch_size=2, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again and sorted(i for _, i in first) == list(range(10))
    sampler.set_epoch(2)
    assert [i for _, i in sampler] != [i for _, i in first]
    sampler.set_epoch(1, start=3)
    assert list(sampler) == first[6:]


def test_ranks_share_out_the_single_process_batches() -> None:
    whole = [i for _, i in EpochSampler(11, batch_size=4, seed=3)]
    ranks = [[i for _, i in EpochSampler(11, 2, 3, rank, num_replicas=2)] for rank in (0, 1)]
    merged = [i for b in range(2) for r in ranks for i in r[2 * b : 2 * b + 2]]
    assert merged == whole and len(set(whole)) == 8


def test_a_batch_larger_than_the_set_is_named() -> None:
    with pytest.raises(UserError, match="batch_size 4 x 1 ranks is more than the 3 training volumes"):
        EpochSampler(3, batch_size=4)


BIG, SMALL = (32, 32, 16), (24, 24, 8)


def batches(
    sizes: list[tuple[int, ...]], batch_size: int, ranks: int = 1, epoch: int = 1, start: int = 0
) -> list[list[int]]:
    """The global batches of an epoch, put together from what each rank gets."""
    shares = []
    for rank in range(ranks):
        sampler = EpochSampler(len(sizes), batch_size, seed=4, rank=rank, num_replicas=ranks, sizes=sizes)
        sampler.set_epoch(epoch, start)
        keys = list(sampler)
        assert {e for e, _ in keys} <= {epoch} and len(keys) == len(sampler) - start * batch_size
        shares.append(np.reshape([i for _, i in keys], (-1, batch_size)).tolist())
    return [[i for share in step for i in share] for step in zip(*shares, strict=True)]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_latents_of_one_size_come_as_volumes_do(length: int, batch_size: int, ranks: int, epoch: int) -> None:
    if length < batch_size * ranks:
        return
    for rank in range(ranks):
        samplers = [EpochSampler(length, batch_size, 4, rank, ranks, sizes) for sizes in (None, [BIG] * length)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        order = np.random.default_rng([4, epoch]).permutation(length)  # of which each rank has its columns
        steps = length // (batch_size * ranks)
        mine = order[: steps * batch_size * ranks].reshape(steps, ranks, batch_size)[:, rank].ravel().tolist()
        assert list(samplers[0]) == list(samplers[1]) == [(epoch, i) for i in mine]


@given(
    st.lists(st.sampled_from([BIG, SMALL, (8, 8, 8)]), min_size=20, max_size=40), st.integers(1, 3), st.integers(1, 5)
)
def test_batches_hold_one_size_whatever_the_ranks(sizes: list[tuple[int, ...]], batch_size: int, epoch: int) -> None:
    ranks = 2
    told = batches(sizes, batch_size, ranks, epoch)
    assert told == batches(sizes, batch_size * ranks, 1, epoch)
    assert len(told) == sum(n // (batch_size * ranks) for n in Counter(sizes).values())
    assert all(len({sizes[i] for i in batch}) == 1 and len(batch) == batch_size * ranks for batch in told)
    used = [i for batch in told for i in batch]
    assert len(set(used)) == len(used)
    assert batches(sizes, batch_size, ranks, epoch, start=2) == told[2:]


def test_every_latent_has_its_turn_and_sizes_are_mixed_within_an_epoch() -> None:
    sizes = [BIG] * 11 + [SMALL] * 7  # of which 3 and 3 are left out of each epoch
    told = [batches(sizes, 4, epoch=epoch) for epoch in range(1, 41)]
    seen = Counter(i for epoch in told for batch in epoch for i in batch)
    assert set(seen) == set(range(18)) and min(seen.values()) > 10
    assert told[0] != told[1] and {len(epoch) for epoch in told} == {3}
    orders = {tuple(sizes[batch[0]] for batch in epoch) for epoch in told}
    assert len(orders) == 3  # the one batch of the small ones comes first, second and last


def test_sizes_of_which_too_few_are_there_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(EpochSampler(7, 2, num_replicas=2, sizes=[BIG] * 4 + [SMALL] * 3)) == 2
    assert "3 of 7 volumes are never trained on: each of their 1 sizes has fewer than the 4 of a step" in caplog.text
    told = (
        "batch_size 3 x 2 ranks is more than the 4 training volumes of the commonest size, 32 x 32 x 16; lower it, or "
        "encode again with a larger resize_multiple, for fewer sizes"
    )
    with pytest.raises(UserError) as caught:
        EpochSampler(7, 3, num_replicas=2, sizes=[BIG] * 4 + [SMALL] * 3)
    assert str(caught.value) == told
