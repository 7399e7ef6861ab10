"""Splits, encoded table and data loaders of one data set, ready for a Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..errors import ImageError, InputError
from .features import feature_scale, standardised, with_features
from .images import in_memory, normalise, pixels, random_affine, unidentified_images, without
from .leaks import leaks
from .samples import Samples
from .splits import split_rows
from .tables import encode_table
from .targets import Target, encode_target

Batch = dict[str, Tensor]
Loaded = tuple[Batch, dict[int, str]]


class TabularImageData(L.LightningDataModule):
    """Batches of image, table and target for training, validation and test.

    A batch is a dict of `"image"` float (B, channels, S, S), normalised; `"table"` float (B, D); `"target"` long (B,);
    `"row"` long (B,), the position in `samples.ids`.

    The order of the training rows and their augmentation depend on seed, epoch and row alone: the number of workers and
    interruptions change nothing. All images are read at the start if their pixels take at most `cache` bytes. Otherwise
    each image is read when it is needed.

    Images that are read at the start are fully checked there. Of other images only the headers are checked at the
    start, which finds missing files and files that are not images. Damaged pixels are found when their batch is loaded.

    Args:
        samples: The data set.
        batch_size: Rows a batch, on each device.
        image_size: S; by default the size that suits the data set.
        augment: Rotate, scale and shift the training images at random; colour images are also mirrored. Grey ones are
            not, because a scan or a silhouette may be another class in the mirror.
        validation: Share of all rows for validation, unless the data set fixes its splits.
        test: Share of all rows for the test, unless the data set fixes its splits.
        folds: Number of folds of a cross-validation, in which one fold is the test split in place of a share.
        fold: Which fold is the test split, from 0.
        seed: Seed of the splits, of the order of the training rows and of the augmentation.
        split_seed: Seed of the splits alone; None takes `seed`.
        workers: Processes that read images; 0 reads in the main process.
        skip_corrupt: Drop rows whose image is missing or unreadable, and list them in `skipped`. Rows that are found at
            the start are in no split. Rows that are found later are missing from their batches.
        cache: Most bytes of pixels to keep in memory.
        features: Give fixed features of the pictures in place of the pictures, see `data.features`. `"image"` is then
            float (B, F, 1, 1), standardised on the training rows, and never augmented.
        log_target: Learn the logarithm of the number that is the target.

    Attributes:
        samples: The data set, without skipped rows.
        task: What the numbers of the target mean.
        classes: Class names in the order of the target, or ranges where the target was cut at quantiles. Of labels, the
            names of the labels. Of a number, the name of the number.
        table: Float (N, D), the encoded table of all rows.
        target: Long (N,), the class of each row; labels float (N, L), or a standardised number float (N,).
        table_width: D.
        table_columns: Where each raw column stands in the encoded table.
        encoder: Encodes other rows in the same way.
        feature_scale: Mean and deviation of each fixed feature on the training rows; None without features.
        train_table: Float (N, D), the encoded training rows.
        channels: 1 for grey images, 3 for colour, F for features.
        class_counts: Long tensor (C,), training rows of each class, or with each label.
        split_sizes: Rows of "train", "val" and "test".
        splits: Positions in `samples` of the rows of each split.
        skipped: One sentence for each dropped row.
        warnings: One sentence for each thing in the data that may mislead: cells that cannot be used, and leaks.

    Raises:
        InputError: The data cannot be used; see also `split_rows` and `encode_table`.
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
        folds: int | None = None,
        fold: int = 0,
        seed: int = 0,
        split_seed: int | None = None,
        workers: int = 2,
        skip_corrupt: bool = False,
        cache: int = 2**30,
        features: bool = False,
        log_target: bool = False,
    ) -> None:
        super().__init__()
        if len(samples) == 0:
            raise InputError(f"{samples.name}: there are no rows; check the file that lists the rows")
        self.batch_size = batch_size
        self.image_size = image_size or samples.image_size
        self.channels = 1 if samples.grey else 3
        if features:
            samples, problems, workers = with_features(samples, self.image_size, skip=skip_corrupt), {}, 0
        elif len(samples) * self.channels * self.image_size**2 <= cache:
            samples, problems = in_memory(samples, self.image_size, workers)
            workers = 0  # workers have nothing left to read
        else:
            problems = unidentified_images(samples, workers)
        samples = without(samples, problems, skip=skip_corrupt)
        self.skip_corrupt = skip_corrupt
        self.skipped = list(problems.values())
        self.samples = samples
        self.augment = augment
        self.seed = seed
        self.workers = workers
        drawn = seed if split_seed is None else split_seed
        self.splits = split_rows(samples, validation=validation, test=test, folds=folds, fold=fold, seed=drawn)
        self.split_sizes = {name: len(rows) for name, rows in self.splits.items()}
        self.feature_scale = feature_scale(samples.features, self.splits["train"]) if features else None
        self._features = None
        if self.feature_scale is not None:
            self._features = standardised(samples.features, self.feature_scale)[..., None, None]
            self.channels = self._features.shape[1]
        encoded = encode_table(samples, self.splits["train"])
        self.table_columns, self.encoder = encoded.columns, encoded.encoder
        self.warnings = [*encoded.problems, *leaks(samples, self.splits)]
        self.table = torch.from_numpy(encoded.values)
        self.table_width = self.table.shape[1]
        self.train_table = self.table[self.splits["train"]]
        self.task, self.target = encode_target(samples, self.splits["train"], log=log_target)
        self.classes, self.class_counts = list(self.task.names), torch.tensor(self.task.counts)
        self.warnings += [f"{samples.name}: {sentence}" for sentence in _untrained_labels(self.task)]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled; the last batch is dropped unless it is the only one."""
        dataset = self._dataset("train")
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EpochSampler(dataset, num_replicas=ranks, rank=rank, seed=self.seed)
        sampler.augment = self.augment
        return self._loader(dataset, sampler=sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """In order, never augmented."""
        return self._loader(self._dataset("val"))

    def test_dataloader(self, *, table: bool = True) -> DataLoader[Batch]:
        """In order, never augmented; `table=False` leaves the table out of the batches, as if it were absent."""
        dataset = self._dataset("test")
        if not table:
            dataset.table = None
        return self._loader(dataset)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test rows."""
        return self.test_dataloader()

    def _dataset(self, split: str) -> RowDataset:
        skipped = self.skipped if self.skip_corrupt else None
        return RowDataset(
            self.samples, self.table, self.target, self.splits[split], self.image_size, skipped, self._features
        )

    def _loader(self, dataset: RowDataset, **options: Any) -> DataLoader[Batch]:
        return LazyLoader(
            dataset,
            self.batch_size,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the model's generator
            **options,
        )


