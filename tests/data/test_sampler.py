from __future__ import annotations

import pytest

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
