"""A run: data, method and Trainer from the options, then training, test and report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .callbacks import EpochTable, callbacks
from .checkpoints import BEST, WholeCheckpoints, load_weights, resume_point
from .checkpoints import load as load_checkpoint
from .command_line import save, started_by
from .data import Samples, load
from .data.identity import Identity, fingerprinted, identity
from .data.module import TabularImageData
from .errors import ImageError, InputError, border, reason
from .files import resume_command, writing
from .interrupts import interrupts
from .loggers import loggers
from .methods import METHODS
from .methods.base import Method, collate
from .options import Options
from .processes import is_first, nodes, say
from .report import device_name, report
from .tasks import TASKS

DATA = "data.json"  # the identity of a run's data
_OTHER_OUT = "give another --out"

# The options that the readers of data sets get.
SAMPLE_OPTIONS = (
    *("task", "path", "image_column", "target_column", "numeric", "categorical", "split_column", "group_column"),
    *("image_root", "separator", "encoding", "table"),
)


def run(options: Options, samples: Samples | None = None, *, command: str | None = None) -> None:
    """Trains, tests and reports.

    Args:
        options: the options of the run.
        samples: the data set, if already read; None reads the data set.
        command: the command line that starts the run, for the records; a resumed run keeps its first command.

    Raises:
        InputError: the options, the data, the run folder or the disk do not allow the run, or the loss diverges.
    """
    folder = options.folder
    if not METHODS[options.method].several_processes and (options.devices > 1 or nodes() > 1):
        able = ", ".join(name for name, method in METHODS.items() if method.several_processes)
        raise InputError(
            f"--method {options.method} looks at whole batches and trains in one process; use --devices 1, or one of "
            f"the methods {able}"
        )
    if options.table_encoder != "mlp" and "table" not in METHODS[options.method].modalities:
        raise InputError(
            f"--method {options.method} has no use for --table_encoder {options.table_encoder}; leave out "
            "--table_encoder, or choose another --method"
        )
    if is_first():
        refuse_folder(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    L.seed_everything(options.seed, verbose=False)

    samples = fingerprinted(read_samples(options) if samples is None else samples, options.workers)
    now = identity(samples)
    refuse_other_data(options, now)
    refuse_other_task(options, samples)
    data = build_data(options, samples)
    method = METHODS[options.method](data, options)
    trainer = build_trainer(options, method)
    start = resume_point(folder, method)
    interrupts.folder = folder
    if is_first():
        with border("make the run folder", folder, _OTHER_OUT):
            folder.mkdir(parents=True, exist_ok=True)
        command = started_by(folder / "config.yaml") or command
        save(options, folder / "config.yaml", command)
        _remember(folder, now)
        trainer.loggers = loggers(options, load_checkpoint(start)["epoch"] + 1 if start else 0)
    device, parameters = device_name(trainer.strategy.root_device), method.parameter_count
    say(f"method {options.method}, {parameters:,} trainable parameters, on {device}")
    say(f"run folder: {folder}")

    try:
        trainer.fit(method, datamodule=data, ckpt_path=start)
        outputs = test(trainer, method, data, folder / f"{BEST}.ckpt")
    except BaseException as error:
        if launched := getattr(trainer.strategy.launcher, "procs", None):  # the others would wait for this process
            for process in launched:
                process.kill()
        if isinstance(error, ImageError) and error.row is not None:
            _remember(folder, now.without_picture(error.row))  # the user may restore it before the run goes on
        if isinstance(error, (RuntimeError, ValueError)) and not method.finite:  # a library's error at such numbers
            raise method.diverged(f"weights are no longer finite in epoch {method.current_epoch}") from error
        if _out_of_memory(error):
            raise InputError(
                f"{device} has too little memory ({reason(error)}); start again with a smaller --batch_size, "
                "--image_size or --image_encoder"
            ) from error
        raise
    if not trainer.is_global_zero:
        return
    epochs = next(callback for callback in trainer.callbacks if isinstance(callback, EpochTable)).table()
    origin = {"command": command, "device": device, "parameters": parameters, "data": now.digest}
    report(folder, options, data, method, outputs, epochs, origin)


def refuse_folder(options: Options) -> None:
    """Refuses a folder that the run cannot use, before anything is read.

    Raises:
        InputError: The folder holds another run, is a file, or cannot be made.
    """
    folder = options.folder
    with border("use the run folder", folder, _OTHER_OUT):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(f"{nearest} cannot be written to")
        if not options.resume and folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} already holds a run; give --resume true to continue it, or another --out")


def refuse_other_task(options: Options, samples: Samples) -> None:
    """Refuses a task that the method cannot learn, and a selection that the task does not have.

    Raises:
        InputError: The method is not for the task of the data, or `--select` is not.
    """
    if samples.task not in METHODS[options.method].tasks:
        able = ", ".join(name for name, method in METHODS.items() if samples.task in method.tasks)
        raise InputError(
            f"--method {options.method} is for classification, and the task is {samples.task}; use one of {able}"
        )
    selections = TASKS[samples.task].selections
    if options.select not in (None, *selections):
        raise InputError(
            f"--select {options.select} is for classes, and the task is {samples.task}; leave out --select, or choose "
            f"{' or '.join(selections)}"
        )


def refuse_other_data(options: Options, now: Identity) -> None:
    """Compares the data with the data that a run was started with.

    Raises:
        InputError: The data have changed; the message says what is different.
    """
    stored = options.folder / DATA
    if not stored.is_file():
        return
    remedy = (
        "restore the file, or remove the file if the data have not changed since the run was started, and go on with "
        f"{resume_command(options.folder)}"
    )
    with border("read", stored, remedy):
        before = Identity.from_json(stored.read_text(encoding="utf-8"))
        difference = before.difference(now, repaired=not options.skip_corrupt)
    if difference:
        raise InputError(
            f"the data have changed since the run in {options.folder} was started: {difference}; restore the data to "
            "resume the run, or start a new run with another --out"
        )


def _remember(folder: Path, now: Identity) -> None:
    with writing(folder / DATA) as temporary:
        temporary.write_text(now.as_json(), encoding="utf-8")


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine is out of memory. torch has an exception of its own only for devices."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def read_samples(options: Options) -> Samples:
    """All rows of the data set."""
    given = {name: getattr(options, name) for name in SAMPLE_OPTIONS}
    return load(options.dataset, options.data_root, **given)


def build_data(options: Options, samples: Samples) -> TabularImageData:
    """The data module. Prints what the module and the reader decided by themselves."""
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
        split_seed=options.split_seed,
        workers=options.workers,
        skip_corrupt=options.skip_corrupt,
        features=options.image_encoder == "features",
        log_target=options.log_target,
    )
    if data.samples.note:
        say(data.samples.note)
    for sentence in data.skipped:
        say(f"skipped: {sentence}")
    for sentence in data.warnings:
        say(f"careful: {sentence}")
    sizes = ", ".join(f"{size} {split}" for split, size in data.split_sizes.items())
    match data.task.task:
        case "regression":
            what = f"regression of {'the logarithm of ' if data.task.log else ''}{data.task.names[0]}"
        case "multilabel":
            what = f"{len(data.classes)} labels"
        case _:
            what = f"{len(data.classes)} classes"
    say(f"{data.samples.name}: {what}, {sizes} rows, table of {data.table_width} columns")
    return data


def build_trainer(options: Options, method: Method) -> L.Trainer:
    """Lightning's Trainer, with a process for each device."""
    accelerator = options.accelerator
    if accelerator == "auto":  # Lightning's auto takes Apple's GPU too, which lacks the double precision of a fit
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    bar = sys.stdout.isatty()
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=options.devices,
            num_nodes=nodes(),
            # A turn leaves the other modality's encoder without a gradient.
            strategy=DDPStrategy(find_unused_parameters=True) if options.devices * nodes() > 1 else "auto",
            use_distributed_sampler=False,  # our sampler shares out the training rows; every process sees all others
            precision=options.precision,
            max_epochs=method.total_epochs,
            callbacks=callbacks(
                options.folder,
                options.seed,
                options.patience,
                figure=method.task.figure,
                selected_by=method.selected_by,
                bar=bar,
            ),
            plugins=WholeCheckpoints(),
            enable_progress_bar=bar,
            logger=False,  # `run` adds the loggers of the first process
            log_every_n_steps=1,  # a logger gets the means of epochs, however short they are
            default_root_dir=options.folder,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise InputError(
            f"cannot train with --accelerator {accelerator} and --precision {options.precision} ({reason(error)}); "
            "choose others"
        ) from error


def test(trainer: L.Trainer, method: Method, data: TabularImageData, best: Path) -> dict[str, dict[str, Any]]:
    """Outputs of the best epoch on the validation and test rows, and on the test rows without their tables (zeros)."""
    # Only the weights: the Trainer would also set the table of epochs and the monitor back to that epoch.
    load_weights(method, best)
    loaders = {
        "val": data.val_dataloader(),
        "test": data.test_dataloader(),
        "without_table": data.test_dataloader(table=False),
    }
    return {split: collate(trainer.predict(method, loader)) for split, loader in loaders.items()}
