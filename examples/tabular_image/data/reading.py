"""Reads the file of a table: the text of each cell, and the line where each row stands."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
from charset_normalizer import from_bytes

from ..errors import InputError, border

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}
_EXCEL = (".xlsx", ".xlsm", ".xls", ".xlsb", ".ods")
_PARQUET = (".parquet", ".pq")
_COMPRESSED = {
    "gzip": (b"\x1f\x8b", ".gz", gzip.decompress),
    "bzip2": (b"BZh", ".bz2", bz2.decompress),
    "xz": (b"\xfd7zXZ", ".xz", lzma.decompress),
    "zip": (b"PK\x03\x04", ".zip", lambda content: _only_member(content)),
}
# Encodings still in use in which most bytes of a text are above 127.
_FOREIGN = ["cp1251", "cp1253", "cp1255", "cp1256", "shift_jis", "gb18030", "big5", "euc_kr"]
_SAMPLE = 200  # records that are looked at to find the separator


@dataclass(frozen=True)
class Table:
    """The rows of a file as they are written.

    Attributes:
        frame: N rows of text, without blanks at the ends of a cell; an empty cell is "".
        places: Where each row stands in the file, (N,), named "line" or "row".
        separator: The sign between the cells; "" where the file has none.
        how: How the file was read, in words.
    """

    frame: pd.DataFrame
    places: pd.Series
    separator: str
    how: str


def read_table(path: Path, separator: str = "", encoding: str = "") -> Table:
    """Reads a text table (CSV and its kin, also compressed), an Excel sheet or a Parquet file.

    The separator of a text table is the sign that cuts most records into as many cells as the header. The encoding is
    the first that fits of UTF-8 or UTF-16, the finding of charset-normalizer where most letters are foreign, and
    Windows-1252. Rows without any value are left out. Empty cells beyond the last column of the header are dropped. A
    first column that the header lacks, as in files of R's `write.table`, is called "row name".

    Args:
        path: The file, with a header in its first line.
        separator: The sign between cells; detected where left out.
        encoding: The encoding by its Python name; detected where left out.

    Raises:
        InputError: The file cannot be read; a record has more cells or fewer than the header; a name stands twice in
            the header; or there are no rows.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; give the path of a table with a header")
    suffix = path.suffix.lower()
    if suffix in _EXCEL or suffix in _PARQUET:
        records, what, separator = _typed(path, suffix), "Parquet" if suffix in _PARQUET else "first sheet", ""
        first, name = (0, "row") if suffix in _PARQUET else (1, "line")
        placed = [(first + place, record) for place, record in enumerate(records)]
    else:
        text, encoding = _decoded(path, _content(path), encoding)
        if text.lower().startswith("sep="):  # Excel writes and reads such a line
            separator, text = separator or text[4:5], "\n" + text.partition("\n")[2]
        separator = separator or _separator(text)
        placed, name = list(_records(path, text, separator)), "line"
        what = f"{encoding}, separated by {SEPARATORS.get(separator, repr(separator))}"
    if not placed:
        raise InputError(f"{path} is empty; give a table with a header")
    (line, header), *rows = placed
    filled = [(place, record) for place, record in rows if any(record)]
    if not filled:
        raise InputError(f"{path} has a header but no rows; add one row for each sample")
    blank = len(rows) - len(filled)
    columns, cells = _rectangle(path, name, line, header, filled)
    return Table(
        frame=pd.DataFrame(cells, columns=pd.Index(columns, dtype=object), dtype=str),
        places=pd.Series([place for place, _ in filled], name=name),
        separator=separator,
        how=what + (f"; {blank} rows without a value are left out" if blank else ""),
    )


def _content(path: Path) -> bytes:
    """The file's bytes, decompressed where the first bytes are of a compressed file."""
    with border("read", path, "check the permissions of the file and the disk"):
        content = path.read_bytes()
    for kind, (start, suffix, decompress) in _COMPRESSED.items():
        if content.startswith(start):
            with border(f"decompress the {kind} file", path, "copy or download the file again"):
                return decompress(content)
        if path.suffix.lower() == suffix:
            raise InputError(
                f"{path} is not a {kind} file, although its name ends in {suffix}; rename the file or compress it again"
            )
    return content


