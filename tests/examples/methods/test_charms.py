"""CHARMS: channels are paired with columns by optimal transport, and learn to predict them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tabular_image.data.module import TabularImageData
from tabular_image.methods.charms import CHARMS, pair_channels, pairing_epochs, similarity_cost, transport_plan
from tabular_image.methods.unimodal import Unimodal
from torch import nn
from toy import batches, build, equal_states, fit, samples, toy_data

ALONE = {"table_weight": 0, "numeric_weight": 0, "categorical_weight": 0}


class TwoLayers(Unimodal):
    """The image baseline with the head of CHARMS."""

    modalities = ("image",)

    def __init__(self, data, options):
        super().__init__(data, options)
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Linear(self.width, self.width // 2), nn.Linear(self.width // 2, self.outputs))


class Watched(CHARMS):
    """Notes the channels of each epoch."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.notes = []

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.notes.append(self.channels.clone())


def one_kind(kind):
    """The toy data without the columns of a kind."""
    return TabularImageData(replace(samples(), **{kind: []}), batch_size=16, workers=0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_the_losses_of_the_table_it_is_the_image_baseline_step_for_step(optimizer):
    method = build("charms", settings=ALONE | {"pairings": 2}, optimizer=optimizer, epochs=3)
    baseline = build(TwoLayers, optimizer=optimizer, epochs=3)
    baseline.head.load_state_dict(method.head.state_dict())
    fit(method)
    fit(baseline)
    assert not method.channels.all()
    for name in ("encoders", "head"):
        assert equal_states(getattr(method, name).state_dict(), getattr(baseline, name).state_dict())


def test_the_table_model_sends_no_gradient_to_the_image_and_the_attributes_do():
    def encoder(**weights):
        return fit(build("charms", settings=ALONE | weights, epochs=2)).encoders.state_dict()

    alone = encoder()
    assert equal_states(encoder(table_weight=0.6), alone)
    assert not equal_states(encoder(numeric_weight=0.03), alone)
    assert not equal_states(encoder(categorical_weight=0.03), alone)


def test_a_step_is_that_of_the_four_losses():
    method = build("charms", optimizer="sgd", learning_rate=0.1, momentum=0, weight_decay=0)
    with torch.no_grad():
        method.channels.copy_(torch.rand(method.channels.shape) < 0.5)
    method.table_model.eval()  # dropout off
    plain = copy.deepcopy(method)
    batch = batches()[0]
    table = batch["table"]
    features = plain.encoders["image"](batch["image"])
    heads = [column.stop - column.start for column in toy_data().table_columns]
    assert heads == [1, 1, 1, 3, 2]
    errors, start = [], 0
    for position, width in enumerate(heads):
        weight, bias = (tensor[start : start + width] for tensor in plain.attribute_heads.parameters())
        predicted, values = (features * plain.channels[position]) @ weight.T + bias, table[:, start : start + width]
        start += width
        errors.append(
            (predicted - values).square().mean() if width == 1 else F.cross_entropy(predicted, values.argmax(1))
        )
    codes = torch.stack([table[:, 3:6].argmax(1), table[:, 6:].argmax(1)], dim=1)
    loss = (
        F.cross_entropy(plain.head(features), batch["target"])
        + 0.6 * F.cross_entropy(plain.table_model(table[:, :3], codes), batch["target"])
        + 0.03 * sum(errors[:3]) / 3
        + 0.03 * sum(errors[3:]) / 2
    )
    loss.backward()

    losses = method.losses(batch)
    assert list(losses) == ["image", "table", "numeric", "categorical"]
    method.total(losses).backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(dict(method.named_parameters())[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@given(st.integers(2, 500), st.integers(1, 20))
def test_pairings_divide_a_training_and_none_of_two_epochs_has_none(epochs, pairings):
    places = sorted(pairing_epochs(epochs, pairings))
    assert 1 <= len(places) <= pairings
    assert 0 < places[0] <= places[-1] < epochs
    lengths = np.diff([0, *places, epochs])
    assert lengths.max() - lengths.min() <= 1 or len(places) < pairings
    if pairings < epochs:
        assert len(places) == pairings


def test_the_default_pairs_every_fifth_epoch_of_twenty_and_on_a_short_set_too():
    pairings = build("charms").settings.pairings
    assert pairing_epochs(20, pairings) == {5, 10, 15}  # as in the released code
    assert pairing_epochs(5, pairings) == {2, 3, 4}
    assert pairing_epochs(1, pairings) == set()


def test_channels_are_paired_at_their_epochs_and_start_free():
    notes = fit(build(Watched, settings={"pairings": 2}, epochs=5)).notes
    assert notes[0].all()
    assert notes[1].all()
    assert not notes[2].all()
    assert torch.equal(notes[2], notes[3])
    assert not torch.equal(notes[3], notes[4])
    for channels in notes[2:]:
        assert channels.any(dim=0).all()
        assert channels.any(dim=1).all()


def test_a_pairing_changes_nothing_but_the_channels():
    method = build("charms").train()
    method.eval()
    before = copy.deepcopy(method.state_dict())
    method.pair(batches())
    after = method.state_dict()
    assert not torch.equal(before.pop("channels"), after.pop("channels"))
    assert equal_states(before, after)


def test_a_training_that_has_diverged_pairs_nothing():
    method = build("charms").eval()
    with torch.no_grad():
        next(method.encoders.parameters()).fill_(torch.nan)
    method.pair(batches())
    assert method.channels.all()


@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (7, 3), (5, 5), (101, 40)])
def test_the_plan_has_uniform_marginals_and_pairs_everything(sizes):
    cost = np.random.default_rng(0).random(sizes)
    plan = transport_plan(cost)
    columns, groups = sizes
    np.testing.assert_allclose(plan.sum(1), 1 / columns)
    np.testing.assert_allclose(plan.sum(0), 1 / groups)
    paired = plan > 0.5 / plan.size
    assert paired.any(0).all()
    assert paired.any(1).all()
    np.testing.assert_allclose(plan[~paired], 0, atol=1e-12)


def test_similarity_cost_is_the_distance_of_normalised_gram_matrices():
    generator = np.random.default_rng(0)
    columns, groups = generator.normal(size=(3, 6, 2)), generator.normal(size=(4, 6, 5))
    groups[2] = 0  # channels that are dead
    cost = similarity_cost(columns, groups)
    for i, column in enumerate(columns):
        for j, group in enumerate(groups):
            first, second = (matrix / (np.linalg.norm(matrix) or 1) for matrix in (column, group))
            expected = ((first @ first.T - second @ second.T) ** 2).sum()
            assert cost[i, j] == pytest.approx(expected)
    assert similarity_cost(columns, columns).diagonal() == pytest.approx(0)


def test_a_channel_that_shows_a_column_is_paired_with_it():
    generator = np.random.default_rng(0)
    rows, columns, copies = 60, 4, 3
    values = generator.normal(size=(rows, columns))
    tokens = values[:, :, None] * generator.normal(size=(columns, 8))
    shown = np.tile(values, copies)  # channel c shows column c % columns
    maps = shown[:, :, None, None] + generator.normal(0, 0.1, (rows, columns * copies, 2, 2))
    paired = pair_channels(tokens, maps, clusters=columns)
    assert (paired == np.tile(np.eye(columns, dtype=bool), copies)).all()


def silence(blocks):
    """Make the blocks of a table model pass every token on."""
    for block in blocks:
        for layer in (block["attention"].W_out, block["ffn"].linear2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def test_tokens_are_those_of_the_columns_after_the_blocks():
    method = build("charms").double().eval()
    model, table = method.table_model, toy_data().train_table[:6].double()
    columns = method.columns(table)
    changed = table.clone()
    changed[:, 1] += 1
    with torch.no_grad():
        tokens, moved = method.tokens(table), method.tokens(changed)
        assert tokens.shape == (6, 5, 8)
        assert (moved != tokens).any(2).all()  # a block mixes all columns
        silence(model.backbone.blocks)
        embedded = [model.cont_embeddings(columns[0]), model.cat_embeddings(columns[1])]
        torch.testing.assert_close(method.tokens(table), torch.cat(embedded, dim=1))
        moved = (method.tokens(changed) != method.tokens(table)).any(2)
    assert moved.tolist() == [[False, True, False, False, False]] * 6


def test_every_column_attends_in_the_last_block():
    method = build("charms").double().eval()
    table = toy_data().train_table[:6].double()
    longer = copy.deepcopy(method.table_model)
    longer.backbone.blocks.append(copy.deepcopy(longer.backbone.blocks[-1]))
    silence(longer.backbone.blocks[2:])
    notes = []
    longer.backbone.blocks[1]["output"].register_forward_hook(lambda module, inputs, output: notes.append(output))
    logits = longer(*method.columns(table))
    torch.testing.assert_close(method.tokens(table), notes[0][:, 1:])
    torch.testing.assert_close(method.table_model(*method.columns(table)), logits)  # no hook is left


def test_a_method_pairs_the_channels_that_show_its_columns():
    data = one_kind("categorical")
    method = build("charms", data).eval()
    table = data.train_table
    shown = torch.arange(256) % 3
    maps = (table[:, shown] + 0.05 * torch.randn(len(table), 256))[:, :, None, None].expand(-1, -1, 2, 2)
    with torch.no_grad():
        method.table_model.cont_embeddings.bias.zero_()
        silence(method.table_model.backbone.blocks)
        paired = pair_channels(method.tokens(table).numpy(), maps.numpy(), clusters=3)
    assert (paired == (shown == torch.arange(3)[:, None]).numpy()).all()


def test_equal_and_dead_channels_make_fewer_groups():
    maps = np.zeros((10, 6, 1, 1))
    maps[:, 0, 0, 0] = np.arange(10)
    paired = pair_channels(np.random.default_rng(0).normal(size=(10, 3, 2)), maps, clusters=40)
    assert paired.any(0).all()
    assert paired.any(1).all()
    assert pair_channels(np.ones((10, 3, 2)), np.zeros((10, 6, 1, 1)), clusters=40).all()


@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_a_table_may_have_columns_of_one_kind_alone(kind):
    data = one_kind(kind)
    method = fit(build("charms", data, settings={"pairings": 1}, epochs=2), data)
    assert len(method.channels) == len(data.table_columns)
    assert not method.channels.all()


@pytest.mark.parametrize("rows", [2, 1000])
def test_few_or_all_rows_pair_the_channels(rows):
    method = build("charms", settings={"rows": rows}).eval()
    method.pair(batches())
    assert not method.channels.all()
