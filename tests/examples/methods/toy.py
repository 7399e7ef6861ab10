"""A small real data set and the ways to train a method on it."""

from __future__ import annotations

import lightning as L
import numpy as np
import pandas as pd
import torch
from tabular_image.data import Samples, TabularImageData
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


def toy_data(rows=72, batch_size=16):
    """50 training, 7 validation and 14 test rows; 8 encoded columns."""
    return TabularImageData(samples(rows), batch_size=batch_size, workers=0)


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
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs or method.total_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(method, datamodule=data or toy_data())
    return method


def equal_states(first, second):
    """Whether two dicts of tensors are equal to the bit."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)
