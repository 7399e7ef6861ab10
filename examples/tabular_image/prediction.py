"""Predictions of a trained model for new rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .artifact import Recipe, load
from .data.features import described, standardised
from .data.images import normalise, pixels
from .data.new_rows import new_rows
from .data.samples import Samples
from .methods.base import Method

SEEN = {
    (True, True): "image and table",
    (True, False): "image alone",
    (False, True): "table alone",
    (False, False): "nothing",
}


class Predictor:
    """A trained model with its preprocessing.

    Args:
        recipe: How rows become batches.
        method: The model, in eval mode.
        batch_size: Rows in memory at a time.

    Attributes:
        problems: One sentence for each cell and picture of the last prediction that could not be used.

    Example:
        >>> predictor = Predictor.load("runs/csv-gaal-seed0")  # doctest: +SKIP
        >>> predictor.predict(pd.read_csv("new.csv"), image_root="pictures")  # doctest: +SKIP
    """

    def __init__(self, recipe: Recipe, method: Method, batch_size: int = 64) -> None:
        self.recipe = recipe
        self.method = method
        self.batch_size = batch_size
        self.problems: list[str] = []

    @classmethod
    def load(cls, run: Path | str, device: str | torch.device = "cpu") -> Self:
        """The predictor of a run that has ended.

        Args:
            run: The run folder, or the `model.pt` in it.
            device: Where to predict.

        Raises:
            InputError: There is no model, or the file cannot be used.
        """
        options, recipe, method = load(run)
        return cls(recipe, method.to(device), options.batch_size)

    def predict(
        self, frame: pd.DataFrame, image_root: Path | str = ".", *, name: str = "the table", workers: int = 0
    ) -> pd.DataFrame:
        """What the model says of each row.

        A row without a readable picture is predicted from its table. A row without any cell of the table is predicted
        from its picture. Methods whose voices are fused late use the voice that is left. Other methods get a row of
        means in the place of the missing modality.

        Args:
            frame: N rows with the columns of the training table except the target. Columns of pictures hold paths.
            image_root: Where relative paths start.
            name: What messages call the table.
            workers: Processes that read pictures.

        Returns:
            N rows with the index of `frame`: `predicted`; `seen`, which says what the prediction was made from; and the
            probability of every class or label, or `low` and `high`, the ends of the 90% interval. Where a row has
            nothing that the model looks at, all columns but `seen` are missing.

        Raises:
            InputError: The table lacks a column, or holds text in a numeric column.
        """
        samples = new_rows(frame, self.recipe, Path(image_root), name)
        encoded = self.recipe.encoder.encode(samples)
        self.problems = list(encoded.problems)
        outputs, seen = self.outputs(samples, torch.from_numpy(encoded.values), workers)
        told = outputs.isfinite().all(dim=1).numpy()
        task = self.method.task
        answered = pd.concat([task.answers(outputs[told]).rename("predicted"), task.details(outputs[told])], axis=1)
        answered.index = pd.Index(np.flatnonzero(told))
        answered = answered.reindex(range(len(frame)))
        answered.insert(1, "seen", np.where(told, seen, SEEN[False, False]))
        return answered.set_index(frame.index)

    def outputs(self, samples: Samples, table: Tensor, workers: int = 0) -> tuple[Tensor, np.ndarray]:
        """The outputs (N, C) of the prediction, NaN without a prediction, and what each is made from, (N,)."""
        named = np.array([isinstance(samples.images, np.ndarray) or any(paths) for paths in samples.images])
        filled = samples.table.notna().any(axis=1).to_numpy()
        outputs = torch.full((len(samples), self.method.task.outputs), torch.nan)
        pictured = np.zeros(len(samples), dtype=bool)
        for has_table in (True, False):
            for rows, images in self._pictures(samples, np.flatnonzero(named & (filled == has_table)), workers):
                pictured[rows] = True
                outputs[rows] = self._answer(rows, images, table[rows] if has_table else None)
        rest = np.flatnonzero(filled & ~pictured)
        for start in range(0, len(rest), self.batch_size):
            rows = rest[start : start + self.batch_size]
            outputs[rows] = self._answer(rows, None, table[rows])
        return outputs, np.array(
            [SEEN[bool(image), bool(cells)] for image, cells in zip(pictured, filled, strict=True)]
        )

    @torch.inference_mode()
    def _answer(self, rows: np.ndarray, images: Tensor | None, table: Tensor | None) -> Tensor:
        """Outputs (B, C); NaN where the batch has nothing that the model looks at."""
        batch = {"row": torch.from_numpy(rows)}
        batch |= {} if images is None else {"image": images}
        batch |= {} if table is None else {"table": table}
        batch = {name: values.to(self.method.device) for name, values in batch.items()}
        return self.method.answer(batch).float().cpu()

    def _pictures(self, samples: Samples, rows: np.ndarray, workers: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Rows with readable pictures, a batch at a time, and their pictures."""
        batches = _Batches(samples, rows, self.batch_size, self.recipe)
        for place, (images, problems) in enumerate(DataLoader(batches, batch_size=None, num_workers=workers)):
            part = batches.parts[place]
            self.problems += problems.values()
            readable = np.setdiff1d(np.arange(len(part)), list(problems))
            if len(readable):
                yield part[readable], images[readable]


class _Batches(Dataset[tuple[Tensor, dict[int, str]]]):
    """Pictures as the model takes them, with a batch as an item, and a message for each unreadable one, by place."""

    def __init__(self, samples: Samples, rows: np.ndarray, size: int, recipe: Recipe) -> None:
        self.samples, self.recipe = samples, recipe
        self.parts: Sequence[np.ndarray] = [rows[start : start + size] for start in range(0, len(rows), size)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[int, str]]:
        squares, problems = pixels(self.samples, self.parts[index], self.recipe.image_size)
        if self.recipe.feature_scale is None:
            return normalise(squares.float() / 255, self.recipe.grey), problems
        return standardised(described(squares), self.recipe.feature_scale)[..., None, None], problems
