"""From archives to folders: damaged, hostile, missing, interrupted and downloaded ones."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from imports import run_with_imports
from originals import dvm_tables, picture, write_celeba, write_dvm, write_sun, write_tar
from tabular_image import prepare
from tabular_image.data import DATASETS, PAGES, load
from tabular_image.errors import InputError
from torchvision.datasets import CelebA

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "tabular_image" / "prepare.py"


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """The two archives of SUN Attribute, 20 photographs."""
    write_sun(tmp_path / "archives", np.tile([[0.0], [1.0]], (10, 102)))
    return tmp_path / "archives"


def command(name: str, archives: Path, root: Path, *more: str) -> list[str]:
    return [name, "--archives", str(archives), "--data_root", str(root), *more]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: one line, `error: ...`."""
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    ("name", "files", "page"),
    [
        ("dvm", ["tables_V2.0.zip", "resized_DVM_v2.zip"], "https://deepvisualmarketing.github.io/"),
        ("celeba", ["img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"], "mmlab.ie.cuhk.edu.hk"),
        ("sun", ["SUNAttributeDB.tar.gz", "SUNAttributeDB_Images.tar.gz"], "https://cs.brown.edu/"),
    ],
)
def test_missing_archives_are_named_with_their_page(
    name: str, files: list[str], page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert prepare.main(command(name, tmp_path, tmp_path / "data")) == 2
    message = error(capsys)
    assert [word for word in (*files, page, f"{tmp_path} lacks", "--download true") if word not in message] == []
    (tmp_path / files[0]).touch()
    assert prepare.main(command(name, tmp_path, tmp_path / "data")) == 2
    assert files[0] not in error(capsys)
    assert not (tmp_path / "data").exists()


def test_every_set_that_is_prepared_has_archives():
    prepared = {name for name, entry in DATASETS.entries.items() if entry.origin == "prepared"}
    assert prepare.ARCHIVES.keys() == prepared
    assert prepared <= PAGES.keys()


def test_help_and_preparation_import_no_training(archives: Path, tmp_path: Path):
    done, names = run_with_imports(SCRIPT, "--help")
    assert done.returncode == 0
    assert "--archives" in done.stdout
    assert names & {"torch", "torchvision", "lightning", "pandas", "sklearn", "scipy", "matplotlib"} == set()
    done, names = run_with_imports(SCRIPT, *command("sun", archives, tmp_path / "data"))
    assert done.returncode == 0
    assert names & {"torch", "lightning", "sklearn", "matplotlib"} == set()


def test_manifest_has_the_sum_of_every_file_and_archive(archives: Path, tmp_path: Path):
    assert prepare.main(command("sun", archives, tmp_path / "data")) == 0
    files = tree(tmp_path / "data" / "sun")
    lines = files.pop("manifest.sha256").decode().splitlines()
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in sorted(files.items())]
    assert len(files) == 23
    assert sorted(lines[2:]) == sorted(sums)
    for line, name in zip(lines, ("SUNAttributeDB.tar.gz", "SUNAttributeDB_Images.tar.gz"), strict=False):
        assert line == f"# {hashlib.sha256((archives / name).read_bytes()).hexdigest()}  {name}"


