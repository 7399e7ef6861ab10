"""Finds the files of the pictures that the cells of a table name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from pathlib import Path
from urllib.request import url2pathname

import pandas as pd
from PIL import Image

from ..errors import InputError

_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # one letter would be a drive of Windows
_FILE = re.compile(r"file://(?:localhost(?=/))?", re.IGNORECASE)


def find_pictures(
    cells: pd.DataFrame, root: Path, where: Callable[[int], str] = lambda row: f"row {row + 1}"
) -> list[tuple[Path | None, ...]]:
    r"""Finds the files of the pictures that the rows of a table name.

    A cell that as a whole is the name of a file is that file. Another cell may be a list of names in JSON or Python, or
    names between `|` or `;`. Names between commas or blanks are several names where each of them is found.

    A relative name starts at `root`. `~` is the home folder. `file://` is understood. `\` separates folders, unless a
    file has `\` in its name. A name without the extension of a picture is looked up in its folder. A name with an
    extension in other letters (`1.JPG` for `1.jpg`) is looked up there too. Each folder is listed once.

    The tuple of a row depends on that row alone, so that a part of a table gives the same tuples. A blank cell of a
    single column gives nothing. A blank cell among several columns gives None, so that later columns keep their places.

    Args:
        cells: The columns of pictures as text, N rows; a blank cell is "".
        root: The folder where relative names start.
        where: Names the row at a position for an error message, as in `pets.csv, line 7`.

    Returns:
        The paths of each row, in the order of the columns: an empty tuple where all cells are blank. A name that is not
        found is kept as it is written.

    Raises:
        InputError: A name may be several files, or is the address of a page.
    """
    folders = _Folders(root)
    found = []
    for row, texts in enumerate(zip(*(column.tolist() for _, column in cells.items()), strict=True)):
        paths: list[Path | None] = []
        for column, text in zip(cells.columns, texts, strict=True):
            try:
                paths += folders.pictures(text.strip()) or ([None] if len(texts) > 1 else [])
            except ValueError as error:
                raise InputError(f"{where(row)}: column {column!r} names {error}") from error
        found.append(tuple(paths) if any(paths) else ())
    return found


class _Folders:
    """Finds files below a folder by the names that people write. Each folder is listed once.

    Args:
        root: Where relative names start.
    """

    def __init__(self, root: Path) -> None:
        self.folder = str(root)
        extensions = Image.registered_extensions()  # with formats that Pillow only writes
        self.extensions = {extension for extension, kind in extensions.items() if kind in Image.OPEN}
        self.listed = cache(self._list)

    def pictures(self, cell: str) -> list[Path]:
        """The files of one cell.

        Raises:
            ValueError: A name may be several files, or is the address of a page.
        """
        if not cell:
            return []
        if whole := self.find(cell):
            return [whole]
        names = _listed_names(cell)
        if names is None and ("|" in cell or ";" in cell):
            names = cell.replace(";", "|").split("|")
        if names is not None:
            return [self.find(name) or self.path(name) for name in map(str.strip, names) if name]
        for names in (cell.split(","), cell.split()):
            names = [name for name in map(str.strip, names) if name]
            if names in ([], [cell]):
                continue
            paths = [path for path in takewhile(bool, map(self.find, names)) if path]
            if len(paths) == len(names):
                return paths
        return [self.path(cell)]

    def find(self, name: str) -> Path | None:
        """The file that a name stands for, if there is one."""
        written = os.path.join(self.folder, name)
        if os.path.isfile(written):  # False as well for names that no file can have
            return Path(written)
        if _ADDRESS.match(name):
            raise ValueError(f"{name!r}, which is an address; download the picture and name its file")
        plain = _plain(name)
        spellings = dict.fromkeys([name, plain, plain.replace("\\", "/")])
        paths = [os.path.join(self.folder, spelling) for spelling in spellings]
        for path in paths[1:]:
            if os.path.isfile(path):
                return Path(path)
        for path in paths:
            folder, file = os.path.split(path)
            stem, extension = os.path.splitext(file)
            if extension.lower() in self.extensions:
                names = [
                    other for other in self.listed(folder).get(stem, []) if other.lower().endswith(extension.lower())
                ]
            else:
                names = self.listed(folder).get(file, [])
            if len(names) > 1:
                raise ValueError(f"{name!r}, which may be {' or '.join(sorted(names))} in {folder}; write one of them")
            if names:
                return Path(folder, names[0])
        return None

    def path(self, name: str) -> Path:
        """The path of a name as it is written."""
        return Path(self.folder, _plain(name))

    def _list(self, folder: str) -> dict[str, list[str]]:
        """The names of a folder's pictures, by the part before the extension."""
        names: dict[str, list[str]] = {}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    stem, extension = os.path.splitext(entry.name)
                    if extension.lower() in self.extensions and entry.is_file():
                        names.setdefault(stem, []).append(entry.name)
        except (OSError, ValueError):  # no such folder, or a name that none can have
            pass
        return names


def _plain(name: str) -> str:
    """A name without `file://` and `~`."""
    if address := _FILE.match(name):
        name = url2pathname(name[address.end() :])
    return os.path.expanduser("~") + name[1:] if name.startswith(("~/", "~\\")) else name


def _listed_names(cell: str) -> list[str] | None:
    """The names of a list in JSON or Python; None for a cell that is not a list."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    try:
        return [str(name) for name in json.loads(cell) if name is not None]
    except (ValueError, RecursionError):
        # Not Python's own parser: it takes the "\1" of a Windows path for a letter and joins the names of an array.
        return [first or second for first, second in re.findall(r"'([^']*)'|\"([^\"]*)\"", cell)] or None
