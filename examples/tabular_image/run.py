"""A run: data, method and Trainer from the options, then training, test and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .callbacks import BEST, LAST, EpochTable, callbacks
from .command_line import save
from .data import Samples, load
from .data.identity import Identity, fingerprinted, identity
from .data.module import TabularImageData
from .errors import ImageError, InputError
from .files import replacing
from .methods import METHODS
from .methods.base import Method, collate
from .options import Options
from .processes import is_first, nodes, say
from .report import report

DATA = "data.json"  # the identity of a run's data

# What the readers of data sets are told.
SAMPLE_OPTIONS = (
    *("path", "image_column", "target_column", "numeric", "categorical", "split_column", "group_column"),
    *("image_root", "separator", "encoding", "table"),
)


def run(options: Options, samples: Samples | None = None) -> None:
    """Trains, tests and reports.

    Args:
        options: of the run.
        samples: the data set, where it was read before; None reads it.
    """
    folder = options.folder
    if not METHODS[options.method].several_processes and (options.devices > 1 or nodes() > 1):
        able = ", ".join(name for name, method in METHODS.items() if method.several_processes)
        raise InputError(
            f"--method {options.method} looks at whole batches and trains in one process; use --devices 1, or one of "
            f"{able}"
        )
    if is_first() and not options.resume and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} already holds a run; give --resume true to continue it, or another --out")
    if options.threads:
        torch.set_num_threads(options.threads)
    L.seed_everything(options.seed, verbose=False)

    samples = fingerprinted(read_samples(options) if samples is None else samples, options.workers)
    now = identity(samples)
    refuse_other_data(options, now)
    data = build_data(options, samples)
    method = METHODS[options.method](data, options)
    trainer = build_trainer(options, method.total_epochs)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        save(options, folder / "config.yaml")
        _remember(folder, now)

    last = folder / f"{LAST}.ckpt"
    try:
        trainer.fit(method, datamodule=data, ckpt_path=last if last.exists() else None)
        outputs = test(trainer, method, data, folder / f"{BEST}.ckpt")
    except ImageError as error:
        if error.row is not None:
            _remember(folder, now.without_picture(error.row))  # it may be restored before the run goes on
        raise
    if not trainer.is_global_zero:
        return
    epochs = next(callback for callback in trainer.callbacks if isinstance(callback, EpochTable)).table()
    report(folder, options, data, method, outputs, epochs)


def refuse_other_data(options: Options, now: Identity) -> None:
    """Compares the data with those that a run was started with.

    Raises:
        InputError: They are others; the message says what is different.
    """
    stored = options.folder / DATA
    if not stored.is_file():
        return
    before = Identity.from_json(stored.read_text())
    if difference := before.difference(now, repaired=not options.skip_corrupt):
        raise InputError(
            f"the data are not those that the run in {options.folder} was started with: {difference}; restore them to "
            "resume the run, or start a new one with another --out"
        )


def _remember(folder: Path, now: Identity) -> None:
    with replacing(folder / DATA) as temporary:
        temporary.write_text(now.as_json())


def read_samples(options: Options) -> Samples:
    """All rows of the data set."""
    given = {name: getattr(options, name) for name in SAMPLE_OPTIONS}
    return load(options.dataset, options.data_root, **given)


def build_data(options: Options, samples: Samples) -> TabularImageData:
    """The data module, and what it decided by itself printed."""
    data = TabularImageData(
        samples,
        batch_size=options.batch_size,
        image_size=options.image_size,
        augment=options.augment,
        validation=options.validation,
        test=options.test,
        folds=options.folds,
        fold=options.fold,
        seed=options.seed,
        workers=options.workers,
        skip_corrupt=options.skip_corrupt,
    )
    if data.samples.note:
        say(data.samples.note)
    for sentence in data.skipped:
        say(f"skipped: {sentence}")
    for sentence in data.warnings:
        say(f"careful: {sentence}")
    sizes = ", ".join(f"{size} {split}" for split, size in data.split_sizes.items())
    say(f"{data.samples.name}: {len(data.classes)} classes, {sizes} rows, table of {data.table_width} columns")
    return data


def build_trainer(options: Options, epochs: int) -> L.Trainer:
    """Lightning's Trainer, with a process for each device."""
    accelerator = options.accelerator
    if accelerator == "auto":  # Lightning's auto takes Apple's GPU too, which lacks the double precision of a fit
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=options.devices,
            num_nodes=nodes(),
            # A turn leaves the other modality's encoder without a gradient.
            strategy=DDPStrategy(find_unused_parameters=True) if options.devices * nodes() > 1 else "auto",
            use_distributed_sampler=False,  # training rows are shared out by our sampler, the others seen by everyone
            precision=options.precision,
            max_epochs=epochs,
            callbacks=callbacks(options.folder, options.seed, options.patience),
            logger=False,
            default_root_dir=options.folder,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise InputError(f"--accelerator {accelerator} --precision {options.precision}: {error}") from error


def test(trainer: L.Trainer, method: Method, data: TabularImageData, best: Path) -> dict[str, dict[str, Any]]:
    """Outputs of the best epoch on the validation and test rows, and on test rows whose tables are absent (zeros)."""
    # The weights alone: the Trainer would set table and monitor back to that epoch too.
    method.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
    loaders = {
        "val": data.val_dataloader(),
        "test": data.test_dataloader(),
        "without_table": data.test_dataloader(table=False),
    }
    return {split: collate(trainer.predict(method, loader)) for split, loader in loaders.items()}
