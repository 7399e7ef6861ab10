"""Turn downloaded archives into a data set: `python examples/tabular_image/prepare.py --help`."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from tabular_image.commands import run_command
from tabular_image.data import PAGES
from tabular_image.errors import InputError
from tabular_image.files import replacing

_CHUNK = 2**20  # bytes
MANIFEST = "manifest.sha256"


@dataclass(frozen=True)
class Archive:
    """A file as its publisher offers it.

    Attributes:
        name: Its name.
        url: Where it is, if it can be had over plain HTTP.
        drive: Its Google Drive id, if it is there.
        md5: Its published MD5 sum, if there is one.
    """

    name: str
    url: str | None = None
    drive: str | None = None
    md5: str | None = None


def _dvm() -> list[Archive]:
    return [  # record 19586296 of figshare
        Archive("tables_V2.0.zip", url="https://ndownloader.figshare.com/files/38754867"),
        Archive("resized_DVM_v2.zip", url="https://ndownloader.figshare.com/files/34792453"),
    ]


def _celeba() -> list[Archive]:
    from torchvision.datasets import CelebA  # takes seconds, and knows the sums

    return [
        Archive(name, drive=drive, md5=md5)
        for drive, md5, name in CelebA.file_list
        if name in ("list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba.zip")
    ]


def _sun() -> list[Archive]:
    return [
        Archive(name, url=f"https://cs.brown.edu/~gmpatter/Attributes/{name}")
        for name in ("SUNAttributeDB.tar.gz", "SUNAttributeDB_Images.tar.gz")
    ]


ARCHIVES = {"dvm": _dvm, "celeba": _celeba, "sun": _sun}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(
        prepare,
        __file__,
        "Turn downloaded archives into a data set for train.py.",
        arguments,
        example="dvm --archives downloads",
        kept="what is complete stays, start again to go on",
        first="name",
    )


def prepare(
    name: Literal["dvm", "celeba", "sun"], archives: Path, data_root: Path = Path("data"), download: bool = False
) -> None:
    """Checks the archives, extracts what `load` reads to `data_root / name` and writes a manifest.

    What an interrupted call has extracted is kept. The manifest holds the SHA-256 sums of the archives, as comments,
    and of every file: `sha256sum --check manifest.sha256`.

    Args:
        name: Data set.
        archives: Folder with the files as they are published. Downloads go there.
        data_root: Folder with one folder a data set.
        download: First download the files that are not there.

    Raises:
        InputError: A file is missing, damaged, unsafe to extract or cannot be downloaded.
    """
    root = data_root / name
    published = ARCHIVES[name]()
    if download:
        archives.mkdir(parents=True, exist_ok=True)
        for archive in published:
            if not (archives / archive.name).is_file():
                _download(archive, archives)
    missing = [archive.name for archive in published if not (archives / archive.name).is_file()]
    if missing:
        raise InputError(
            f"{archives} lacks {' and '.join(missing)}; download from {PAGES[name]} to that folder, "
            "or give --download true"
        )
    for archive in published:
        if archive.md5 and _sum(archives / archive.name, "md5") != archive.md5:
            raise InputError(
                f"{archives / archive.name} is damaged, its MD5 sum is not the published {archive.md5}; "
                f"download it again from {PAGES[name]}"
            )
    paths = [archives / archive.name for archive in published]
    written = (
        _prepare_dvm(paths[0], paths[1], root)
        if name == "dvm"
        else [file for path in paths for file in extract(path, root)]
    )
    _write_manifest(root, paths, written)
    print(f"{name} is ready in {root}: {len(written)} files, listed in {MANIFEST}")


def _prepare_dvm(tables: Path, photographs: Path, root: Path) -> list[Path]:
    """Joins the tables to `dvm.csv` and extracts the photographs it names, an eighth of the archive."""
    from tabular_image.data.dvm import join_tables  # pandas and scikit-learn

    lists = extract(tables, root, lambda name: name.endswith(".csv"))
    for ids in sorted(tables.parent.glob("*_ids_dvm_all_views.txt")):
        lists += extract(ids, root)
    folder = next((path.parent for path in lists if path.name == "Ad_table.csv"), None)
    if folder is None:
        raise InputError(f"{tables} holds no Ad_table.csv; it must be the archive of tables from {PAGES['dvm']}")
    frame = join_tables(root / folder)

    # Model, advert and picture name a photograph; names of brands and models may be encoded otherwise in the archive.
    keys = frame.pop("Image_name").map(_photograph_key)
    chosen = set(keys)
    images = extract(photographs, root, lambda name: _photograph_key(name) in chosen)
    frame.insert(1, "image", keys.map({_photograph_key(path.name): path.as_posix() for path in images}))
    absent = frame["image"].isna().sum()
    if absent:
        print(f"{photographs.name} lacks the photographs of {absent} adverts, which are left out")
    with replacing(root / "dvm.csv") as temporary:
        frame.dropna().to_csv(temporary, index=False)
    return [*lists, *images, Path("dvm.csv")]


def _photograph_key(name: str) -> tuple[str, ...]:
    return tuple(name.split("$$")[-3:])


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    open: Callable[[], Any]


def extract(archive: Path, target: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """Writes the files of an archive below `target`, except those that are already there in their full size.

    A file appears under its name when it is complete and its check sum is right. A tar.gz has one sum for all its
    files, so it is read to its end before the first is written.

    Args:
        archive: A zip, a tar.gz, or a single file, which is copied.
        target: A folder.
        wanted: Tells by its name whether to extract a file.

    Returns:
        The wanted files, relative to `target`.

    Raises:
        InputError: The archive is damaged, or a name in it leads out of `target`; then nothing is written.
    """
    try:
        with _opened(archive) as members:
            for member in members:
                path = PureWindowsPath(member.name)  # knows the separators and roots of all systems
                if path.anchor or ".." in path.parts:
                    raise InputError(f"{archive} would write {member.name!r}, outside {target}; do not trust it")
            members = [member for member in members if wanted(member.name)]
            total = sum(member.size for member in members)
            with tqdm(desc=archive.name, total=total, unit="B", unit_scale=True, disable=None) as bar:
                for member in members:
                    _write(member, target / member.name)
                    bar.update(member.size)
            return [Path(member.name) for member in members]
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{archive} is damaged ({error}); download it again") from error


@contextmanager
def _opened(archive: Path) -> Iterator[list[Member]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            infos = [info for info in zipped.infolist() if not info.is_dir() and info.filename[:8] != "__MACOSX"]
            yield [Member(info.filename, info.file_size, partial(zipped.open, info)) for info in infos]
    elif archive.name.endswith(".tar.gz"):
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            files = [info for info in tar if info.isreg()]
            while stream.read(_CHUNK):  # past the last file, where the sum is
                pass
            yield [Member(info.name, info.size, partial(tar.extractfile, info)) for info in files]
    else:
        yield [Member(archive.name, archive.stat().st_size, partial(archive.open, "rb"))]


def _write(member: Member, path: Path) -> None:
    if path.is_file() and path.stat().st_size == member.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, member.open() as source, temporary.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _write_manifest(root: Path, archives: list[Path], written: list[Path]) -> None:
    with replacing(root / MANIFEST) as temporary, temporary.open("w", encoding="utf-8") as sink:
        for archive in archives:
            sink.write(f"# {_sum(archive, 'sha256')}  {archive.name}\n")
        for path in tqdm(sorted(written), desc=MANIFEST, disable=None):
            sink.write(f"{_sum(root / path, 'sha256')}  {path.as_posix()}\n")


def _sum(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _download(archive: Archive, folder: Path) -> None:
    try:
        if archive.url:
            fetch(archive.url, folder / archive.name)
        else:
            from torchvision.datasets.utils import download_file_from_google_drive

            download_file_from_google_drive(archive.drive, folder, archive.name, archive.md5)
    except (OSError, HTTPException, RuntimeError) as error:
        raise InputError(f"{archive.name} cannot be downloaded ({error}); do it by hand, or run this again") from error


def fetch(url: str, path: Path) -> None:
    """Downloads to `path`, going on where an earlier call broke off.

    torch's and torchvision's functions start anew each time, which 13 GB do not bear.

    Raises:
        OSError: The server does not answer, or breaks off; what came is kept beside `path`.
    """
    incomplete = path.with_name(f"{path.name}.part")
    start = incomplete.stat().st_size if incomplete.exists() else 0
    request = Request(url, headers={"User-Agent": "gaal_surgery"} | ({"Range": f"bytes={start}-"} if start else {}))
    try:
        with urlopen(request, timeout=60) as response:
            if response.status != 206:  # the server does not know ranges
                start = 0
            length = response.headers["Content-Length"]
            size = start + int(length) if length else None
            with (
                incomplete.open("ab" if start else "wb") as sink,
                tqdm(desc=path.name, initial=start, total=size, unit="B", unit_scale=True, disable=None) as bar,
            ):
                while chunk := response.read(_CHUNK):
                    sink.write(chunk)
                    bar.update(len(chunk))
    except HTTPError as error:
        if error.code != 416:  # nothing is left to send; the header ends with the size of the whole
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] != str(start):
            incomplete.unlink()
            raise
        size = start
    if size is not None and incomplete.stat().st_size != size:
        raise OSError(f"{incomplete.stat().st_size} of {size} bytes came")
    incomplete.replace(path)


if __name__ == "__main__":
    sys.exit(main())
