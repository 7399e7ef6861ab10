"""A small real data set and the ways to train a method on it."""

from __future__ import annotations

import copy
from dataclasses import replace

import lightning as L
import numpy as np
import pandas as pd
import torch
from tabular_image.data import Samples
from tabular_image.data.module import TabularImageData
from tabular_image.methods import METHODS
from tabular_image.options import Options

CLASSES = 3


def samples(rows=72):
    """Three classes, told apart by brightness and by two numbers; two categories that say little."""
    generator = np.random.default_rng(0)
    kinds = np.arange(rows) % CLASSES
    table = pd.DataFrame(
        {
            "size": generator.normal(kinds, 1.0),
            "age": generator.normal(0, 1, rows),
            "weight": generator.normal(-kinds, 1.0),
            "colour": generator.choice(["red", "green", "blue"], rows),
            "smoker": generator.choice(["yes", "no"], rows),
        }
    )
    return Samples(
        name="toy",
        images=np.clip(generator.normal(80 * kinds[:, None, None] + 40, 40, (rows, 8, 8)), 0, 255).astype(np.uint8),
        table=table,
        numeric=["size", "age", "weight"],
        categorical=["colour", "smoker"],
        target=pd.Series(np.array(["ant", "bee", "cat"])[kinds]),
        ids=pd.Series(range(rows), name="id"),
        grey=True,
        image_size=8,
    )


def toy_data(rows=72, batch_size=16, task="classification"):
    """50 training, 7 validation and 14 test rows; 8 encoded columns."""
    return TabularImageData(samples_of(task, rows), batch_size=batch_size, workers=0)


def samples_of(task, rows=72):
    """The same rows; their kind is a class, one of three labels, or a noisy number."""
    plain = samples(rows)
    kinds = np.arange(rows) % CLASSES
    targets = {
        "classification": plain.target,
        "multilabel": pd.DataFrame({"big": kinds == 2, "small": kinds == 0, "striped": np.arange(rows) % 5 < 2}),
        "regression": pd.Series(10.0 * kinds + np.random.default_rng(1).normal(0, 1, rows), name="price"),
    }
    return replace(plain, target=targets[task], task=task)


def batches(data=None):
    """All training batches of the first epoch."""
    return list((data or toy_data()).train_dataloader())


def build(name_or_class, data=None, settings=None, **options):
    """A method from seed 0, for one epoch by default; `settings` are its own options by name."""
    torch.manual_seed(0)
    method = METHODS.get(name_or_class, name_or_class)
    made = Options(**({"epochs": 1} | options), settings=method.Settings(**(settings or {})))
    return method(data or toy_data(), made)


def fit(method, data=None, epochs=None):
    """Train all stages, or so many epochs."""
    trainer_of(epochs or method.total_epochs).fit(method, datamodule=data or toy_data())
    return method


def trainer_of(epochs):
    """A Trainer that leaves no files and prints nothing."""
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def assert_resumes(build_method, stop, folder):
    """A training that is stopped after `stop` epochs, and resumed, ends as an uninterrupted one, to the bit."""

    def train(epochs, start=None):
        method, trainer = build_method(), trainer_of(epochs)
        trainer.fit(method, datamodule=toy_data(), ckpt_path=start)
        trainer.save_checkpoint(folder / f"{epochs}.ckpt")
        return method.state_dict()

    train(stop)
    epochs = build_method().total_epochs
    assert equal_states(train(epochs, folder / f"{stop}.ckpt"), train(epochs))


class Noting:
    """Notes every encoder's weights, buffers and optimizer state after each step; for a method, mixed in first."""

    def build_optimizer(self, modules):
        self.notes = [self.note()]
        optimizer = super().build_optimizer(modules)
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


def equal_states(first, second):
    """Whether two dicts of tensors are equal to the bit."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)
