"""Concatenation: one linear head on both modalities, and its slices."""

from __future__ import annotations

import copy

import lightning as L
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tabular_image import train
from toy import batches, build, equal_states, fit, toy_data


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


def measuring(measure=True, **options):
    return build("concatenation", settings={"measure_conflict": measure}, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_measuring_conflicts_leaves_the_training_unchanged_to_the_bit(optimizer):
    measured, plain = (fit(measuring(measure, optimizer=optimizer, epochs=2)) for measure in (True, False))
    assert equal_states(measured.state_dict(), plain.state_dict())
    assert len(measured.monitor.history()["step"]) == 2 * 2 * len(batches())
    assert plain.monitor is None


def test_conflicts_are_between_the_joint_loss_and_each_slice_on_its_encoder():
    method = measuring(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    plain = copy.deepcopy(method)
    history = fit(method).monitor.history()
    assert history["modality"] == ["image", "table"] * len(batches())
    assert history["guide"] == ["image alone", "table alone"] * len(batches())
    assert not any(history["intervened"])
    plain.train()
    rows = iter(zip(history["cosine_before"], history["gradient_norm"], history["guide_norm"], strict=True))
    for batch in batches():
        buffers = copy.deepcopy(dict(plain.named_buffers()))
        gradients = {}
        for name in ("image", "table", "fused"):
            plain.zero_grad()
            plain.load_state_dict(buffers, strict=False)  # of batch normalisation, which each forward pass moves
            F.cross_entropy(plain(batch)[name], batch["target"]).backward()
            for modality, encoder in plain.encoders.items():
                grads = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
                gradients[name, modality] = torch.cat([grad.flatten().double() for grad in grads]) if grads else None
        for modality in ("image", "table"):
            joint, own = gradients["fused", modality], gradients[modality, modality]
            expected = F.cosine_similarity(joint, own, dim=0).item(), joint.norm().item(), own.norm().item()
            assert next(rows) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        torch.optim.SGD(plain.parameters(), lr=3e-3).step()


def test_a_resumed_measurement_is_an_uninterrupted_one(tmp_path):
    def train(epochs, start=None, measure=True):
        method = measuring(measure, epochs=2)
        quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
        trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, **quiet)
        trainer.fit(method, datamodule=toy_data(), ckpt_path=start)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return method

    train(1)
    assert train(2, tmp_path / "1.ckpt").monitor.history() == train(2).monitor.history()
    train(1, measure=False)
    assert "monitor" not in torch.load(tmp_path / "1.ckpt", weights_only=True)


def test_a_measured_run_reports_its_conflicts(tmp_path):
    options = {"method": "concatenation", "concatenation.measure_conflict": "true", "epochs": 1, "threads": 1}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert train.main([*words, "--out", str(tmp_path)]) == 0
    conflicts = pd.read_csv(tmp_path / "conflict.csv")
    assert set(conflicts["guide"]) == {"image alone", "table alone"}
    assert conflicts["cosine_before"].between(-1, 1).all()
    assert (tmp_path / "conflict.png").stat().st_size > 0
