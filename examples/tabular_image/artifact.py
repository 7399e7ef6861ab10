"""A trained model as one file: weights, and everything else that a prediction needs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gaal_surgery

from . import checkpoints
from .data.module import TabularImageData
from .data.tables import TableColumn, TableEncoder
from .data.targets import Target
from .errors import InputError, border
from .methods import METHODS, SETTINGS
from .methods.base import Method
from .options import Options

NAME = "model.pt"
FORMAT = 1  # to be raised when older files can no longer be read
PACKAGES = ("torch", "torchvision", "lightning", "numpy", "pandas", "scikit-learn")


@dataclass(frozen=True)
class Recipe:
    """How rows become the batches that a model was trained on. A recipe can take the data module's place for a method.

    Attributes:
        name: The name of the data set.
        numeric: Columns of numbers.
        categorical: Columns of categories.
        dates: Columns of dates.
        readings: How the text of each column is read.
        image_columns: Columns of pictures.
        grey: Whether pictures have one channel.
        image_size: Side of the pictures in pixels.
        channels: Channels of a picture, or the number of its features.
        encoder: Encodes the table.
        table_columns: Where each raw column stands in the encoded table.
        table_width: D.
        feature_scale: Mean and deviation of the fixed features of pictures; None where the model takes pictures.
        task: What the numbers of the target mean.
    """

    name: str
    numeric: list[str]
    categorical: list[str]
    dates: list[str]
    readings: dict[str, dict[str, str]]
    image_columns: list[str]
    grey: bool
    image_size: int
    channels: int
    encoder: TableEncoder
    table_columns: list[TableColumn]
    table_width: int
    feature_scale: tuple[np.ndarray, np.ndarray] | None
    task: Target

    @classmethod
    def of(cls, data: TabularImageData) -> Recipe:
        """The recipe of a data module."""
        samples = data.samples
        return cls(
            name=samples.name,
            numeric=list(samples.numeric),
            categorical=list(samples.categorical),
            dates=list(samples.dates),
            readings={name: dict(reading) for name, reading in samples.readings.items()},
            image_columns=list(samples.image_columns),
            grey=samples.grey,
            image_size=data.image_size,
            channels=data.channels,
            encoder=data.encoder,
            table_columns=data.table_columns,
            table_width=data.table_width,
            feature_scale=data.feature_scale,
            task=data.task,
        )

    @property
    def train_table(self) -> Tensor:
        """Zeros (N, D) in the place of the training rows, as a prediction does not use the training rows."""
        return torch.zeros(self.task.rows, self.table_width)

    def state(self) -> dict[str, Any]:
        """Everything but the scale of the features, in types of JSON."""
        return vars(self) | {
            "encoder": self.encoder.state(),
            "table_columns": [vars(column) for column in self.table_columns],
            "feature_scale": None,
            "task": vars(self.task),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], feature_scale: Sequence[Tensor]) -> Recipe:
        """The recipe that `state` described, with mean and deviation of the features, if there are features."""
        task = state["task"]
        restored = {
            "encoder": TableEncoder.from_state(state["encoder"]),
            "table_columns": [TableColumn(**column) for column in state["table_columns"]],
            "feature_scale": tuple(part.numpy() for part in feature_scale) or None,
            "task": Target(**(task | {"names": tuple(task["names"]), "counts": tuple(task["counts"])})),
        }
        return cls(**(state | restored))


def save(folder: Path, options: Options, data: TabularImageData, method: Method, digest: str) -> None:
    """Writes the model of a run into its folder.

    Args:
        folder: The run folder.
        options: The options of the run.
        data: The data that the model was trained on.
        method: The model, with the weights of the best epoch.
        digest: The digest of the data.

    Raises:
        InputError: The file cannot be written.
    """
    own = options.configuration()
    description = {
        "versions": versions(),
        "options": {name: value for name, value in own.items() if "." not in name},
        "settings": vars(options.settings) if options.settings else {},
        "recipe": Recipe.of(data).state(),
        "digest": digest,
    }
    content = {
        "format": FORMAT,
        "description": json.dumps(description),  # as text: one run gives one file, to the bit
        "feature_scale": [torch.from_numpy(part) for part in data.feature_scale or ()],
        "weights": {name: tensor.cpu() for name, tensor in method.state_dict().items()},
    }
    checkpoints.save(content, folder / NAME)


def load(run: Path | str) -> tuple[Options, Recipe, Method]:
    """The model of a run, in eval mode on the CPU.

    Args:
        run: The run folder, or the file in it.

    Raises:
        InputError: There is no model, the file is damaged or of another release, or a package is missing.
    """
    path = Path(run) / NAME if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the folder of a run that has ended (train.py --out)")
    again = "copy the file again, or train again"
    content = checkpoints.saved(path, {"format"}, "model of train.py", again)
    if content["format"] != FORMAT:
        raise InputError(
            f"{path} has format {content['format']}, and this release reads format {FORMAT}; predict with the release "
            "that wrote the file, or train again"
        )
    with border("read", path, again):
        description = json.loads(content["description"])
        packages = ", ".join(f"{name} {number}" for name, number in description["versions"].items())
    with border("use", path, f"install the packages that wrote the file ({packages}), or train again"):
        name = description["options"]["method"]
        settings = SETTINGS[name](**description["settings"])
        options = Options(**(description["options"] | {"pretrained": False}), settings=settings)
        recipe = Recipe.from_state(description["recipe"], content["feature_scale"])
        method = METHODS[name](recipe, options)
        method.load_state_dict(content["weights"])
    return options, recipe, method.eval().requires_grad_(False)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    ours = {"gaal_surgery": gaal_surgery.__version__}  # a clone on PYTHONPATH has no metadata
    return ours | {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
