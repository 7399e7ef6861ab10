"""MFH: columns are ranked by what both modalities know, and a teacher of the best teaches without labels."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tabular_image.data import Samples
from tabular_image.data.module import TabularImageData
from tabular_image.data.tables import TableColumn
from tabular_image.methods.mfh import MFH, saliency
from toy import batches, build, equal_states, fit, samples, toy_data

SHORT = {"pair_epochs": 1, "teacher_epochs": 2}


class Halfway(MFH):
    """Notes what the student's stage starts from, and can give it other labels."""

    labels_for_the_student = True

    def begin_stage(self):
        super().begin_stage()
        if self.stage.name == "student":
            self.before = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def training_step(self, batch, batch_idx):
        if self.stage.name == "student" and not self.labels_for_the_student:
            batch = batch | {"target": batch["target"].flip(0)}
        super().training_step(batch, batch_idx)


def planted(rows=240):
    """Four classes of two bits: two columns say each, with errors, and the image shows the first; one says nothing."""
    generator = np.random.default_rng(0)
    seen, hidden = bits = generator.integers(0, 2, (2, rows))
    seen_too, hidden_too = bits ^ (generator.random((2, rows)) < 0.1)
    table = pd.DataFrame(
        {
            "seen": seen + generator.normal(0, 0.3, rows),
            "hidden": hidden + generator.normal(0, 0.3, rows),
            "noise": generator.normal(0, 1, rows),
            "seen_too": np.where(seen_too, "high", "low"),
            "hidden_too": np.where(hidden_too, "high", "low"),
        }
    )
    return Samples(
        name="planted",
        images=np.clip(generator.normal(120 * seen[:, None, None] + 60, 20, (rows, 8, 8)), 0, 255).astype(np.uint8),
        table=table,
        numeric=["seen", "hidden", "noise"],
        categorical=["seen_too", "hidden_too"],
        target=pd.Series(2 * seen + hidden).map(str),
        ids=pd.Series(range(rows), name="id"),
        grey=True,
        image_size=8,
    )


def test_columns_that_the_image_shows_too_outscore_those_of_the_table_alone():
    data = TabularImageData(planted(), batch_size=16, workers=0)
    method = fit(build("mfh", data, settings={"pair_epochs": 6, "removed": 0.6}), data, epochs=7)
    scores = dict(zip([column.name for column in data.table_columns], method.saliency.tolist(), strict=True))
    assert min(scores["seen"], scores["seen_too"]) > 2 * max(scores["hidden"], scores["hidden_too"], scores["noise"])
    assert min(scores.values()) == 0
    assert max(scores.values()) == 1
    # The categorical column stays with both its categories.
    assert method.kept.tolist() == [True, False, False, True, True, False, False]


def test_saliency_is_the_distance_from_the_student_under_permutation():
    torch.manual_seed(0)
    table, weight = torch.randn(4096, 3), torch.tensor([[2.0], [1.0], [0.0]])
    columns = [TableColumn("both", 0, 1, False), TableColumn("noise and weak", 1, 3, True)]
    student = table[:, :1] * 2  # knows what the first column says
    # E(2x - 2x')^2 + E y^2 = 9, and E y^2 = 1: scaled, 1 and 0.
    scores = saliency(lambda rows: rows @ weight, table, student, columns, permutations=3)
    assert scores.tolist() == [1, 0]
    columns = [TableColumn(name, position, position + 1, False) for position, name in enumerate("abc")]
    weight = torch.tensor([[2.0], [1.0], [1.0]])
    student = table[:, :2].sum(1, keepdim=True)
    # Distances E(2x - x)^2 + E z^2 plus what permuting adds: 2 * 2 * 1 for a, 2 * 1 * 1 for b, nothing for c.
    scores = saliency(lambda rows: rows @ weight, table, student, columns, permutations=3)
    torch.testing.assert_close(scores, torch.tensor([1, 0.5, 0]), atol=0.05, rtol=0)


