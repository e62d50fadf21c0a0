from __future__ import annotations

import logging
import os
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch

from scripts.common import ranks
from scripts.common.errors import UserError
from tests.helpers import finish, start_ranks


def test_one_process_gathers_itself() -> None:
    for value in (3, 2.5, "text", None, {"a": [1]}, torch.arange(3)):
        (found,) = ranks.gather(value)
        assert type(found) is type(value) and str(found) == str(value)
    assert torch.equal(ranks.mean(torch.arange(3.0)), torch.arange(3.0))
    assert ranks.join_if_launched().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"configs/multi_gpu_train\.json needs torchrun"):
        ranks.join()


def talk() -> None:
    os.environ["SLURM_JOB_ID"] = "7"
    assert ranks.join().type in ("cpu", "cuda")
    me = idist.get_rank()
    assert os.environ["SLURM_JOB_ID"] == "7" and idist.get_world_size() == 2
    assert ranks.gather("x" * (2000 + me)) == ["x" * 2000, "x" * 2001] and ranks.gather(me) == [0, 1]
    assert ranks.mean(torch.tensor([1.0 + me])).item() == 1.5
    ranks.log_on_rank_0(me)
    logging.getLogger("test").info("told by a rank")
    idist.finalize()


def test_two_ranks_gather_average_and_one_of_them_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    printed = finish(start_ranks(2, talk, log=log), log)
    assert printed.count("told by a rank") == 1
