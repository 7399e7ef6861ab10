"""FMR: columns are wired in and knocked out, and the image alone is left."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tabular_image.data.module import TabularImageData
from tabular_image.methods.fmr import FMR
from toy import batches, build, equal_states, fit, samples

ALONE = {"joint": 0, "knockdown": 0}


class Watched(FMR):
    """Notes which columns are left in each epoch, and whether the epoch may be tested."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.left, self.tested = [], []

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.left.append(set(self.kept.nonzero().flatten().tolist()))
        self.tested.append(bool(self.trainer.callback_metrics["val_selection"].isfinite()))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_columns_and_reconstruction_it_is_the_image_baseline_step_for_step(optimizer):
    method = fit(build("fmr", settings=ALONE | {"reconstruction": 0}, optimizer=optimizer, epochs=3))
    baseline = fit(build("image", optimizer=optimizer, epochs=3))
    for name in ("encoders", "head"):
        assert equal_states(getattr(method, name).state_dict(), getattr(baseline, name).state_dict())


def test_an_epoch_with_all_columns_is_a_plain_loop_on_cross_entropy_and_reconstruction():
    method = build("fmr", settings={"joint": 1, "reconstruction": 0.5}, epochs=2)
    plain = copy.deepcopy(method)
    fit(method, epochs=1)
    modules = [plain.encoders, plain.head, plain.wires, plain.reconstruction]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    for batch in batches():
        features, table = plain.encoders["image"](batch["image"]), batch["table"]
        logits = plain.head(features) + table @ plain.wires.weight.T
        error = (table - features @ plain.reconstruction.weight.T).square().mean()
        (F.cross_entropy(logits, batch["target"]) + 0.5 * error / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(method.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [ALONE, {"joint": 1, "reconstruction": 0}])
def test_columns_and_reconstruction_each_change_what_the_image_learns(settings):
    method, baseline = fit(build("fmr", settings=settings, epochs=3)), fit(build("image", epochs=3))
    assert not equal_states(method.encoders.state_dict(), baseline.encoders.state_dict())


def test_the_wires_start_at_zero_and_learn_while_they_are_left():
    method = build("fmr", settings={"joint": 1}, epochs=2)
    assert not method.wires.weight.any()
    fit(method, epochs=1)
    assert method.wires.weight.all()


def test_training_and_inference_logits_coincide_once_no_column_is_left():
    method = fit(build("fmr", settings={"joint": 0.5}, epochs=4)).eval()
    assert method.wires.weight.any()
    assert not method.kept.any()
    batch = batches()[0]
    features = method.encoders["image"](batch["image"])
    assert torch.equal(method.wired_logits(features, batch["table"]), method(batch)["image"])
    method.kept[0] = True
    assert not torch.equal(method.wired_logits(features, batch["table"]), method(batch)["image"])


def test_columns_go_in_equal_parts_and_never_return():
    left = fit(build(Watched, epochs=9)).left
    assert [len(columns) for columns in left] == [8, 8, 8, 6, 4, 2, 0, 0, 0]
    assert all(after <= before for before, after in pairwise(left))


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("settings", [{}, {"joint": 1, "knockdown": 1}, ALONE])
def test_only_epochs_of_the_image_alone_are_tested_and_there_is_one(epochs, settings):
    method = fit(build(Watched, settings=settings, epochs=epochs))
    assert method.tested == [not columns for columns in method.left]
    assert method.tested[-1]


def test_the_columns_of_the_smallest_weights_go_first():
    method = build("fmr")
    with torch.no_grad():
        method.wires.weight.copy_(torch.tensor([5.0, -1, 3, 0.5, -7, 2, 6, -4]).expand_as(method.wires.weight))
    method.keep(5)
    assert method.kept.nonzero().flatten().tolist() == [0, 2, 4, 6, 7]
    with torch.no_grad():
        method.wires.weight[:, 3] = 100  # has gone already
    for count in (2, 7):  # nor does any come back when more may stay
        method.keep(count)
        assert method.kept.nonzero().flatten().tolist() == [4, 6]


@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_a_table_may_have_columns_of_one_kind_alone(kind):
    data = TabularImageData(replace(samples(), **{kind: []}), batch_size=16, workers=0)
    method = fit(build("fmr", data, epochs=3), data)
    assert len(method.kept) == data.table_width
    assert not method.kept.any()
