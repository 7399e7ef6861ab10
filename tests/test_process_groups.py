"""The tests' own process groups: what happens where a rank fails, or its process crashes."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from processes import RankCrashError, run_in_group

pytestmark = pytest.mark.slow  # starts processes


def crash_on_rank_1(marker):
    """Sums the ranks; the process of rank 1 crashes first where the marker is not there yet."""
    if dist.get_rank() == 1 and not (marker and marker.exists()):
        if marker:
            marker.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return total.item()


def test_a_group_of_which_a_rank_crashes_runs_once_more_and_says_where(tmp_path):
    with pytest.warns(UserWarning, match=r"A rank crashed.*SIGSEGV(.|\n)*crash_on_rank_1"):
        assert run_in_group(2, crash_on_rank_1, tmp_path / "marker") == [1, 1]


def test_a_rank_that_crashes_always_is_an_error():
    with pytest.warns(UserWarning, match="A rank crashed"), pytest.raises(RankCrashError, match="SIGSEGV"):
        run_in_group(2, crash_on_rank_1, None)
    assert run_in_group(2, dist.get_world_size) == [2, 2]  # later tests find a group that works


def fail_on_rank_1(calls):
    if dist.get_rank() == 1:
        with calls.open("a") as file:
            file.write("called\n")
        raise ValueError("what rank 1 does not like")
    dist.barrier()


def test_what_a_rank_raises_is_raised_and_not_run_again(tmp_path):
    calls = tmp_path / "calls"
    with pytest.raises(ValueError, match="what rank 1 does not like"):
        run_in_group(2, fail_on_rank_1, calls)
    assert calls.read_text() == "called\n"
