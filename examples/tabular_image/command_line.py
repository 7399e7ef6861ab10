"""The command line of train.py: options in, and out to the `config.yaml` that repeats a run."""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from .commands import CommandLine, filled
from .data import DATASETS
from .encoders import check_image_encoder, check_table_encoder
from .errors import InputError, border
from .files import writing
from .methods import METHODS, SETTINGS
from .options import GROUPS, LOGGERS, Options
from .processes import is_first, say, started_together
from .registry import Registry, unknown
from .wording import Option

_FOLDER = "TABULAR_IMAGE_RUN"  # environment: where the first process tells those that Lightning launches the run folder
_OWN = (
    Option("config", Path, None, "YAML file of options, such as the config.yaml of a run."),
    Option("print_config", None, None, "Print all options as YAML, and start nothing."),
)
_RESTORE = "restore it, or start a new run with another --out"


def as_written(arguments: Sequence[str]) -> Options:
    """Options from the command line and its files, and nothing else.

    Raises:
        InputError: A file or an option cannot be used, or there is no such method or data set.
    """
    return _options(_parse(_line(), arguments))


def parse(arguments: Sequence[str]) -> Options:
    """Options of the run that a command line asks for: in a run folder, and its own where it is resumed.

    Raises:
        InputError: There is no such method or data set, or the options are not those of the run to resume.
    """
    options = _in_folder(as_written(arguments))
    stored = options.folder / "config.yaml"
    if not (options.resume and stored.is_file()):
        return options
    before = _options(_line().parse_file(str(stored), _RESTORE))
    resumed = replace(as_written(["--config", str(stored), *arguments]), out=options.out)
    old, new = before.configuration(), resumed.configuration()
    for name in old.keys() | new.keys():
        if old.get(name) != new.get(name):
            raise InputError(
                f"the run in {options.folder} was started with --{name} {old.get(name)} and cannot be resumed with "
                f"{new.get(name)}; leave the option out, or choose another --out"
            )
    return resumed


def save(options: Options, path: Path, command: str | None = None) -> None:
    """Writes the options as a file for `--config`; a folder that nobody chose is not among them.

    Args:
        options: of the run.
        path: of the file.
        command: the command line that started the run; a comment at the top.

    Raises:
        InputError: The file cannot be written.
    """
    stored = Namespace({name: value for name, value in vars(options).items() if name != "settings"})
    stored.resume = False
    if re.fullmatch(rf"{re.escape(str(replace(options, out=None).folder))}(-\d+)?", str(options.out)):
        stored.out = None
    if vars(options.settings):
        stored[options.method] = Namespace(vars(options.settings))
    comment = f"# {' '.join(command.splitlines())}\n" if command else ""
    with writing(path, "start again") as temporary:
        temporary.write_text(comment + _line().parser.dump(stored), encoding="utf-8")


def started_by(path: Path) -> str | None:
    """The command line that started the run of a `config.yaml`; None where there is no such file or comment."""
    if not path.is_file():
        return None
    with border("read", path, _RESTORE):
        first, *_ = path.read_text(encoding="utf-8").splitlines() or [""]
    return first.removeprefix("# ") if first.startswith("# ") else None


def _parse(line: CommandLine, arguments: Sequence[str]) -> Namespace:
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[], nargs="?")
    given = files.parse_known_args(line.spelled(arguments))[0].config
    for file in filter(None, given):  # by themselves, so that a mistake is placed
        line.parse_file(file, "give a YAML file of options, such as the config.yaml of a run")
    return line.parse(arguments)


