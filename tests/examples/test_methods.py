from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from tabular_image.methods import METHODS
from tabular_image.methods.gaal import GAAL
from tabular_image.options import Options
from torch.utils.data import DataLoader

from gaal_surgery import fuse_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),  # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

CLASSES = 3
DATA = SimpleNamespace(channels=1, table_width=5, class_counts=torch.tensor([10, 20, 30]))


def batches(count=3, rows=8):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(rows, 1, 8, 8, generator=generator),
            "table": torch.randn(rows, 5, generator=generator),
            "target": torch.randint(CLASSES, (rows,), generator=generator),
            "row": torch.arange(rows),
        }
        for _ in range(count)
    ]


def build(name_or_class, **options):
    torch.manual_seed(0)
    method = METHODS.get(name_or_class, name_or_class)
    return method(DATA, Options(**options))


def fit(method, epochs=1):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(method, DataLoader(batches(), batch_size=None), DataLoader(batches(1), batch_size=None))
    return method


def equal_states(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


class Watched(GAAL):
    """Notes every encoder's weights, buffers and optimizer state after each step."""

    def build_optimizer(self):
        self.notes = [self.note()]
        optimizer = super().build_optimizer()
        optimizer.register_step_post_hook(lambda optimizer, *_: self.notes.append(self.note(optimizer)))
        return optimizer

    def note(self, optimizer=None):
        notes = {}
        for modality, encoder in self.encoders.items():
            tensors = dict(encoder.state_dict())
            for name, parameter in encoder.named_parameters():
                state = optimizer.state.get(parameter, {}) if optimizer else {}
                tensors |= {f"{name}.{key}": value for key, value in state.items() if torch.is_tensor(value)}
            notes[modality] = copy.deepcopy(tensors)
        return notes


@pytest.mark.parametrize("guidance", ["fresh", "cached"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_turn_leaves_the_idle_encoder_and_its_optimizer_state_bit_identical(guidance, optimizer):
    method = fit(build(Watched, guidance=guidance, optimizer=optimizer, weight_decay=0.1))
    assert len(method.notes) == 1 + 2 * len(batches())
    for position, (before, after) in enumerate(zip(method.notes, method.notes[1:], strict=False)):
        active, idle = ("image", "table") if position % 2 == 0 else ("table", "image")
        assert equal_states(before[idle], after[idle])
        common = before[active].keys() & after[active].keys()
        assert not any(torch.equal(before[active][name], after[active][name]) for name in common if "weight" in name)


@pytest.mark.parametrize("align", ["gradient", "update"])
@pytest.mark.parametrize("guidance", ["fresh", "cached"])
def test_alternating_is_a_plain_loop_of_turns(guidance, align):
    settings = {"optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.1}
    method = build("alternating", guidance=guidance, align=align, **settings)
    plain = copy.deepcopy(method)
    fit(method)

    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=0.1)
    plain.train()
    for batch in batches():
        for modality in ("image", "table"):
            logits = plain.head(plain.encoders[modality](batch[modality]))
            F.cross_entropy(logits, batch["target"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("encoders", "head"):
        assert equal_states(getattr(method, name).state_dict(), getattr(plain, name).state_dict())


def test_alternating_observes_and_gaal_intervenes():
    observed = fit(build("alternating", rule="orthogonal")).monitor.history()
    steered = fit(build("gaal", rule="orthogonal")).monitor.history()
    assert len(observed["step"]) == len(steered["step"]) == 2 * len(batches())
    assert not any(observed["intervened"])
    assert all(steered["intervened"])
    assert observed["cosine_before"][0] == steered["cosine_before"][0] != 0
    assert steered["cosine_after"][0] == pytest.approx(0, abs=1e-6)


def test_fresh_guides_are_features_of_a_training_step():
    method = build("gaal")
    batch = batches(1)[0]
    before = copy.deepcopy(method.encoders.state_dict())
    features = method.idle_features("image", batch)
    assert equal_states(before, method.encoders.state_dict())
    assert not features.requires_grad
    assert torch.equal(features, method.encoders["image"](batch["image"]))


def test_slices_of_the_concatenation_add_up():
    method = fit(build("concatenation")).eval()
    batch = batches(1)[0]
    logits = method(batch)
    assert torch.equal(logits["fused"], logits["image"] + logits["table"])
    features = torch.cat([method.encoders[name](batch[name]) for name in ("image", "table")], dim=1)
    torch.testing.assert_close(logits["fused"], method.head(features))
    changed = method(batch | {"table": batch["table"] + 1})
    assert torch.equal(changed["image"], logits["image"])
    assert not torch.equal(changed["table"], logits["table"])


def test_predictions_put_the_selecting_one_first():
    logits = {name: torch.randn(4, CLASSES) for name in ("table", "image")}
    mean = build("gaal").predictions(logits)
    assert list(mean) == ["fused", "image", "table"]
    assert torch.equal(mean["fused"], fuse_logits(logits))
    prior = (DATA.class_counts / DATA.class_counts.sum()).log()
    product = build("gaal", fusion="product").predictions(logits)["fused"]
    torch.testing.assert_close(product, fuse_logits(logits, log_prior=prior))
    own = {"fused": torch.randn(4, CLASSES), **logits}
    assert build("concatenation", fusion="product").predictions(own)["fused"] is own["fused"]
    assert set(build("concatenation").fusions(own)) == {"mean", "product", "calibrated"}
    assert list(build("image").predictions({"image": logits["image"]})) == ["image"]
    assert build("image").fusions({"image": logits["image"]}) == {}


def test_validation_fits_the_calibrated_fusion():
    method = fit(build("gaal"))
    assert method.calibrated.bias.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in method.calibrated.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_starts_all_encoders_alike(name):
    method, reference = build(name), build("gaal")
    for modality, encoder in method.encoders.items():
        assert equal_states(encoder.state_dict(), reference.encoders[modality].state_dict())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("schedule", "rate"), [("none", 1.0), ("step", 0.01), ("cosine", 0.5)])
def test_schedules_step_once_an_epoch(name, schedule, rate):
    method = fit(build(name, schedule=schedule, step_size=1, epochs=4, learning_rate=1e-3), epochs=2)
    assert method.optimizers().param_groups[0]["lr"] == pytest.approx(1e-3 * rate)
