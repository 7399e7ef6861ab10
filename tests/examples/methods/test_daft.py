"""DAFT: what scale and shift do to the block, and where the block stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tabular_image.methods.daft import AffineBlock
from toy import CLASSES, batches, build, equal_states


@pytest.fixture
def block():
    """A block for 8 channels and 3 table columns in eval mode, its last affine layer silent but for the bias."""
    torch.manual_seed(0)
    block = AffineBlock(8, 3, reduction=7).eval()
    torch.nn.init.zeros_(block.affine[-1].weight)
    return block


def set_affine(block, scale, shift):
    with torch.no_grad():
        block.affine[-1].bias.copy_(torch.tensor([scale] * 8 + [shift] * 8))


def test_scale_one_and_shift_zero_are_the_plain_residual_block(block):
    set_affine(block, 1.0, 0.0)
    maps, table = torch.rand(2, 8, 3, 3), torch.randn(2, 3)
    assert torch.equal(block(maps, table), F.relu(maps + block.residual(maps)))


def test_scale_and_shift_are_those_of_each_channel(block):
    bias = torch.arange(16.0)
    with torch.no_grad():
        block.affine[-1].bias.copy_(bias)
    maps, table = torch.rand(2, 8, 3, 3), torch.randn(2, 3)
    transformed = torch.stack([maps[:, c] * c + 8 + c for c in range(8)], dim=1)
    torch.testing.assert_close(block(maps, table), F.relu(maps + block.residual(transformed)))


def test_at_scale_and_shift_zero_the_table_has_no_influence(block):
    set_affine(block, 0.0, 0.0)
    maps = torch.rand(2, 8, 3, 3)
    assert torch.equal(block(maps, torch.randn(2, 3)), block(maps, torch.randn(2, 3)))


def test_the_table_and_the_image_change_the_untrained_logits():
    method = build("daft").eval()
    batch = batches()[0]
    logits = method(batch)
    assert list(method.predictions(logits)) == ["fused"]
    for modality in ("image", "table"):
        assert not torch.equal(method(batch | {modality: batch[modality].flip(0)})["fused"], logits["fused"])


def test_the_hidden_layer_is_a_seventh_of_channels_and_columns_and_never_empty():
    assert AffineBlock(64, 8, reduction=7).affine[0].out_features == (64 + 8) // 7
    assert AffineBlock(8, 3, reduction=100).affine[0].out_features == 1


def test_nothing_is_built_for_the_table_before_the_block():
    assert list(build("daft").encoders) == ["image"]


def test_in_a_resnet_the_block_replaces_the_last_of_layer4():
    method, plain = build("daft", image_encoder="resnet18"), build("image", image_encoder="resnet18")
    layer4, whole = method.encoders["image"].maps.layer4, plain.encoders["image"].maps.layer4
    assert len(layer4) == len(whole) - 1
    assert equal_states(layer4.state_dict(), whole[:-1].state_dict())
    assert method.eval()(batches()[0])["fused"].shape == (16, CLASSES)