def test_equal_columns_have_equal_and_finite_saliency():
    table = torch.ones(8, 2)
    columns = [TableColumn("a", 0, 1, False), TableColumn("b", 1, 2, False)]
    assert saliency(lambda rows: rows, table, table, columns, permutations=2).tolist() == [0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_with_nothing_removed_it_is_distillation_alone(optimizer):
    method = fit(build("mfh", settings={"removed": 0, "teacher_epochs": 2}, epochs=2, optimizer=optimizer))
    settings = {"weight": 1, "temperature": 1, "teacher_epochs": 2}
    distilled = fit(build("kd", settings=settings, epochs=2, optimizer=optimizer))
    assert [stage.name for stage in method.stages()] == ["teacher", "student"]
    for name in ("encoders", "head", "teacher_head"):
        assert equal_states(getattr(method, name).state_dict(), getattr(distilled, name).state_dict())


def test_removed_columns_never_reach_the_teacher():
    data = toy_data()
    method = fit(build("mfh", data, settings=SHORT), data, epochs=3).eval()
    batch = batches(data)[0]
    names = [column.name for column in data.table_columns if method.kept[column.start : column.stop].all()]
    assert len(names) == 2  # three quarters of five columns are removed, rounded down
    assert method.kept.sum() == sum(column.stop - column.start for column in data.table_columns if column.name in names)
    noise = torch.randn_like(batch["table"])
    removed = batch | {"table": torch.where(method.kept, batch["table"], noise)}
    kept = batch | {"table": torch.where(method.kept, noise, batch["table"])}
    assert torch.equal(method.teach(removed), method.teach(batch))
    assert not torch.equal(method.teach(kept), method.teach(batch))
    # Nor did they in its training: without decay, their weights are those of the start.
    method = fit(build("mfh", settings=SHORT, weight_decay=0), epochs=3)
    start, weight = build("mfh").encoders["table"].layers[0].weight, method.encoders["table"].layers[0].weight
    assert ((start == weight).all(dim=0) == ~method.kept).all()


def test_the_student_is_fresh_and_learns_without_labels():
    method = fit(build(Halfway, settings=SHORT))
    start = {name: tensor for name, tensor in build("mfh").state_dict().items() if name.startswith("head.")}
    assert start
    assert all(torch.equal(method.before[name], start[name]) for name in start)
    assert equal_states(
        {name: method.before[f"encoders.image.{name}"] for name in method.encoders["image"].state_dict()},
        build("mfh").encoders["image"].state_dict(),
    )
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, method.before[name])}
    assert {name.split(".")[0] for name in moved} == {"encoders", "head"}
    assert not any(name.startswith("encoders.table") for name in moved)

    unlabelled = build(Halfway, settings=SHORT)
    unlabelled.labels_for_the_student = False
    assert equal_states(fit(unlabelled).state_dict(), method.state_dict())


def test_stage_pair_is_a_plain_loop_on_two_cross_entropies_and_the_distance_of_the_logits():
    method = build("mfh", weight_decay=0.1)
    pair = copy.deepcopy(method.pair)
    fit(method, epochs=1)

    optimizer = torch.optim.AdamW(pair.parameters(), lr=3e-3, weight_decay=0.1)
    for batch in batches():
        image, table = pair["image"](batch["image"]), pair["table"](batch["table"])
        loss = F.cross_entropy(image, batch["target"]) + F.cross_entropy(table, batch["target"])
        (loss + (image - table).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in pair.state_dict().items():
        torch.testing.assert_close(method.pair.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 1000])
def test_few_or_all_rows_rank_the_columns(rows):
    method = build("mfh", settings={"rows": rows})
    method.choose_columns(batches())
    assert method.saliency.min() == 0
    assert method.saliency.max() == 1


@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_a_table_may_have_columns_of_one_kind_alone(kind):
    data = TabularImageData(replace(samples(), **{kind: []}), batch_size=16, workers=0)
    method = fit(build("mfh", data, settings=SHORT | {"removed": 0.5}), data)
    assert 0 < method.kept.sum() < data.table_width


def test_one_column_is_always_kept():
    data = TabularImageData(replace(samples(), numeric=["size"], categorical=[]), batch_size=16, workers=0)
    assert fit(build("mfh", data, settings=SHORT | {"removed": 0.99}), data).kept.all()