def _only_member(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise zipfile.BadZipFile(f"the archive holds {len(members)} files instead of one")
        return archive.read(members[0])


def _decoded(path: Path, content: bytes, encoding: str) -> tuple[str, str]:
    """The text without a byte order mark, and its encoding."""
    start = content[:65_536]
    foreign = sum(byte > 127 for byte in start) > 0.7 * sum(chr(byte).isalpha() for byte in start if byte < 128)
    guess = from_bytes(start, cp_isolation=_FOREIGN).best() if foreign else None
    marked = "utf-32" if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) else "utf-16"
    tried = (
        [encoding]
        if encoding
        else [marked]
        if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
        else ["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]
        if b"\0" in content[:2]
        else ["utf-8-sig", *([guess.encoding] if guess else []), "cp1252"]
    )
    for name in tried:
        try:
            text = content.decode(name)
        except (UnicodeError, LookupError) as error:
            reason = error
            continue
        if "\0" in text:
            raise InputError(f"{path} is not text (it holds zero bytes); save the table as CSV, Excel or Parquet")
        return text, {"utf-8-sig": "UTF-8", "cp1252": "Windows-1252"}.get(name, name)
    raise InputError(f"{path} cannot be decoded ({reason}); save the table as UTF-8 or give the --encoding of the file")


def _separator(text: str) -> str:
    """The sign that cuts most of the first records into as many cells as the header, and into most cells."""

    def fit(separator: str) -> tuple[float, int]:
        records = [record for record in islice(_reader(text, separator), _SAMPLE) if record]
        width = len(records[0]) if records else 0
        # One cell more than the header: a separator at the end of the line, or R's row names.
        regular = sum(len(record) - width in (0, 1) for record in records)
        return (regular / len(records), width) if width > 1 else (0.0, 0)

    return max(SEPARATORS, key=fit)


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)


def _records(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with its first line."""
    reader = _reader(text, separator)
    start = end = 0
    for record in reader:
        start, end = end + 1, reader.line_num
        if record:
            yield start, [cell.strip() for cell in record]
    if end > start and _is_open(text, start, separator):
        raise InputError(f"{path}, line {start}: a quotation mark is never closed; close or double the mark")


def _is_open(text: str, line: int, separator: str) -> bool:
    """Whether a quoted cell that begins in the last record, on this line, has no end."""
    rest = islice(io.StringIO(text, newline=""), line - 1, None)
    try:
        list(csv.reader(rest, delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _typed(path: Path, suffix: str) -> list[list[str]]:
    """Header and rows of an Excel or Parquet file, as text."""
    with border("read", path, "save the table again, or as CSV"):
        try:
            if suffix in _PARQUET:
                frame = pd.read_parquet(path)
                header = pd.DataFrame([list(frame.columns)], columns=frame.columns, dtype=object)
                frame = pd.concat([header, frame.astype(object)])
            else:
                frame = pd.read_excel(path, header=None, dtype=object, keep_default_na=False)
        except ImportError as error:
            package = "pyarrow" if suffix in _PARQUET else "openpyxl"
            raise InputError(f"another package is needed to read {path} ({error}); pip install {package}") from error
    return [[as_text(cell) for cell in row] for row in frame.itertuples(index=False)]


def as_text(value: object) -> str:
    """A cell as people would write it."""
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
        return str(list(value))  # type: ignore[call-overload]
    if value is None or pd.isna(value):  # type: ignore[call-overload]
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # integers with gaps are stored as floats
    return str(value).strip()


def _rectangle(
    path: Path, name: str, line: int, header: list[str], rows: Sequence[tuple[int, list[str]]]
) -> tuple[list[str], list[list[str]]]:
    """Column names, and cells under each of them."""
    width, longest = len(header), max(len(record) for _, record in rows)
    while not header[width - 1] and all(not any(record[width - 1 :]) for _, record in rows) and width > 1:
        width -= 1
    if all(len(record) == width + 1 for _, record in rows) and any(record[-1] for _, record in rows):
        header, width = ["row name", *header], width + 1
    columns = [column or f"column {place}" for place, column in enumerate(header[:width], start=1)]
    for place, column in enumerate(columns):
        if column in columns[:place]:
            raise InputError(
                f"{path}, {name} {line}: columns {columns.index(column) + 1} and {place + 1} are both called "
                f"{column!r}; give one of them another name"
            )
    for place, record in rows if longest > width or any(len(record) < width for _, record in rows) else ():
        if len(record) < width or any(record[width:]):
            raise InputError(
                f"{path}, {name} {place}: the row has {len(record)} cells and the header has {width}; quote cells "
                "that hold the separator, and fill in missing cells"
            )
    return columns, [record[:width] for _, record in rows]