KILLING = """
import os, runpy, signal, sys
root, seen = sys.argv[1], 0
def kill_at_the_sixth_file(event, arguments):
    global seen
    if event == "os.rename" and str(arguments[1]).startswith(root):
        seen += 1
        if seen == 6:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill_at_the_sixth_file)
script = sys.argv[2]
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_preparation_goes_on(archives: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", KILLING, str(killed), str(SCRIPT), *command("sun", archives, killed)],
        **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "check": False},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = [path for path in killed.rglob("*") if path.is_file()]
    complete = {path: path.stat() for path in left if not path.name.startswith(".")}
    assert (len(left), len(complete)) == (6, 5), "the sixth has no name yet"

    assert prepare.main(command("sun", archives, whole)) == 0
    assert prepare.main(command("sun", archives, killed)) == 0
    assert tree(killed) == tree(whole)
    for path, before in complete.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_of_another_size_is_written_anew(archives: Path, tmp_path: Path):
    assert prepare.main(command("sun", archives, tmp_path)) == 0
    before = tree(tmp_path / "sun")
    photograph = next((tmp_path / "sun" / "images").rglob("*.jpg"))
    photograph.write_bytes(photograph.read_bytes()[:100])
    assert prepare.main(command("sun", archives, tmp_path)) == 0
    assert tree(tmp_path / "sun") == before


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "middle", "sum"])
def test_a_damaged_tar_writes_nothing_of_it(
    how: str, archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = archives / "SUNAttributeDB_Images.tar.gz"
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        damage(path, len(whole) // 2 if how == "middle" else len(whole) - 8)  # gzip ends with its sum and its size
    assert prepare.main(command("sun", archives, tmp_path / "data")) == 2
    message = error(capsys)
    assert f"{path} is damaged" in message
    assert "download it again" in message
    assert not (tmp_path / "data" / "sun" / "images").exists()
    path.write_bytes(whole)
    assert prepare.main(command("sun", archives, tmp_path / "data")) == 0
    assert len(load("sun", tmp_path / "data")) == 20


def test_a_damaged_zip_leaves_no_broken_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_dvm(tmp_path, dvm_tables({"2_1": 100}))
    path = tmp_path / "resized_DVM_v2.zip"
    whole = path.read_bytes()
    damage(path, whole.index(picture(), len(whole) // 2) + 20)
    assert prepare.main(command("dvm", tmp_path, tmp_path)) == 2
    assert f"{path} is damaged (Bad CRC-32 for file" in error(capsys)
    written = list((tmp_path / "dvm" / "resized_DVM").rglob("*.*"))
    assert 0 < len(written) < 100
    assert {file.read_bytes() for file in written} == {picture()}
    assert not (tmp_path / "dvm" / "dvm.csv").exists()

    path.write_bytes(whole[: len(whole) // 2])
    assert prepare.main(command("dvm", tmp_path, tmp_path)) == 2
    assert f"{path} is damaged" in error(capsys)

    path.write_bytes(whole)
    assert prepare.main(command("dvm", tmp_path, tmp_path)) == 0
    assert len(list((tmp_path / "dvm" / "resized_DVM").rglob("*.*"))) == 100


def test_celeba_is_compared_with_the_published_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert {(archive.name, archive.md5) for archive in prepare.ARCHIVES["celeba"]()} < {
        (name, md5) for _, md5, name in CelebA.file_list
    }
    files = write_celeba(tmp_path)
    monkeypatch.setattr(CelebA, "file_list", files)
    content = (tmp_path / "img_align_celeba.zip").read_bytes()
    damage(tmp_path / "img_align_celeba.zip", len(content) // 2)
    assert prepare.main(command("celeba", tmp_path, tmp_path / "data")) == 2
    message = error(capsys)
    assert [word for word in ("img_align_celeba.zip is damaged", files[0][1], "mmlab.ie") if word not in message] == []
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["evil.zip", "evil.tar.gz"])
@pytest.mark.parametrize("name", ["../evil.txt", "good/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_names_that_lead_out_of_the_folder_are_refused(kind: str, name: str, tmp_path: Path):
    files = {"good.txt": b"good", name: b"evil"}
    archive = tmp_path / kind
    if kind.endswith(".zip"):
        with zipfile.ZipFile(archive, "w") as zipped:
            for member, content in files.items():
                zipped.writestr(member, content)
    else:
        write_tar(archive, files)
    with pytest.raises(InputError, match=r"would write .*evil\.txt', outside"):
        prepare.extract(archive, tmp_path / "folder" / "target")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_links_in_a_tar_are_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(tmp_path / "links.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("images")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
        tar.add(__file__, "images/file.jpg")
    prepare.extract(tmp_path / "links.tar.gz", tmp_path / "target")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "target" / "images" / "file.jpg").is_file()


def test_what_the_system_refuses_is_one_sentence(archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "data").write_text("a file where the folder should be")
    assert prepare.main(command("sun", archives, tmp_path / "data")) == 2
    assert str(tmp_path / "data") in error(capsys)


# Downloads


@dataclass
class Site:
    """A web server's files and manners."""

    files: dict[str, bytes]
    ranges: bool = True
    break_after: int | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def site(archives: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tree(archives))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, wanted = self.path.removeprefix("/"), self.headers["Range"]
            site.asked.append((name, wanted))
            if name not in site.files:
                self.send_error(404)
                return
            content = site.files[name]
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and site.ranges else 0
            if start and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: site.break_after])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    local = [replace(archive, url=f"{site.address}/{archive.name}") for archive in prepare.ARCHIVES["sun"]()]
    monkeypatch.setitem(prepare.ARCHIVES, "sun", lambda: local)
    yield site
    server.shutdown()
    server.server_close()


def test_archives_are_downloaded_and_prepared(site: Site, tmp_path: Path):
    assert prepare.main(command("sun", tmp_path / "new", tmp_path, "--download", "true")) == 0
    assert tree(tmp_path / "new") == site.files
    assert len(load("sun", tmp_path)) == 20
    assert site.asked == [(name, None) for name in ("SUNAttributeDB.tar.gz", "SUNAttributeDB_Images.tar.gz")]
    assert prepare.main(command("sun", tmp_path / "new", tmp_path, "--download", "true")) == 0
    assert len(site.asked) == 2, "what is there is not downloaded again"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(
    ranges: bool, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "new" / "SUNAttributeDB.tar.gz"
    size = len(site.files[path.name])
    half = size // 2
    site.ranges, site.break_after = ranges, half
    assert prepare.main(command("sun", path.parent, tmp_path, "--download", "true")) == 2
    message = error(capsys)
    assert f"{path.name} cannot be downloaded ({half} of {size} bytes came)" in message
    assert [file.name for file in path.parent.iterdir()] == [f"{path.name}.part"]

    site.break_after = None
    assert prepare.main(command("sun", path.parent, tmp_path, "--download", "true")) == 0
    assert site.asked[1] == (path.name, f"bytes={half}-")
    assert tree(path.parent) == site.files


@pytest.mark.parametrize("stale", [False, True])
def test_a_part_with_nothing_left_to_send(stale: bool, site: Site, tmp_path: Path):
    """Killed between the last byte and the rename; or longer than what the server has now."""
    path = tmp_path / "file.tar.gz"
    content = site.files["SUNAttributeDB.tar.gz"]
    part = path.with_name("file.tar.gz.part")
    part.write_bytes(content + b"more" * stale)
    url = f"{site.address}/SUNAttributeDB.tar.gz"
    if stale:
        with pytest.raises(OSError, match="416"):
            prepare.fetch(url, path)
        assert not part.exists(), "or no later call could succeed"
    prepare.fetch(url, path)
    assert path.read_bytes() == content
    assert not part.exists()


def test_an_address_that_fails_is_one_sentence(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    site.files.clear()
    assert prepare.main(command("sun", tmp_path / "new", tmp_path, "--download", "true")) == 2
    assert "SUNAttributeDB.tar.gz cannot be downloaded (HTTP Error 404" in error(capsys)


def test_google_drive_needs_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert prepare.main(command("celeba", tmp_path, tmp_path, "--download", "true")) == 2
    assert "img_align_celeba.zip cannot be downloaded" in (message := error(capsys))
    assert "pip install gdown" in message
