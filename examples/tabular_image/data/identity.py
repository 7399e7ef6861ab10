"""Digests of the data of a run: they depend on the content of rows and pictures, and not on the place of the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from .samples import Samples

WHOLE = 65_536  # bytes; of a longer file three parts are read, each a third of this: at the start, middle and end
_PART = 256  # rows that a thread reads in one go
_NONE = "0" * 16  # the fingerprint of what cannot be read
_ABSENT = b"\xff" * 8  # stands for a picture that a row lacks, as no file has this length


@dataclass(frozen=True)
class Identity:
    """Digests of a data set: equal for equal rows, columns and pictures in the same order, wherever the files lie.

    Attributes:
        rows: N.
        columns: Digest of each column by name, in order. Target, split and groups are columns too.
        classes: Rows of each class; empty where the target is a number.
        pictures: The fingerprints of the rows' pictures, 16 hexadecimal digits each, in order.
        unordered: Digest of the rows in any order.
    """

    rows: int
    columns: dict[str, str]
    classes: dict[str, int]
    pictures: str
    unordered: str

    @cached_property
    def digest(self) -> str:
        """One digest of all, 16 hexadecimal digits."""
        return _digest(json.dumps([self.rows, list(self.columns.items()), self.pictures]).encode())

    def as_json(self) -> str:
        """The digests as text."""
        return json.dumps({"digest": self.digest} | asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Identity:
        """The digests that `as_json` wrote.

        Raises:
            ValueError: The text is not from `as_json`.
        """
        try:
            stored = json.loads(text)
            del stored["digest"]
            return cls(**stored)
        except (TypeError, KeyError) as error:
            raise ValueError(f"it does not hold the identity of a data set: {error}") from error

    def without_picture(self, row: int) -> Identity:
        """This identity with the pictures of a row marked as unreadable."""
        return replace(self, pictures=self.pictures[: 16 * row] + _NONE + self.pictures[16 * (row + 1) :])

    def difference(self, now: Identity, *, repaired: bool = False) -> str:
        """What is different in `now`, in words; empty where nothing is different.

        Args:
            now: The identity to compare with.
            repaired: Allow pictures that could not be read to have changed.
        """
        if self.digest == now.digest:
            return ""
        if list(self.columns) != list(now.columns):
            return _exchanged("columns", self.columns, now.columns) or "the columns are in another order"
        if self.rows != now.rows:
            return f"there were {self.rows} rows and now there are {now.rows}"
        if self.unordered == now.unordered:
            return "the rows are in another order"
        if self.classes.keys() != now.classes.keys():
            return _exchanged("classes", self.classes, now.classes)
        changed = [repr(name) for name in self.columns if self.columns[name] != now.columns[name]]
        if changed:
            return f"column {', '.join(changed)} has other values"
        pairs = zip(_fingerprints(self.pictures), _fingerprints(now.pictures), strict=True)
        others = [row for row, (old, new) in enumerate(pairs) if old != new and not (repaired and old == _NONE)]
        if not others:
            return ""
        more = f", as have the pictures of {len(others) - 1} more rows" if len(others) > 1 else ""
        return f"the picture of row {others[0] + 1} of {self.rows} has other content{more}"


def identity(samples: Samples) -> Identity:
    """The identity of a data set before any row is skipped. Reads the pictures if they have no fingerprints yet.

    Args:
        samples: The data set.
    """
    samples = fingerprinted(samples)
    assert samples.fingerprints is not None
    special: dict[str, pd.Series | None] = {"the split": samples.split, "the groups": samples.groups}
    if isinstance(samples.target, pd.DataFrame):
        special = {f"the label {name}": samples.target[name] for name in samples.target} | special
    else:
        special = {"the target": samples.target} | special
    columns = {str(name): samples.table[name] for name in samples.table.columns}
    columns |= {name: column for name, column in special.items() if column is not None}
    hashes = {name: _hashes(column) for name, column in columns.items()}
    rows = np.stack([*hashes.values(), samples.fingerprints])
    named = samples.task == "classification" and not samples.quantiles
    classes = samples.target.astype(str).value_counts().sort_index().to_dict() if named else {}
    return Identity(
        rows=len(samples),
        columns={name: _digest(values.tobytes()) for name, values in hashes.items()},
        classes=classes,
        pictures="".join(f"{number:016x}" for number in samples.fingerprints.tolist()),
        unordered=_digest(np.sort(pd.util.hash_array(_joined(rows))).tobytes()),
    )


def fingerprinted(samples: Samples, threads: int = 2) -> Samples:
    """The data set with a fingerprint for each row: a number that changes with the content of the row's pictures.

    The fingerprint comes from the length and the bytes of each file. Of a file above 64 KiB only the first, middle and
    last 21 KiB are read, so that 100,000 pictures take seconds. The fingerprint is 0 where no file of the row can be
    read or no file is named.
    """
    if samples.fingerprints is not None:
        return samples
    if isinstance(samples.images, np.ndarray):
        numbers = [_number(np.ascontiguousarray(image).data) for image in samples.images]
    else:
        # A task for each row would cost as much as reading its file.
        parts = [samples.images[start : start + _PART] for start in range(0, len(samples), _PART)]
        with ThreadPoolExecutor(max(1, threads)) as pool:
            numbers = [number for part in pool.map(lambda rows: [*map(_of_files, rows)], parts) for number in part]
    return replace(samples, fingerprints=np.array(numbers, dtype=np.uint64))


def _fingerprints(pictures: str) -> list[str]:
    return [pictures[start : start + 16] for start in range(0, len(pictures), 16)]


def _exchanged(kind: str, before: Iterable[str], now: Iterable[str]) -> str:
    """Which names are gone and which are new, in words; empty where no name changed."""
    gone = [repr(name) for name in before if name not in {*now}]
    new = [repr(name) for name in now if name not in {*before}]
    parts = [f"{', '.join(names)} {what}" for names, what in ((gone, "gone"), (new, "new")) if names]
    return f"{kind}: {'; '.join(parts)}" if parts else ""


def _of_files(paths: Sequence[Path | None]) -> int:
    contents = [_ABSENT if path is None else _excerpt(path) for path in paths]
    return 0 if {_ABSENT, b""}.issuperset(contents) else _number(b"".join(contents))


def _excerpt(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE:
                return size.to_bytes(8) + file.read()
            part = WHOLE // 3
            places = (0, (size - part) // 2, size - part)
            return size.to_bytes(8) + b"".join((file.seek(place), file.read(part))[1] for place in places)
    except (OSError, ValueError):  # a name with NUL is a ValueError
        return b""


def _number(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) if len(content) else 0


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _hashes(column: pd.Series) -> np.ndarray:
    """A number for each value, (N,)."""
    return pd.util.hash_pandas_object(column, index=False).to_numpy()


def _joined(rows: np.ndarray) -> np.ndarray:
    """A number for each row of several, (k, N) to (N,)."""
    weights = np.arange(1, 2 * len(rows), 2, dtype=np.uint64)[:, None]
    return np.add.reduce(rows.astype(np.uint64) * weights, axis=0)  # modulo 2^64
