"""A run is its options and its data: changed data are refused in words, moved data are not changed data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tabular_image import train
from tabular_image.data import load
from tabular_image.data.identity import Identity, identity


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of 40 pictures, and an interrupted run on it."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("begun")
    data = folder / "data"
    data.mkdir()
    for row in range(40):
        Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(data / f"{row}.png")
    frame = pd.DataFrame({"photo": [f"{row}.png" for row in range(40)], "kind": ["ant", "bee"] * 20})
    frame["size"] = random.normal(5, 2, 40).round(3)
    frame["weight"] = random.normal(9, 3, 40).round(3)
    frame["colour"] = random.choice(["red", "blue"], 40)
    frame.to_csv(data / "own.csv", index=False)
    words = ["--dataset", "csv", "--path", str(data / "own.csv"), "--image_column", "photo", "--target_column", "kind"]
    words += ["--image_size", "8", "--accelerator", "cpu", "--threads", "1", "--pictures", "false", "--epochs", "1"]
    assert train.main([*words, "--out", str(folder / "run")]) == 0
    (folder / "run" / "results.json").unlink()
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """The folder of the data, in a copy."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data"


def resume(data: Path, *more: str) -> int:
    return train.main(["--out", str(data.parent / "run"), "--resume", "true", "--path", str(data / "own.csv"), *more])


def change(data: Path, how: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    how(pd.read_csv(data / "own.csv")).to_csv(data / "own.csv", index=False)


def rename(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(kind=frame["kind"].replace("ant", "wasp"))


def exchange(frame: pd.DataFrame) -> pd.DataFrame:
    kinds = frame["kind"].copy()
    kinds[[0, 1]] = kinds[[1, 0]].to_numpy()
    return frame.assign(kind=kinds)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (rename, ["classes: 'ant' gone; 'wasp' new"]),
        (exchange, ["the target", "other values"]),
        (lambda frame: frame.iloc[:-1], ["40 rows", "now there are 39"]),
        (lambda frame: pd.concat([frame, frame.iloc[:1]]), ["40 rows", "now there are 41"]),
        (lambda frame: frame[["photo", "kind", "weight", "size", "colour"]], ["columns", "another order"]),
        (lambda frame: frame.iloc[::-1], ["rows", "another order"]),
        (lambda frame: frame.assign(size=frame["size"].replace(frame["size"][7], 9)), ["'size'", "other values"]),
        (lambda frame: frame.rename(columns={"size": "width"}), ["columns: 'size' gone; 'width' new"]),
        (lambda frame: frame.drop(columns="colour"), ["columns", "'colour' gone"]),
        (lambda frame: frame.assign(age=frame["size"] * 2), ["columns", "'age' new"]),
        (lambda frame: frame.assign(photo=frame["photo"].replace("3.png", "4.png")), ["picture of row 4 of 40"]),
    ],
)
def test_a_run_is_not_resumed_on_another_table(folder, how, words, capsys):
    change(folder, how)
    capsys.readouterr()
    assert resume(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the data have changed since the run in ")
    assert [word for word in [*words, str(folder.parent / "run"), "--out"] if word not in error] == []
    assert error.count("\n") == 1


def test_a_run_is_not_resumed_on_another_picture(folder, capsys):
    with Image.open(folder / "6.png") as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "6.png")
    assert resume(folder) == 2
    assert "the picture of row 7 of 40 has other content" in capsys.readouterr().err


def test_a_run_is_resumed_where_its_data_have_moved(folder):
    moved = folder.parent / "elsewhere"
    shutil.move(folder, moved)
    frame = pd.read_csv(moved / "own.csv")
    frame["photo"] = [str(moved / name) for name in frame["photo"]]
    frame.to_csv(moved / "renamed.csv", index=False, sep=";")
    (moved / "own.csv").unlink()
    assert resume(folder, "--path", str(moved / "renamed.csv")) == 0


def read(data: Path) -> Identity:
    return identity(load("csv", path=data / "own.csv", image_column="photo", target_column="kind"))


def test_an_identity_is_content_and_survives_its_file(folder):
    before = read(folder)
    assert Identity.from_json(before.as_json()) == before
    assert len(before.digest) == 16
    change(folder, lambda frame: frame)
    assert read(folder).digest == before.digest
    for text in ("{}", "[]", "nonsense", before.as_json()[:-40]):
        with pytest.raises(ValueError, match=r".+"):
            Identity.from_json(text)


@pytest.mark.parametrize("place", [0, 70_000, 149_999])
def test_a_long_picture_is_known_by_its_ends_and_its_middle(folder, place: int):
    content = bytearray(150_054)
    Image.new("RGB", (250, 200)).save(folder / "0.bmp")
    content[:150_054] = (folder / "0.bmp").read_bytes()
    change(folder, lambda frame: frame.assign(photo=frame["photo"].replace("0.png", "0.bmp")))
    before = read(folder)
    content[54 + place] ^= 255
    (folder / "0.bmp").write_bytes(content)
    assert before.difference(read(folder)) == "the picture of row 1 of 40 has other content"
