"""Methods that say they train in several processes do: the ranks stay alike, and every row is seen once."""

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import run_in_group
from tabular_image.methods import METHODS
from tabular_image.run import build_trainer
from toy import build, toy_data

pytestmark = pytest.mark.slow  # starts processes

SEVERAL = [name for name, method in METHODS.items() if method.several_processes]


def fit(name, folder, settings):
    """Trains for two epochs as one of the processes that torchrun starts; returns the weights and the rows seen."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_WORLD_SIZE": 1}
    elastic = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    environment = {key: str(value) for key, value in (ranks | sizes | elastic).items()}
    data = toy_data(batch_size=8)
    method = build(name, data, settings, epochs=2, accelerator="cpu", devices=size, out=str(folder))
    seen = []
    step = method.training_step
    method.training_step = lambda batch, batch_idx: (seen.append(batch["row"].tolist()), step(batch, batch_idx))[0]
    with patch.dict(os.environ, environment):
        build_trainer(method.options, method).fit(method, datamodule=data)
    return method.state_dict(), seen


@pytest.mark.parametrize("name", SEVERAL)
def test_ranks_stay_alike_and_share_out_the_rows(name, tmp_path):
    (first, rows), (second, others) = run_in_group(2, fit, name, tmp_path, None)
    statistics = ("running_mean", "running_var")  # of each rank's rows, until the first rank's are handed out
    for key, value in first.items():
        assert key.endswith(statistics) or torch.equal(value, second[key]), key
    assert len(rows) == len(others) > 2
    for own, its in zip(rows, others, strict=True):
        assert len(own) == len(its) == 8
        assert not set(own) & set(its)


@pytest.mark.parametrize(
    "settings",
    [{"guidance": "cached", "align": "update"}, {"uncertainty": "random"}, {"max_norm": 0.1, "idle_moves": True}],
    ids=lambda settings: "-".join(settings),
)
def test_settings_of_gaal(settings, tmp_path):
    (first, _), (second, _) = run_in_group(2, fit, "gaal", tmp_path, settings)
    assert torch.equal(first["head.weight"], second["head.weight"])
