"""The command line of train.py: options in, and out to the `config.yaml` that repeats a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from .data import DATASETS
from .errors import InputError
from .files import replacing
from .methods import METHODS, SETTINGS
from .options import Options


def parse(arguments: Sequence[str]) -> Options:
    """Options from the command line; those of a run that is resumed are its own.

    Raises:
        InputError: There is no such method or data set, or the options are not those of the run to resume.
    """
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


def save(options: Options, path: Path) -> None:
    """Writes the options as a file for `--config`."""
    stored = Namespace({name: value for name, value in vars(options).items() if name != "settings"})
    stored.resume = False
    if vars(options.settings):
        stored[options.method] = Namespace(vars(options.settings))
    with replacing(path) as temporary:
        temporary.write_text(_parser().dump(stored))


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        allow_abbrev=False,  # a mistyped option is refused, never taken for a longer one
        usage="train.py [--config FILE] [--OPTION VALUE ...]",
        description="Train and test an image-and-table classifier. Without options: GAAL on handwritten digits. "
        f"Data sets: {', '.join(DATASETS)}. Methods: {', '.join(METHODS)}.",
    )
    parser.add_argument("--config", action="config", help="YAML file of options, such as the config.yaml of a run.")
    parser.add_class_arguments(Options, skip={"settings"})
    for name, settings in SETTINGS.items():
        if fields(settings):
            parser.add_class_arguments(settings, name)
    return parser


def _options(namespace: Namespace) -> Options:
    name = namespace.method
    METHODS.check(name)
    DATASETS.check(namespace.dataset)
    common = {field.name: _builtin(namespace[field.name]) for field in fields(Options) if field.name != "settings"}
    own = fields(SETTINGS[name])
    settings = {field.name: _builtin(namespace[f"{name}.{field.name}"]) for field in own}
    options = Options(**common, settings=SETTINGS[name](**settings))
    return replace(options, devices=int(os.environ.get("LOCAL_WORLD_SIZE", options.devices)))


def _builtin(value: Any) -> Any:
    """A restricted number of jsonargparse as int or float: optimizers keep it, and checkpoints admit only builtins."""
    base = type(value).__base__
    return base(value) if base in (int, float) and not isinstance(value, bool) else value
