"""The data sets, one file each; a file is imported when its data set is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..registry import Registry
from .pages import PAGES
from .samples import Samples

DATASETS: Registry[Callable[..., Samples]] = Registry(
    "data set",
    __name__,
    {
        "digits": "digits:digits",
        "leaves100": "leaves100:leaves100",
        "houses": "houses:houses",
        "fashion": "fashion:fashion",
        "csv": "csv:csv",
        "dvm": "dvm:dvm",
        "celeba": "celeba:celeba",
        "sun": "sun:sun",
    },
)

__all__ = ["DATASETS", "Samples", "load"]


def load(name: str, data_root: Path | str | None = None, **options: Any) -> Samples:
    """Reads a data set.

    Args:
        name: A key of `DATASETS`.
        data_root: The folder that holds one folder a set: `leaves100`, `houses`, `fashion` or `fashion_small`.
        options: Arguments of the reader; those that are None or empty text count as not given.

    Raises:
        InputError: An unknown set or option, a missing option or folder, or what the reader finds.
    """
    DATASETS.check(name)
    reader = DATASETS[name]
    arguments = {option: value for option, value in options.items() if value not in (None, "")}
    parameters = inspect.signature(reader).parameters
    if "task" not in parameters and arguments.pop("task", "classification") != "classification":
        raise InputError(f"the data set {name} is for classification; leave --task out")
    for option in arguments:
        if option not in parameters:
            raise InputError(f"the data set {name} has no option {option!r}; leave it out")
    if "root" in parameters:
        arguments["root"] = _folder(name, data_root)
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in arguments:
            raise InputError(f"the data set {name} needs the option {option!r}")
    return reader(**arguments)


def _folder(name: str, data_root: Path | str | None) -> Path:
    if data_root is None:
        raise InputError(f"the data set {name} is read from disk; give --data_root, the folder that holds {name}/")
    for folder in (Path(data_root) / name, Path(data_root) / f"{name}_small"):
        if folder.is_dir():
            return folder
    if name in PAGES:
        return Path(data_root) / name  # its reader says how to prepare it
    raise InputError(f"{Path(data_root) / name} does not exist; --data_root must be the folder that holds {name}/")
