"""Train and test an image-and-table classifier: `python examples/tabular_image/train.py --help`."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tabular_image.callbacks import BEST, LAST, EpochTable, callbacks
from tabular_image.data import DATASETS, Samples, TabularImageData, load
from tabular_image.errors import InputError
from tabular_image.files import replacing
from tabular_image.methods import METHODS, Method
from tabular_image.methods.base import collate
from tabular_image.options import Options
from tabular_image.report import report

# What the readers of data sets are told.
SAMPLE_OPTIONS = (
    *("path", "image_column", "target_column", "numeric", "categorical", "split_column", "group_column"),
    *("image_root", "table"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    _quieten()
    try:
        run(parse(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        _say(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Options from the command line; those of a run that is resumed are its own."""
    parser = _parser()
    options = _options(parser.parse_args(list(arguments)))
    stored = options.folder / "config.yaml"
    if not (options.resume and stored.is_file()):
        return options
    resumed = _options(parser.parse_args(["--config", str(stored), *arguments]))
    before = _options(parser.parse_args(["--config", str(stored)]))
    old, new = before.configuration(), resumed.configuration()
    for name in old.keys() | new.keys():
        if old.get(name) != new.get(name):
            raise InputError(
                f"the run in {options.folder} was started with --{name} {old.get(name)} and cannot be resumed with "
                f"{new.get(name)}; leave the option out, or choose another --out"
            )
    return resumed


def run(options: Options, samples: Samples | None = None) -> None:
    """Trains, tests and reports.

    Args:
        options: of the run.
        samples: the data set, where it was read before; None reads it.
    """
    folder = options.folder
    if not METHODS[options.method].several_processes and (options.devices > 1 or _nodes() > 1):
        able = ", ".join(name for name, method in METHODS.items() if method.several_processes)
        raise InputError(
            f"--method {options.method} looks at whole batches and trains in one process; use --devices 1, or one of "
            f"{able}"
        )
    if _first_process() and not options.resume and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} already holds a run; give --resume true to continue it, or another --out")
    if options.threads:
        torch.set_num_threads(options.threads)
    L.seed_everything(options.seed, verbose=False)

    data = build_data(options, read_samples(options) if samples is None else samples)
    method = METHODS[options.method](data, options)
    trainer = build_trainer(options, method.total_epochs)
    if _first_process():
        folder.mkdir(parents=True, exist_ok=True)
        _save_config(options, folder / "config.yaml")

    last = folder / f"{LAST}.ckpt"
    trainer.fit(method, datamodule=data, ckpt_path=last if last.exists() else None)
    outputs = test(trainer, method, data, folder / f"{BEST}.ckpt")
    if not trainer.is_global_zero:
        return
    epochs = next(callback for callback in trainer.callbacks if isinstance(callback, EpochTable)).table()
    report(folder, options, data, method, outputs, epochs)


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
        _say(data.samples.note)
    for sentence in data.skipped:
        _say(f"skipped: {sentence}")
    sizes = ", ".join(f"{size} {split}" for split, size in data.split_sizes.items())
    _say(f"{data.samples.name}: {len(data.classes)} classes, {sizes} rows, table of {data.table_width} columns")
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
            num_nodes=_nodes(),
            # A turn leaves the other modality's encoder without a gradient.
            strategy=DDPStrategy(find_unused_parameters=True) if options.devices * _nodes() > 1 else "auto",
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


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--config FILE] [--OPTION VALUE ...]",
        description="Train and test an image-and-table classifier. Without options: GAAL on handwritten digits. "
        f"Data sets: {', '.join(DATASETS)}. Methods: {', '.join(METHODS)}.",
    )
    parser.add_argument("--config", action="config", help="YAML file of options, such as the config.yaml of a run.")
    parser.add_class_arguments(Options, skip={"settings"})
    for name, method in METHODS.items():
        if fields(method.Settings):
            parser.add_class_arguments(method.Settings, name)
    return parser


def _options(namespace: Namespace) -> Options:
    name = namespace.method
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}? All: " if close else "choose one of "
        raise InputError(f"there is no method {name!r}; {hint}{', '.join(METHODS)}")
    common = {field.name: _builtin(namespace[field.name]) for field in fields(Options) if field.name != "settings"}
    own = fields(METHODS[name].Settings)
    settings = {field.name: _builtin(namespace[f"{name}.{field.name}"]) for field in own}
    options = Options(**common, settings=METHODS[name].Settings(**settings))
    return replace(options, devices=int(os.environ.get("LOCAL_WORLD_SIZE", options.devices)))


def _builtin(value: Any) -> Any:
    """A restricted number of jsonargparse as int or float: optimizers keep it, and checkpoints admit only builtins."""
    base = type(value).__base__
    return base(value) if base in (int, float) and not isinstance(value, bool) else value


def _save_config(options: Options, path: Path) -> None:
    stored = Namespace({name: value for name, value in vars(options).items() if name != "settings"})
    stored.resume = False
    if vars(options.settings):
        stored[options.method] = Namespace(vars(options.settings))
    with replacing(path) as temporary:
        temporary.write_text(_parser().dump(stored))


def _nodes() -> int:
    """Machines that torchrun has started the command on."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def _first_process() -> bool:
    return rank_zero_only.rank == 0


def _say(*values: object, **settings: Any) -> None:
    """Prints, once for all processes."""
    if _first_process():
        print(*values, **settings)


def _quieten() -> None:
    """Drops Lightning's advertising and its advice that does not apply here; warnings of substance stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",  # --workers decides
        ".*Checkpoint directory .* exists and is not empty.*",  # that is what a resumed run looks like
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message=advice)


if __name__ == "__main__":
    sys.exit(main())
