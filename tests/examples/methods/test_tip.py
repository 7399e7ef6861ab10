"""TIP: the table's tokens, the three losses, and the stages."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tabular_image.data.module import TabularImageData
from tabular_image.errors import InputError
from tabular_image.methods.tip import hard_negatives, random_mask
from toy import batches, build, equal_states, fit, samples, toy_data

TOKENS = {"width": 8, "heads": 2, "blocks": 2, "pretraining_epochs": 1}


def data_of(**changes):
    """The toy data with other columns or sizes."""
    return TabularImageData(replace(samples(), **changes), batch_size=16, workers=0)


NO_NUMBERS, NO_CATEGORIES = {"numeric": []}, {"categorical": []}


def test_cells_are_categories_in_one_vocabulary_and_then_numbers():
    data = toy_data()
    encoder = build("tip", settings=TOKENS).table_encoder
    ids, numbers = encoder.cells(data.train_table)
    colour, smoker = (column for column in data.table_columns if column.categorical)
    assert encoder.vocabulary == (3 + 1) + (2 + 1)
    assert torch.equal(ids[:, 0], 1 + data.train_table[:, colour.start : colour.stop].argmax(1))
    assert torch.equal(ids[:, 1], 4 + 1 + data.train_table[:, smoker.start : smoker.stop].argmax(1))
    assert torch.equal(numbers, data.train_table[:, :3])
    unknown, _ = encoder.cells(torch.zeros(1, data.table_width))
    assert unknown.tolist() == [[0, 4]]


def test_a_hidden_cell_never_affects_any_output():
    method = build("tip", settings=TOKENS)
    batch, encoder = batches()[0], method.table_encoder
    image = method.tokens(method.encoders["image"].maps(batch["image"]))
    columns = toy_data().table_columns
    order = [column for column in columns if column.categorical] + [c for c in columns if not c.categorical]
    for place, column in enumerate(order):
        masked = torch.zeros(16, len(order), dtype=torch.bool)
        masked[:, place] = True
        changed = batch["table"].clone()
        changed[:, column.start : column.stop] = changed[:, column.start : column.stop].roll(1, 1) + 1
        outputs = [method.multimodal(encoder(table, masked), image) for table in (batch["table"], changed)]
        assert torch.equal(*outputs)
        seen = [method.multimodal(encoder(table), image) for table in (batch["table"], changed)]
        assert not torch.equal(*seen)


def test_no_other_token_attends_to_a_hidden_cell():
    encoder = build("tip", settings=TOKENS).table_encoder
    table = batches()[0]["table"]
    masked = random_mask(16, encoder.count, 0.5, table.device)
    before = encoder(table, masked)
    with torch.no_grad():
        encoder.special.weight[1] += torch.randn(8)
    moved = (encoder(table, masked) != before).any(2)
    assert torch.equal(moved, F.pad(masked, (1, 0)))


@pytest.mark.parametrize(("cells", "share", "count"), [(17, 0.5, 8), (5, 0.5, 2), (1, 0.5, 1), (4, 1.0, 4)])
def test_each_row_hides_its_own_half_of_the_cells(cells, share, count):
    torch.manual_seed(0)
    masked = random_mask(50, cells, share, torch.device("cpu"))
    assert (masked.sum(1) == count).all()
    assert len(masked.unique(dim=0)) == 1 if count == cells else len(masked.unique(dim=0)) > 1


@pytest.mark.parametrize("kinds", [{}, NO_NUMBERS, NO_CATEGORIES, {"numeric": ["age"], "categorical": []}])
def test_all_losses_are_finite_and_train_with_any_kinds_of_columns(kinds):
    data = data_of(**kinds)
    method = build("tip", data, settings=TOKENS)
    losses = method.pretraining_losses(batches(data)[0])
    assert list(losses) == ["contrast", "matching", "reconstruction"]
    assert all(loss.isfinite() for loss in losses.values())
    fit(method, data)
    assert all(parameter.isfinite().all() for parameter in method.parameters())
    assert method.eval()(batches(data)[0])["fused"].isfinite().all()


@pytest.mark.parametrize("kinds", [NO_NUMBERS, NO_CATEGORIES])
def test_the_reconstruction_of_one_kind_of_columns_is_its_mean_error(kinds):
    data = data_of(**kinds)
    method = build("tip", data, settings=TOKENS | {"masked": 1.0})
    torch.nn.init.zeros_(method.category.weight)
    torch.nn.init.zeros_(method.category.bias)
    torch.nn.init.zeros_(method.number.weight)
    torch.nn.init.zeros_(method.number.bias)
    table = batches(data)[0]["table"]
    loss = method.reconstruction_loss(torch.randn(16, 1, 8), table)
    uniform = torch.tensor(float(method.table_encoder.vocabulary)).log()
    expected = uniform if kinds is NO_NUMBERS else table.square().mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("rows", [2, 5])
def test_hard_negatives_are_never_the_pair_and_mostly_the_most_similar(rows):
    torch.manual_seed(0)
    similarity = 10 * torch.eye(rows)
    similarity[:, 0] += 5
    drawn = torch.stack([hard_negatives(similarity) for _ in range(200)])
    assert (drawn != torch.arange(rows)).all()
    assert (drawn[:, 1:] == 0).float().mean() > 0.8


def test_matching_tells_pairs_from_negatives_of_both_sides():
    method = build("tip", settings=TOKENS)
    seen = []
    method.matching.register_forward_hook(lambda module, inputs, output: seen.append(output))
    image, table = torch.randn(6, 1, 8), torch.randn(6, 6, 8)
    loss = method.matching_loss(image, table, torch.zeros(6, 6))
    (logits,) = seen
    assert logits.shape == (3 * 6, 2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([1] * 6 + [0] * 12)))
    pairs = method.matching(method.multimodal(table, image)[:, 0])
    torch.testing.assert_close(logits[:6], pairs)
    assert method.matching_loss(image[:1], table[:1], torch.zeros(1, 1)).isfinite()


@pytest.mark.parametrize("encoder", ["frozen", "trainable"])
def test_the_pretrained_network_learns_from_labels_only_when_it_is_trainable(encoder):
    settings = TOKENS | {"encoder": encoder}
    pretrained = fit(build("tip", settings=settings, weight_decay=0.1), epochs=1)
    method = fit(build("tip", settings=settings, weight_decay=0.1))
    for name in ("encoders", "table_encoder", "image_tokens", "multimodal"):
        unchanged = equal_states(getattr(method, name).state_dict(), getattr(pretrained, name).state_dict())
        assert unchanged == (encoder == "frozen")
    for name in ("image_projection", "table_projection", "matching", "category", "number"):
        assert equal_states(getattr(method, name).state_dict(), getattr(pretrained, name).state_dict())
    assert not equal_states(method.head.state_dict(), pretrained.head.state_dict())


def test_pretraining_trains_everything_but_the_classifier():
    data = data_of(image_size=32)  # four image tokens: attention to a single one has no gradient
    method = build("tip", data, settings=TOKENS, weight_decay=0.0)
    before = copy.deepcopy(method)
    fit(method, data, epochs=1)
    still = {
        name
        for (name, after), (_, old) in zip(method.named_parameters(), before.named_parameters(), strict=True)
        if torch.equal(after, old)
    }
    assert {name.split(".")[0] for name in still} == {"head", "calibrated", "alone"}


def test_its_size_is_comparable_with_that_of_the_other_methods():
    method = build("tip")
    assert method.settings.width >= method.width // 2  # features of every other encoder
    assert method.settings.heads == 8


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="multiple"):
        build("tip", settings={"width": 9, "heads": 2})