def _in_folder(options: Options) -> Options:
    """The options with the run folder decided where the command line leaves it open.

    A new run goes into FOLDER, or into the next of FOLDER-2, FOLDER-3, ... where there are runs; a resumed one is the
    last of them. Processes that torchrun or SLURM starts agree on FOLDER: what one of them finds free may be taken when
    the next one looks.
    """
    if options.out is not None:
        return options
    folder = options.folder
    if not is_first() and not started_together() and _FOLDER in os.environ:
        return replace(options, out=os.environ[_FOLDER])
    with border("look for runs beside", folder, "give --out"):
        numbers = [1] if _holds_something(folder) else []
        for path in folder.parent.glob(f"{glob.escape(folder.name)}-*"):
            number = path.name.removeprefix(f"{folder.name}-")
            if re.fullmatch(r"[2-9]|[1-9]\d+", number) and _holds_something(path):
                numbers.append(int(number))
    number = max(numbers, default=1)
    if not options.resume:
        number = 1 if started_together() or not numbers else number + 1
    chosen = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
    if number > 1 and not options.resume:
        say(f"{folder} holds a run already; this one goes to {chosen}")
    if options.devices > 1:
        os.environ[_FOLDER] = str(chosen)
    return replace(options, out=str(chosen))


def _holds_something(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _line() -> CommandLine:
    line = CommandLine(
        str(Path(__file__).with_name("train.py")),
        "Train and test a model of an image and a table row. More: --help OPTION, and --help METHOD for a method "
        "and its own options, such as --gaal.margin.",
        [
            "",
            "--dataset csv --path pets.csv --image_column photo --target_column kind",
            "--dataset leaves100 --method gaal_joint --fusion calibrated",
        ],
        short={"lr": "learning_rate"},
    )
    line.parser.add_argument("--config", action="config")
    line.add(Options, skip={"settings"})
    group: list[str] = []
    starts = {first: heading for heading, first in GROUPS.items()}
    for name in line.options:
        if name in starts:
            group = line.groups[starts[name]] = []
        group.append(name)
    for option in _OWN:
        line.options[option.name] = option
        group.append(option.name)
    line.groups["Data"].insert(1, ", ".join(DATASETS))
    line.groups["Model"].insert(1, ", ".join(METHODS))
    for option, registry in (("dataset", DATASETS), ("method", METHODS)):
        line.topics[option] = partial(_headlines, registry)
    for name in DATASETS:
        own = [option.name for option in line.options.values() if f"{name}: " in option.text]
        line.topics[name] = partial(_about, line, "dataset", DATASETS, name, own)
    for name, settings in SETTINGS.items():
        if fields(settings):
            line.add(settings, name)
        own = [f"{name}.{field.name}" for field in fields(settings)]
        line.topics[name] = partial(_about, line, "method", METHODS, name, own)
    return line


def _headlines(registry: Registry[Any, Any]) -> str:
    """What a registry has, a sentence each."""
    return "\n".join(filled(f"{name}: {_headline(registry, name)}", "", "    ") for name in registry)


def _about(line: CommandLine, option: str, registry: Registry[Any, Any], name: str, own: Sequence[str]) -> str:
    """A method or a data set, and the options that it alone has."""
    head = filled(f"--{option} {name}: {_headline(registry, name)}")
    return "\n\n".join([head, *(map(line.paragraph, own) if own else ["There are no options for it alone."])])


def _headline(registry: Registry[Any, Any], name: str) -> str:
    return f"{registry.title(name)}. {registry.summary(name)[:1].upper()}{registry.summary(name)[1:]}."


def _options(namespace: Namespace) -> Options:
    name = namespace.method
    METHODS.check(name)
    DATASETS.check(namespace.dataset)
    check_image_encoder(namespace.image_encoder)
    check_table_encoder(namespace.table_encoder)
    common = {field.name: _builtin(namespace[field.name]) for field in fields(Options) if field.name != "settings"}
    own = fields(SETTINGS[name])
    settings = {field.name: _builtin(namespace[f"{name}.{field.name}"]) for field in own}
    options = Options(**common, settings=SETTINGS[name](**settings))
    for logger in options.loggers:
        if logger not in LOGGERS:
            raise unknown("logger", logger, LOGGERS)
        if logger != "csv" and find_spec(logger) is None:
            raise InputError(f"--logger {logger} needs the package {logger}; pip install {logger}")
    return replace(options, devices=int(os.environ.get("LOCAL_WORLD_SIZE", options.devices)))


def _builtin(value: Any) -> Any:
    """A restricted number of jsonargparse as int or float: optimizers keep it, and checkpoints admit only builtins."""
    base = type(value).__base__
    return base(value) if base in (int, float) and not isinstance(value, bool) else value