class RowDataset(Dataset[Loaded]):
    """Some rows of a data set, a batch at a time; images in files are read on access.

    An index is a position, or (position, draws): the draws move the row's image, see `random_affine`.

    A batch lacks the rows of unreadable images, and comes with a message for each of them: an exception in a worker
    process would reach the user as a traceback. The messages go to the list `skipped`. With None they are errors.
    """

    def __init__(
        self,
        samples: Samples,
        table: Tensor | None,
        target: Tensor,
        rows: np.ndarray,
        image_size: int,
        skipped: list[str] | None = None,
        features: Tensor | None = None,
    ) -> None:
        self.samples = samples
        self.table = table
        self.target = target
        self.rows = rows
        self.image_size = image_size
        self.skipped = skipped
        self.features = features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int | tuple[int, Tensor]]) -> Loaded:
        draws = [index[1] for index in indices if isinstance(index, tuple)]
        rows = self.rows[[index[0] if isinstance(index, tuple) else index for index in indices]]
        images, problems = self._images(rows, draws) if self.features is None else (self.features[rows], {})
        batch = {
            "image": images,
            **({} if self.table is None else {"table": self.table[rows]}),
            "target": self.target[rows],
            "row": torch.from_numpy(rows),
        }
        if problems:
            readable = np.delete(np.arange(len(rows)), list(problems))
            batch = {name: values[readable] for name, values in batch.items()}
        return batch, {int(rows[place]): problem for place, problem in problems.items()}

    def _images(self, rows: np.ndarray, draws: Sequence[Tensor]) -> tuple[Tensor, dict[int, str]]:
        """Normalised pictures (B, channels, S, S), and a message for each unreadable one, by place."""
        grey = self.samples.grey
        squares, problems = pixels(self.samples, rows, self.image_size)
        images = squares.float() / 255
        if draws:
            images = random_affine(images, torch.stack(draws), mirror=not grey)
        return normalise(images, grey), problems

    def tell(self, problems: dict[int, str]) -> None:
        """Lists and prints the new ones among the problems of a batch, which are messages by row.

        Raises:
            ImageError: Unreadable images are not skipped.
        """
        if self.skipped is None:
            row, problem = next(iter(problems.items()))
            raise ImageError(
                f"{problem}; restore the file and go on with --resume true, or start again with another --out and "
                "--skip_corrupt true",
                row,
            )
        new = [problem for problem in problems.values() if problem not in self.skipped]
        self.skipped += new
        for problem in new:
            print(f"skipped: {problem}")


def _as_it_is(loaded: Loaded) -> Loaded:
    return loaded


class EpochSampler(DistributedSampler[Loaded]):
    """Shuffles by (seed, epoch), and gives each row the draws of its augmentation, by (seed, epoch, row)."""

    augment = False

    def __iter__(self) -> Iterator[int | tuple[int, Tensor]]:  # type: ignore[override]
        positions: Iterator[int] = super().__iter__()  # type: ignore[assignment]
        if not self.augment:
            return positions
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        draws = torch.rand(len(self.dataset), 5, generator=generator)  # type: ignore[arg-type]
        return ((position, draws[position]) for position in positions)


class LazyLoader(DataLoader[Batch]):
    """Starts to read at the first batch: a resuming Trainer asks for the iterator before it sets the epoch."""

    dataset: RowDataset

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch, problems in super().__iter__():
            if problems:
                self.dataset.tell(problems)
                if len(batch["row"]) < 2 and isinstance(self.sampler, EpochSampler):
                    first = next(iter(problems.values()))
                    raise ImageError(
                        f"{first}, and hardly any image of this training batch can be read; remove such rows from the "
                        "table"
                    )
            if len(batch["row"]):
                yield batch


def _untrained_labels(task: Target) -> list[str]:
    if task.task != "multilabel":
        return []
    alike = [name for name, count in zip(task.names, task.counts, strict=True) if count in (0, task.rows)]
    return [f"label {name!r} is the same in all training rows, so nothing can be learned about it" for name in alike]
