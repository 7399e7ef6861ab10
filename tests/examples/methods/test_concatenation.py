"""Concatenation: one linear head on both modalities, and its slices."""

from __future__ import annotations

import torch
from toy import batches, build, fit


def test_slices_of_the_concatenation_add_up():
    method = fit(build("concatenation")).eval()
    batch = batches()[0]
    logits = method(batch)
    assert torch.equal(logits["fused"], logits["image"] + logits["table"])
    features = torch.cat([method.encoders[name](batch[name]) for name in ("image", "table")], dim=1)
    torch.testing.assert_close(logits["fused"], method.head(features))
    changed = method(batch | {"table": batch["table"] + 1})
    assert torch.equal(changed["image"], logits["image"])
    assert not torch.equal(changed["table"], logits["table"])
