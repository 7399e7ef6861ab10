"""MMCL and what pretraining on pairs shares: contrast, corruption, views, and the stages."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tabular_image.methods.contrastive import Corruption, contrastive_loss, random_views, similarities
from toy import build, equal_states, fit, toy_data


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
def test_constant_similarities_cost_the_logarithm_of_the_rows(rows, weight):
    assert contrastive_loss(torch.full((rows, rows), 3.0), weight).item() == pytest.approx(math.log(rows), abs=1e-6)


def test_the_contrast_is_infonce_with_the_pair_in_the_denominator():
    torch.manual_seed(0)
    image, table = torch.randn(5, 6, dtype=torch.double), torch.randn(5, 6, dtype=torch.double)
    expected = 0.0
    for i in range(5):
        cosines = [torch.cosine_similarity(image[i], table[j], dim=0) / 0.1 for j in range(5)]
        others = [torch.cosine_similarity(image[j], table[i], dim=0) / 0.1 for j in range(5)]
        expected += 0.8 * -math.log(math.exp(cosines[i]) / sum(map(math.exp, cosines))) / 5
        expected += 0.2 * -math.log(math.exp(others[i]) / sum(map(math.exp, others))) / 5
    assert contrastive_loss(similarities(image, table, 0.1), 0.8).item() == pytest.approx(expected)


def test_a_joint_permutation_leaves_the_contrast_and_a_lone_one_does_not():
    torch.manual_seed(0)
    image, table = torch.randn(8, 6, dtype=torch.double), torch.randn(8, 6, dtype=torch.double)
    order = torch.randperm(8)
    loss = contrastive_loss(similarities(image, table, 0.1), 0.7)
    torch.testing.assert_close(contrastive_loss(similarities(image[order], table[order], 0.1), 0.7), loss)
    assert not torch.isclose(contrastive_loss(similarities(image[order], table, 0.1), 0.7), loss)


def test_rows_of_zeros_have_a_finite_contrast_and_gradient():
    image = torch.zeros(4, 6, requires_grad=True)
    loss = contrastive_loss(similarities(image, torch.randn(4, 6), 0.1))
    loss.backward()
    assert loss.isfinite()
    assert image.grad.isfinite().all()


def cells(table, columns):
    """The rows cut into their raw cells, each a tuple of numbers."""
    return [[tuple(row[column.start : column.stop].tolist()) for column in columns] for row in table]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_corruption_changes_few_cells_and_to_values_of_their_own_column(share):
    data = toy_data()
    torch.manual_seed(0)
    table = data.train_table[:32]
    corrupted = Corruption(data.train_table, data.table_columns, share)(table)
    known = [set(column) for column in zip(*cells(data.train_table, data.table_columns), strict=True)]
    changed = []
    for before, after in zip(cells(table, data.table_columns), cells(corrupted, data.table_columns), strict=True):
        assert all(cell in values for cell, values in zip(after, known, strict=True))
        changed.append(sum(old != new for old, new in zip(before, after, strict=True)))
    most = math.floor(share * len(data.table_columns))
    assert max(changed) <= most
    assert (max(changed) > 0) == (most > 0)


def test_corruption_draws_each_cell_from_a_row_of_its_own():
    data = toy_data()
    rows = torch.arange(10.0)[:, None].expand(10, data.table_width).contiguous()  # cells tell the row they are from
    torch.manual_seed(0)
    corrupted = Corruption(rows, data.table_columns, 1.0)(rows)
    starts = [column.start for column in data.table_columns]
    for column in data.table_columns:  # a block comes whole
        assert (corrupted[:, column.start : column.stop] == corrupted[:, [column.start]]).all()
    assert (corrupted[:, starts] != corrupted[:, starts[:1]]).any()


def test_a_view_is_drawn_for_each_image_and_shows_part_of_it():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 16, 16).expand(64, 1, 16, 16)
    views = random_views(images, 0.1)
    assert views.shape == images.shape
    assert len({tuple(view.flatten().tolist()) for view in views}) > 50
    assert views.min() >= images.min()
    assert views.max() <= images.max()
    assert torch.equal(random_views(images, 0.1, share=0.0), images)


def test_grey_images_are_never_mirrored_and_colour_ones_are():
    ramp = torch.linspace(0, 1, 16).expand(16, 16)
    grey, colour = ramp.expand(64, 1, 16, 16), ramp.expand(64, 3, 16, 16)
    for images, mirrored in ((grey, False), (colour, True)):
        views = random_views(images, 0.5)
        falls = views[:, 0, 8, 0] > views[:, 0, 8, -1]
        assert falls.any() == mirrored
        assert not falls.all()


def test_pretraining_trains_both_encoders_and_leaves_the_classifier():
    method = build("mmcl", settings={"pretraining_epochs": 1}, weight_decay=0.1)
    before = copy.deepcopy(method)
    fit(method, epochs=1)
    for name in ("image", "table"):
        for part in ("encoders", "projections"):
            trained, untrained = getattr(method, part)[name], getattr(before, part)[name]
            assert not equal_states(trained.state_dict(), untrained.state_dict())
    assert equal_states(method.head.state_dict(), before.head.state_dict())


@pytest.mark.parametrize("encoder", ["frozen", "trainable"])
def test_the_image_encoder_learns_from_labels_only_when_it_is_trainable(encoder):
    settings = {"pretraining_epochs": 1, "encoder": encoder}
    pretrained = fit(build("mmcl", settings=settings, weight_decay=0.1), epochs=1)
    method = fit(build("mmcl", settings=settings, weight_decay=0.1))
    unchanged = equal_states(method.encoders["image"].state_dict(), pretrained.encoders["image"].state_dict())
    assert unchanged == (encoder == "frozen")
    for part in (method.encoders["table"], method.projections):
        other = pretrained.encoders["table"] if part is method.encoders["table"] else pretrained.projections
        assert equal_states(part.state_dict(), other.state_dict())
    assert not equal_states(method.head.state_dict(), pretrained.head.state_dict())


def test_the_training_table_stays_out_of_the_weights():
    assert not any("corruption" in name for name in build("mmcl").state_dict())
