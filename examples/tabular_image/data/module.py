"""Splits, encoded table and data loaders of one data set, ready for a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..errors import InputError
from .images import broken_images, image_transform, missing_images, square_image
from .samples import Samples
from .splits import split_rows
from .tables import encode_table

Batch = dict[str, Tensor]


class TabularImageData(L.LightningDataModule):
    """Batches of image, table and target for training, validation and test.

    A batch is a dict of `"image"` float (B, channels, S, S), normalised; `"table"` float (B, D); `"target"` long (B,);
    `"row"` long (B,), the position in `samples.ids`.

    The order of the training rows and their augmentation depend on seed, epoch and row alone: neither the number of
    workers nor an interruption changes them.

    Args:
        samples: The data set.
        batch_size: Rows a batch, on each device.
        image_size: S; by default the size that suits the data set.
        augment: Flip, rotate, scale and shift the training images at random.
        validation: Share of all rows for validation, unless the data set fixes its splits.
        test: Share of all rows for the test, unless the data set fixes its splits.
        seed: Of the splits, the order of the training rows and the augmentation.
        workers: Processes that read images; 0 reads in the main process.
        skip_corrupt: Drop rows whose image is missing or unreadable, and list them in `skipped`.

    Attributes:
        samples: The data set, without skipped rows.
        classes: Class names in the order of the target; ranges where the target was cut at quantiles.
        table_width: D.
        channels: 1 for grey images, else 3.
        class_counts: Long tensor (C,), training rows of each class.
        split_sizes: Rows of "train", "val" and "test".
        splits: Their positions in `samples`.
        skipped: One sentence for each dropped row.

    Raises:
        InputError: The data cannot be used as they are; see also `split_rows` and `encode_table`.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int = 64,
        image_size: int | None = None,
        augment: bool = False,
        validation: float = 0.1,
        test: float = 0.2,
        seed: int = 0,
        workers: int = 2,
        skip_corrupt: bool = False,
    ) -> None:
        super().__init__()
        if len(samples) == 0:
            raise InputError(f"{samples.name}: there are no rows; check the file that lists them")
        samples, self.skipped = _with_readable_images(samples, workers, skip_corrupt)
        self.samples = samples
        self.batch_size = batch_size
        self.image_size = image_size or samples.image_size
        self.augment = augment
        self.seed = seed
        self.workers = workers
        self.channels = 1 if samples.grey else 3
        self.splits = split_rows(samples, validation=validation, test=test, seed=seed)
        self.split_sizes = {name: len(rows) for name, rows in self.splits.items()}
        self._table = torch.from_numpy(encode_table(samples, self.splits["train"]))
        self.table_width = self._table.shape[1]
        self.classes, self._target = _encode_target(samples, self.splits["train"])
        self.class_counts = self._target[self.splits["train"]].bincount(minlength=len(self.classes))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled; the last batch is dropped unless it is the only one."""
        dataset = self._dataset("train", self.augment)
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EpochSampler(dataset, num_replicas=ranks, rank=rank, seed=self.seed)
        return self._loader(dataset, sampler=sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """In order, never augmented."""
        return self._loader(self._dataset("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """In order, never augmented."""
        return self._loader(self._dataset("test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test rows."""
        return self.test_dataloader()

    def _dataset(self, split: str, augment: bool = False) -> RowDataset:
        transform = image_transform(self.samples.grey, augment)
        return RowDataset(self.samples, self._table, self._target, self.splits[split], self.image_size, transform)

    def _loader(self, dataset: RowDataset, **options: Any) -> DataLoader[Batch]:
        return LazyLoader(
            dataset,
            self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the model's generator
            **options,
        )


class RowDataset(Dataset[Batch]):
    """Some rows of a data set; images are read on access.

    An index is a position, or (position, seed): the seed fixes the row's augmentation.
    """

    def __init__(
        self,
        samples: Samples,
        table: Tensor,
        target: Tensor,
        rows: np.ndarray,
        image_size: int,
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.samples = samples
        self.table = table
        self.target = target
        self.rows = rows
        self.image_size = image_size
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        position, seed = index if isinstance(index, tuple) else (index, None)
        row = int(self.rows[position])
        square = square_image(self.samples, row, self.image_size)
        if seed is None:
            image = self.transform(square)
        else:
            with torch.random.fork_rng(devices=[]):  # in the main process the model draws from the same generator
                torch.default_generator.manual_seed(seed)
                image = self.transform(square)
        return {"image": image, "table": self.table[row], "target": self.target[row], "row": torch.tensor(row)}


class EpochSampler(DistributedSampler[Batch]):
    """Shuffles by (seed, epoch) and gives each row a seed of its own, by (seed, epoch, row)."""

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        seeds = torch.randint(2**62, (len(self.dataset),), generator=generator)  # type: ignore[arg-type]
        positions: Iterator[int] = super().__iter__()  # type: ignore[assignment]
        return ((position, int(seeds[position])) for position in positions)


class LazyLoader(DataLoader[Batch]):
    """Starts to read at the first batch: a resuming Trainer asks for the iterator before it sets the epoch."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()


def _with_readable_images(samples: Samples, threads: int, skip_corrupt: bool) -> tuple[Samples, list[str]]:
    """The rows whose images can be read, and one sentence for each of the others."""
    missing = missing_images(samples)
    # Where missing files end the run anyway, the user need not wait for the others to be decoded.
    problems = missing if missing and not skip_corrupt else broken_images(samples, threads) | missing
    if not problems:
        return samples, []
    first = next(iter(problems.values()))
    more = f", as are {len(problems) - 1} more rows" if len(problems) > 1 else ""
    if not skip_corrupt:
        raise InputError(f"{first}{more}; restore the file, or leave such rows out with --skip_corrupt true")
    if len(problems) == len(samples):
        raise InputError(f"no image of {samples.name} can be read, so there is nothing to train on; first, {first}")
    return samples.take(np.delete(np.arange(len(samples)), list(problems))), list(problems.values())


def _encode_target(samples: Samples, train: np.ndarray) -> tuple[list[str], Tensor]:
    """Class names (C) and the class of each row, long (N,)."""
    if samples.quantiles is None:
        classes, target = np.unique(samples.target.astype(str), return_inverse=True)
        return classes.tolist(), torch.from_numpy(target)
    shares = np.arange(1, samples.quantiles) / samples.quantiles
    cuts = np.unique(samples.target.iloc[train].quantile(shares))
    target = np.digitize(samples.target, cuts)
    names = [f"{cut:,.6g}" for cut in cuts]
    inner = [f"{low} to {high}" for low, high in pairwise(names)]
    return [f"below {names[0]}", *inner, f"{names[-1]} and above"], torch.from_numpy(target)
