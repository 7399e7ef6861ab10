"""Anyone's own data: a CSV with a column of image paths."""

from __future__ import annotations

import difflib
from pathlib import Path

import pandas as pd

from ..errors import InputError
from .samples import Samples


def csv(
    path: Path | str,
    image_column: str,
    target_column: str,
    numeric: list[str] | None = None,
    categorical: list[str] | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    image_root: Path | str | None = None,
) -> Samples:
    """Reads a CSV with a header, one row a sample.

    A list of columns that is given is taken as it is; one that is left out is inferred from the columns nobody named,
    and `note` says which column was taken as what. Numbers count as numeric, all other columns as categorical. Columns
    that are empty, constant, a running number, or text with a different value in most rows are left out.

    Args:
        path: The CSV file.
        image_column: Paths of the images, absolute or below `image_root`.
        target_column: The class of each row, taken as text.
        numeric: Numeric columns.
        categorical: Categorical columns.
        split_column: "train", "val" or "test" for each row.
        group_column: Rows with the same value stay in one split (a patient, a product).
        image_root: Where relative paths start; by default the folder of the CSV.

    Raises:
        InputError: The file is missing or no CSV, a named column is unknown or named twice, a row has no target or no
            image, or image paths do not resolve.
    """
    path = Path(path)
    frame = _read(path)
    special = {
        "image_column": image_column,
        "target_column": target_column,
        "split_column": split_column,
        "group_column": group_column,
    }
    single = [(option, column) for option, column in special.items() if column is not None]
    named = (
        single
        + [("numeric", column) for column in numeric or []]
        + [("categorical", column) for column in categorical or []]
    )
    taken: dict[str, str] = {}
    for option, column in named:
        if column not in frame.columns:
            near = difflib.get_close_matches(column, frame.columns, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"{path} has no column {column!r} (given as {option}): {hint}Its columns are {', '.join(frame.columns)}"
            )
        if column in taken:
            raise InputError(f"column {column!r} is given as {taken[column]} and as {option}; name it once")
        taken[column] = option

    literal = pd.read_csv(path, dtype=str, keep_default_na=False)  # class "NA" or "01" stays as written
    for option, column in single:
        blank = literal[column].str.strip() == ""
        if blank.any():
            raise InputError(
                f"{path}, line {blank.to_numpy().argmax() + 2}: column {column!r} ({option}) is empty, "
                f"as in {blank.sum()} of {len(blank)} rows; fill it in or remove these rows"
            )

    root = path.parent if image_root is None else Path(image_root)
    images = [root / picture.strip() for picture in literal[image_column]]
    _check_paths(path, images, image_column, root)

    free = [column for column in frame.columns if column not in taken]
    left_out = {column: reason for column in free if (reason := _useless(frame[column]))}
    free = [column for column in free if column not in left_out]
    numbers = [column for column in free if _is_number(frame[column])]
    inferred = {"numeric": numeric is None, "categorical": categorical is None}
    if numeric is None:
        numeric = numbers
    if categorical is None:
        categorical = [column for column in free if column not in numbers]
    left_out |= dict.fromkeys((column for column in free if column not in [*numeric, *categorical]), "not named")

    note = "\n".join(
        [
            f"columns of {path.name}:",
            f"  image        {image_column}",
            f"  target       {target_column} ({literal[target_column].nunique()} classes)",
            f"  numeric      {', '.join(numeric) or '-'}{' (inferred)' if inferred['numeric'] else ''}",
            f"  categorical  {', '.join(categorical) or '-'}{' (inferred)' if inferred['categorical'] else ''}",
            *([f"  split        {split_column}"] if split_column else []),
            *([f"  group        {group_column}"] if group_column else []),
            f"  left out     {', '.join(f'{column} ({reason})' for column, reason in left_out.items()) or '-'}",
        ]
    )
    return Samples(
        name=path.name,
        images=[(picture,) for picture in images],
        table=frame[[*numeric, *categorical]],
        numeric=numeric,
        categorical=categorical,
        target=literal[target_column].str.strip(),
        ids=pd.Series(frame.index + 2, name="line"),
        split=literal[split_column] if split_column else None,
        groups=literal[group_column] if group_column else None,
        note=note,
    )


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a CSV file with a header")
    try:
        frame = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as CSV ({str(error).strip()}); save it as comma-separated UTF-8"
        ) from error
    if frame.empty:
        raise InputError(f"{path} has a header but no rows; add one row a sample")
    return frame


def _check_paths(path: Path, images: list[Path], column: str, root: Path) -> None:
    """Refuses a path column that points nowhere; single missing files are for the data module, which may skip them."""
    missing = [line for line, image in enumerate(images, start=2) if not image.is_file()]
    if len(missing) > len(images) / 2:
        raise InputError(
            f"{path}, line {missing[0]}: {images[missing[0] - 2]} (column {column!r}) does not exist, nor do "
            f"{len(missing)} of {len(images)} images; "
            f"correct the column, or give image_root, the folder where relative paths start (now {root})"
        )


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _useless(column: pd.Series) -> str:
    """Why a column nobody named is left out; empty where it is used."""
    if column.isna().all():
        return "empty"
    if column.nunique(dropna=False) == 1:
        return "constant"
    if _is_number(column):
        return (
            "a running number" if pd.api.types.is_integer_dtype(column) and (column.diff().iloc[1:] == 1).all() else ""
        )
    return "a different text in most rows" if column.nunique() > len(column) / 2 else ""
