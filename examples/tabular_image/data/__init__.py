"""The data sets, one file each; a file is imported when its data set is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import registry
from ..errors import InputError
from .samples import Samples

Origin = Literal["bundled", "as published", "your own", "prepared"]


@dataclass(frozen=True)
class Entry(registry.Entry):
    """The registration of a data set.

    Attributes:
        origin: where the files come from: a package holds the files, the publisher offers them in the layout that is
            read, they are yours, or `prepare.py` makes them from published archives.
        size: rows and classes.
        page: the publisher's page.
    """

    origin: Origin
    size: str
    page: str = ""


DATASETS: registry.Registry[Callable[..., Samples], Entry] = registry.Registry(
    "data set",
    __name__,
    {
        "digits": Entry("digits:digits", "bundled", "1,797 rows, 10 classes"),
        "leaves100": Entry("leaves100:leaves100", "as published", "1,584 or 1,600 rows, 99 or 100 classes"),
        "houses": Entry("houses:houses", "as published", "535 rows, 4 price quartiles"),
        "fashion": Entry("fashion:fashion", "as published", "9,082 rows, 30 classes"),
        "csv": Entry("csv:csv", "your own", "yours"),
        "dvm": Entry("dvm:dvm", "prepared", "176,414 rows, 286 classes", "https://deepvisualmarketing.github.io/"),
        "celeba": Entry(
            "celeba:celeba",
            "prepared",
            "202,599 rows, attractive or not",
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        ),
        "sun": Entry(
            "sun:sun",
            "prepared",
            "14,340 rows, open area or not",
            "https://cs.brown.edu/~gmpatter/sunattributes.html",
        ),
    },
)
PAGES = {name: entry.page for name, entry in DATASETS.entries.items() if entry.page}

__all__ = ["DATASETS", "PAGES", "Entry", "Samples", "load"]


def load(name: str, data_root: Path | str | None = None, **options: Any) -> Samples:
    """Reads a data set.

    Args:
        name: A key of `DATASETS`.
        data_root: The folder that holds a folder NAME or NAME_small for each set, such as `houses` or `fashion_small`.
        options: Arguments of the reader. None and empty text count as left out.

    Raises:
        InputError: The set or an option is unknown, an option or the folder is missing, or the reader finds an error.
    """
    DATASETS.check(name)
    reader = DATASETS[name]
    arguments = {option: value for option, value in options.items() if value not in (None, "")}
    parameters = inspect.signature(reader).parameters
    if "task" not in parameters and arguments.pop("task", "classification") != "classification":
        raise InputError(f"the data set {name} is for classification; leave --task out")
    for option in arguments:
        if option not in parameters:
            raise InputError(f"the data set {name} has no option {option!r}; leave this option out")
    if "root" in parameters:
        arguments["root"] = _folder(name, data_root)
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in arguments:
            raise InputError(f"the data set {name} needs the option {option!r}; give --{option}")
    return reader(**arguments)


def _folder(name: str, data_root: Path | str | None) -> Path:
    if data_root is None:
        raise InputError(f"the data set {name} is read from disk; give --data_root, the folder that holds {name}/")
    for folder in (Path(data_root) / name, Path(data_root) / f"{name}_small"):
        if folder.is_dir():
            return folder
    if DATASETS.entries[name].origin == "prepared":
        return Path(data_root) / name  # its reader says how to prepare it
    raise InputError(f"{Path(data_root) / name} does not exist; --data_root must be the folder that holds {name}/")
