"""Your own data: a table with columns of image paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ..errors import InputError
from .columns import NO_VALUE, Column, category, infer, numbers
from .picture_files import find_pictures
from .reading import Table, read_table
from .samples import Samples
from .targets import read_target

Names = str | list[str]


def csv(
    path: Path | str,
    image_column: Names,
    target_column: Names,
    numeric: Names = "",
    categorical: Names = "",
    split_column: str = "",
    group_column: str = "",
    image_root: Path | str | None = None,
    separator: str = "",
    encoding: str = "",
    task: str = "",
) -> Samples:
    """Reads a table with a header and one row for each sample: CSV and its kin, Excel or Parquet; see `read_table`.

    A given list of columns is used as given. A list that is left out is inferred from the columns that no option names,
    see `infer`. The `note` of the result says how each column is used, and why.

    Args:
        path: The file.
        image_column: Paths of the images, absolute or below `image_root`; several columns, or several paths in a cell,
            make a mosaic. See `find_pictures`.
        target_column: What is predicted: one column, or several for labels. See `read_target`.
        numeric: Numeric columns.
        categorical: Categorical columns.
        split_column: "train", "val" or "test" for each row.
        group_column: Rows with the same value stay in one split (a patient, a product).
        image_root: Where relative paths start; by default the folder of the table.
        separator: The sign between the cells of a text file; detected where left out.
        encoding: The encoding of a text file; detected where left out.
        task: "classification", "multilabel" or "regression"; inferred from the target where left out.

    Raises:
        InputError: The file is missing or is not a table, a named column is unknown or named twice, a row has no
            target, a numeric column holds text, or no image exists.
    """
    path = Path(path)
    table = read_table(path, separator, encoding)
    frame = table.frame
    named = _named(
        path,
        frame.columns,
        image_column=image_column,
        target_column=target_column,
        split_column=split_column,
        group_column=group_column,
        numeric=numeric,
        categorical=categorical,
    )
    if not named["target_column"]:
        raise InputError(f"{path}: no target column is named; give --target_column, the column to predict")
    for option in ("split_column", "group_column"):
        for column in named[option]:
            _refuse_blanks(path, table, column, option)
    kind, target, decided = read_target(
        frame[named["target_column"]],
        task,
        table.separator,
        lambda row: f"{path}, {table.places.name} {table.places[row]}",
    )
    if kind != "multilabel":  # a row may have no label
        _refuse_blanks(path, table, named["target_column"][0], "target_column")
    pictures = named["image_column"]
    if (frame[pictures] == "").all(axis=None):
        raise InputError(f"{path}: column {pictures[0]!r} (image_column) is empty; fill in the paths of the images")
    images = find_pictures(
        frame[pictures],
        path.parent if image_root is None else Path(image_root),
        lambda row: f"{path.name}, {table.places.name} {table.places[row]}",
    )
    _check_paths(table, images, pictures, path, image_root)

    split, groups = (frame[named[option][0]] if named[option] else None for option in ("split_column", "group_column"))
    complete = {"number": numeric != "", "date": numeric != "", "category": categorical != ""}
    columns = _columns(path, table, named, frame[named["target_column"]].agg("|".join, axis=1), complete)
    kinds = {kind: [name for name in columns if columns[name].kind == kind] for kind in ("number", "date", "category")}
    values = {name: columns[name].values for names in kinds.values() for name in names}
    return Samples(
        name=path.name,
        images=images,
        table=pd.DataFrame(values, index=frame.index),
        numeric=kinds["number"],
        categorical=kinds["category"],
        dates=kinds["date"],
        target=target,
        ids=table.places,
        split=split,
        groups=groups,
        note=_note(path, table, named, columns, decided),
        task=kind,
        readings={name: columns[name].reading for name in values},
        image_columns=pictures,
    )


def _columns(
    path: Path, table: Table, named: dict[str, list[str]], target: pd.Series, complete: dict[str, bool]
) -> dict[str, Column]:
    """The columns that are named as numeric or categorical, and how the columns that no option names are used.

    A kind whose list was given is `complete`: other columns of that kind are left out.
    """
    used = {column: option for option, columns in named.items() for column in columns}
    columns = {}
    for column in table.frame.columns:
        match used.get(column):
            case "numeric":
                columns[column] = _as_number(path, table, column)
            case "categorical":
                columns[column] = category(table.frame[column])
            case None:
                found = infer(table.frame[column], target, table.separator)
                columns[column] = Column("left out", "not named", found.values) if complete.get(found.kind) else found
    return columns


def _named(path: Path, columns: pd.Index, **options: Names) -> dict[str, list[str]]:
    """The columns that each option names.

    Raises:
        InputError: There is no such column, or two options name it.
    """
    named = {option: _names(given, columns) for option, given in options.items()}
    taken: dict[str, str] = {}
    for option, names in named.items():
        for column in names:
            if column not in columns:
                near = difflib.get_close_matches(column, columns, n=1)
                hint = f"did you mean {near[0]!r}? All: " if near else "choose one of "
                raise InputError(f"{path} has no column {column!r} (given as {option}); {hint}{', '.join(columns)}")
            if column in taken:
                raise InputError(
                    f"{path}: column {column!r} is given as {taken[column]} and as {option}; name the column once"
                )
            taken[column] = option
    return named


def _names(given: Names, columns: Iterable[str]) -> list[str]:
    """Names from an option: one name, or several as `[a, b]` or `a, b`; a name may hold any sign."""
    columns = set(columns)
    if isinstance(given, list):
        names = [str(name).strip() for name in given]
        # YAML takes the names `[x]` and `- x` for lists.
        written = {f"[{', '.join(names)}]", f"- {', '.join(names)}"} & columns
        return [*written] if written and not columns.issuperset(names) else names
    given = given.strip()
    several = given[1:-1] if given.startswith("[") and given.endswith("]") else given
    parts = [part.strip() for part in several.split(",")]
    return [] if not given else parts if given not in columns and columns.issuperset(parts) else [given]


def _refuse_blanks(path: Path, table: Table, column: str, option: str) -> None:
    blank = table.frame[column] == ""
    if blank.any():
        raise InputError(
            f"{path}, {table.places.name} {table.places[blank.idxmax()]}: column {column!r} ({option}) is empty, "
            f"in {blank.sum()} of {len(blank)} rows in all; fill in these cells or remove these rows"
        )


def _check_paths(
    table: Table, images: list[tuple[Path | None, ...]], columns: list[str], path: Path, image_root: Path | str | None
) -> None:
    """Refuses columns of paths if no file exists. Single missing files are left to the data module, which may skip."""
    named = {row: picture for row, pictures in enumerate(images) for picture in pictures if picture is not None}
    if not any(_is_file(picture) for picture in named.values()):
        row, picture = next(iter(named.items()))
        raise InputError(
            f"{path}, {table.places.name} {table.places[row]}: {picture} (column {columns[0]!r}) does not exist, and "
            f"no image of the {len(named)} rows exists; correct the column, or give --image_root, the folder where "
            f"relative paths start (now {path.parent if image_root is None else image_root})"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _as_number(path: Path, table: Table, column: str) -> Column:
    """A column that the user calls numeric.

    Raises:
        InputError: A cell holds text.
    """
    found = numbers(table.frame[column], table.separator, all_of_them=True)
    assert found is not None
    text = {row: cell for row, cell in found.odd.items() if cell.lower() not in NO_VALUE}
    if text:
        row, cell = next(iter(text.items()))
        raise InputError(
            f"{path}, {table.places.name} {table.places[row]}: column {column!r} is numeric but holds {cell!r}; "
            "correct the cell or name the column in --categorical"
        )
    return found


def _note(path: Path, table: Table, named: dict[str, list[str]], columns: dict[str, Column], target: str) -> str:
    """How each column is used, why, and the share of its cells that is missing."""
    kinds = {
        **{"image_column": "image", "target_column": "target", "split_column": "split", "group_column": "group"},
        **{"numeric": "number", "categorical": "category"},
    }
    options = {column: option for option, names in named.items() for column in names}
    lines = [("column", "kind", "why", "missing")]
    for column in table.frame.columns:
        found, option = columns.get(column), options.get(column)
        missing = (table.frame[column] == "") if found is None or found.kind == "left out" else found.values.isna()
        why = [] if option is None else [f"--{option}"]
        if found is not None:
            odd = list(found.odd.items())
            why.append(found.why)
            why += [f"{cell!r} in {table.places.name} {table.places[row]} counts as missing" for row, cell in odd[:2]]
            why += [f"as do {len(odd) - 2} more"] if len(odd) > 2 else []
        elif option == "target_column":
            why.append(target)
        kind = found.kind if found is not None else kinds[options[column]]
        lines.append((column, kind, "; ".join(why), f"{missing.mean():.0%}" if missing.any() else "-"))
    widths = [max(len(line[place]) for line in lines) for place in range(2)]
    text = [f"  {name:{widths[0]}}  {kind:{widths[1]}}  {missing:>7}  {why}" for name, kind, why, missing in lines]
    return "\n".join([f"columns of {path.name} ({table.how}):", *text])
