"""LFM: the matching loss, the curve of its weight, and their sum."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tabular_image.methods.lfm import curve, matching
from toy import batches, build, fit, toy_data

from gaal_surgery import fuse_logits


@st.composite
def predictions(draw):
    """Two logits (B, C), confident ones included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    return [
        draw(st.sampled_from([0.0, 1.0, 10.0, 500.0]))
        * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]


@given(predictions())
def test_matching_is_0_for_equal_predictions_and_positive_for_others(logits):
    image, table = logits
    loss = matching(image, table)
    assert loss.isfinite()
    torch.testing.assert_close(loss, matching(table, image))
    shifted = image + torch.arange(len(image))[:, None]  # the same prediction
    assert abs(matching(image, shifted)) < 1e-12
    distance = (image.softmax(1) - table.softmax(1)).abs().sum(1) / 2
    assert loss >= distance.square().mean() / 2 - 1e-12  # Pinsker's inequality


def test_matching_is_the_reverse_of_jensen_shannon():
    image, table = torch.randn(4, 3), torch.randn(4, 3)
    p, q = image.softmax(1), table.softmax(1)
    middle = (p + q) / 2
    expected = sum((middle * (middle / values).log()).sum(1).mean() for values in (p, q)) / 2
    torch.testing.assert_close(matching(image, table), expected)
    jensen_shannon = sum((values * (values / middle).log()).sum(1).mean() for values in (p, q)) / 2
    assert matching(image, table) > 1.01 * jensen_shannon


def test_matching_has_finite_gradients_where_predictions_exclude_each_other():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]]).requires_grad_()
    matching(logits[:1], logits[1:]).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0.1


@pytest.mark.parametrize(
    ("epoch", "alpha"), [(0, 0.205), (50, 0.437), (100, 0.539), (150, 0.821), (199, 0.916), (180, 0.95)]
)
def test_the_curve_is_the_authors_at_any_length(epoch, alpha):
    assert curve(epoch, 200) == pytest.approx(alpha, abs=5e-4)
    assert curve(epoch * 3, 600) == curve(epoch, 200)
    assert type(curve(epoch, 200)) is float


@given(st.integers(1, 500), st.data())
def test_both_losses_always_have_a_weight(epochs, data):
    assert 0.05 <= curve(data.draw(st.integers(0, epochs - 1)), epochs) <= 0.95


@pytest.mark.parametrize("alpha", [1.0, 0.0, None])
def test_training_descends_the_weighted_sum(alpha):
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "none", "learning_rate": 0.1}
    method = build("lfm", settings={"alpha": alpha}, epochs=2, **settings)
    plain = copy.deepcopy(method).train()
    fit(method)
    optimizer = torch.optim.SGD([*plain.encoders.parameters(), *plain.heads.parameters()], lr=0.1)
    loader = toy_data().train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            logits = plain(batch)
            classification = F.cross_entropy(fuse_logits(logits), batch["target"])
            match = matching(logits["image"], logits["table"])
            if alpha == 1:
                loss = 2 * classification
            elif alpha == 0:
                loss = 2 * match
            else:
                loss = 2 * (curve(epoch, 2) * classification + (1 - curve(epoch, 2)) * match)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name in ("encoders", "heads"):
        torch.testing.assert_close(getattr(method, name).state_dict(), getattr(plain, name).state_dict())


def test_its_fused_prediction_is_the_mean_unless_another_fusion_is_asked_for():
    for fusion in ("mean", "product"):
        method = build("lfm", fusion=fusion).eval()
        logits = method(batches()[0])
        assert list(logits) == ["image", "table"]
        assert torch.equal(method.predictions(logits)["fused"], method.fusions(logits)[fusion])
