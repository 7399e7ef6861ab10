"""The paper's three data sets, read from miniatures in the published layouts."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from originals import (
    ATTRIBUTES,
    dvm_tables,
    sun_names,
    write_celeba,
    write_dvm,
    write_dvm_tables,
    write_sun,
)
from tabular_image import prepare
from tabular_image.data import Samples, load
from tabular_image.data.dvm import CATEGORICAL, NUMERIC, SIZES, join_tables
from tabular_image.data.module import TabularImageData
from tabular_image.errors import InputError
from torchvision.datasets import CelebA
from torchvision.datasets.utils import calculate_md5


def shares(samples: Samples) -> dict[str, dict[str, int]]:
    """Rows of each split, by class."""
    assert samples.split is not None
    return {split: rows.value_counts().to_dict() for split, rows in samples.target.groupby(samples.split)}


@pytest.mark.parametrize("name", ["dvm", "celeba", "sun"])
@pytest.mark.parametrize("there", [False, True])
def test_a_set_that_is_not_prepared_says_how(tmp_path: Path, name: str, there: bool):
    if there:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError) as caught:
        load(name, tmp_path)
    page = {"dvm": "deepvisualmarketing", "celeba": "mmlab.ie.cuhk", "sun": "cs.brown.edu"}[name]
    command = f"prepare.py {name} --archives FOLDER --data_root {tmp_path}"
    assert [word for word in (f"{tmp_path / name}", page) if word not in str(caught.value)] == []
    assert str(caught.value).endswith(command)


# DVM: the join


def join(folder: Path, tables: dict[str, pd.DataFrame], fewest: int = 1) -> pd.DataFrame:
    write_dvm_tables(folder, tables)
    return join_tables(folder, fewest).set_index("Adv_ID")


def test_adverts_join_price_photograph_and_sizes(tmp_path: Path):
    tables = dvm_tables({"2_1": 3, "9_2": 2})
    tables["Ad_table.csv"].loc[3, ["Adv_month", "Engin_size", "Fuel_type"]] = [7, "6.8L", "Diesel"]
    tables["Ad_table (extra).csv"] = tables["Ad_table (extra).csv"].iloc[::-1]  # not in the order of the adverts
    tables["Ad_table (extra).csv"].loc[3, "Length"] = 5000
    joined = join(tmp_path, tables)
    assert list(joined.index) == ["2_1$$1", "2_1$$2", "2_1$$3", "9_2$$1", "9_2$$2"]
    assert list(joined.columns) == ["Genmodel_ID", "Image_name", *NUMERIC, *CATEGORICAL]
    row = joined.loc["9_2$$1"]
    assert row["Genmodel_ID"] == "9_2"
    assert row["Reg_year"] == 2017
    assert row["Entry_price"] == 20170, "of the model in the year of registration"
    assert (row["Adv_month"], row["Engine_size"], row["Fuel_type"]) == (7, 6.8, "Diesel")
    assert abs(row["Length"] - 5000) <= 50
    assert (joined.drop(index="9_2$$1")["Length"] < 4100).all()


def test_one_photograph_an_advert_the_first_by_name(tmp_path: Path):
    joined = join(tmp_path, dvm_tables({"2_1": 12}))
    assert joined["Image_name"].is_unique
    assert joined.loc["2_1$$11", "Image_name"] == "Abarth$$124 Spider$$2017$$Blue$$2_1$$11$$image_0.jpg"
    assert joined["Image_name"].str.endswith("image_0.jpg").all(), "image_1 comes first in the table"


def test_adverts_with_anything_missing_are_dropped(tmp_path: Path):
    tables = dvm_tables({"2_1": 12})
    adverts = tables["Ad_table.csv"]
    spoilt = [("Color", None), ("Price", "Uknown"), ("Reg_year", None), ("Engin_size", None), ("Reg_year", 1990.0)]
    for row, (column, value) in enumerate(spoilt):
        adverts.loc[row, column] = value
    tables["Price_table.csv"].loc[0, "Year"] = None  # no match for a missing year of registration
    images = tables["Image_table.csv"]
    tables["Image_table.csv"] = images[~images["Image_ID"].str.startswith("2_1$$6$$")]
    extra = tables["Ad_table (extra).csv"]
    tables["Ad_table (extra).csv"] = extra[extra["Adv_ID"] != "2_1$$7"]
    assert sorted(join(tmp_path, tables).index) == sorted(f"2_1$${number}" for number in range(8, 13))


def test_models_with_few_complete_adverts_are_left_out(tmp_path: Path):
    tables = dvm_tables({"2_1": 100, "9_2": 100, "10_3": 3})
    tables["Ad_table.csv"].loc[100, "Color"] = None
    write_dvm_tables(tmp_path, tables)
    assert join_tables(tmp_path)["Genmodel_ID"].value_counts().to_dict() == {"2_1": 100}
    assert join_tables(tmp_path, fewest=3)["Genmodel_ID"].value_counts().to_dict() == {"2_1": 100, "9_2": 99, "10_3": 3}


def near(found: pd.Series, size: float) -> bool:
    return len(found) > 0 and bool((found.sub(size).abs() <= 50).all())


def test_sizes_are_corrected_then_filled(tmp_path: Path):
    tables = dvm_tables({"2_1": 4, "29_30": 3, "59_29": 2, "43_9": 2, "69_36": 2, "29_20": 2, "7_7": 2})
    sizes = tables["Ad_table (extra).csv"]
    model = sizes["Genmodel_ID"]
    sizes.loc[model == "2_1", "Width"] = [0, None, 3100, 3300]
    sizes.loc[model == "29_30", "Height"] = [805, 0, 805]
    sizes.loc[model == "59_29", "Wheelbase"] = [5246, 3400]
    sizes.loc[model == "43_9", "Wheelbase"] = [4065, None]
    sizes.loc[model == "69_36", "Wheelbase"] = [None, 0]
    sizes.loc[model == "29_20", "Wheelbase"] = None
    sizes.loc[model == "7_7", "Height"] = None
    joined = join(tmp_path, tables)
    assert near(joined.loc[["2_1$$1", "2_1$$2", "2_1$$3"], "Width"], 3100), "from the first advert that has it"
    assert near(joined.loc[["2_1$$4"], "Width"], 3300)
    for name, column, right in (
        ("29_30", "Height", 1805),
        ("43_9", "Wheelbase", 2580),
        ("69_36", "Wheelbase", 2612),
        ("29_20", "Wheelbase", 2788),
    ):
        assert near(joined.loc[joined["Genmodel_ID"] == name, column], right)
    assert near(joined.loc[["59_29$$1"], "Wheelbase"], 3106)
    assert near(joined.loc[["59_29$$2"], "Wheelbase"], 3400), "only the wrong size is corrected"
    assert "7_7" not in set(joined["Genmodel_ID"]), "a model without a size cannot be filled"


def test_noise_on_sizes_is_whole_bounded_and_the_same_again(tmp_path: Path):
    tables = dvm_tables({"2_1": 400, "9_2": 400})
    joined = join(tmp_path, tables)
    noise = (joined[SIZES] - [2000, 1000, 3000, 4000]).to_numpy()
    assert (noise == noise.round()).all()
    assert (noise.min(), noise.max()) == (-50, 50)
    assert len(np.unique(noise)) == 101
    assert np.abs(np.corrcoef(noise.T) - np.eye(4)).max() < 0.15, "each size has its own"
    shuffled = {name: frame.sample(frac=1, random_state=1) for name, frame in tables.items()}
    pd.testing.assert_frame_equal(join(tmp_path / "again", shuffled), joined, check_exact=True)


def test_a_table_that_is_missing_or_another_is_named(tmp_path: Path):
    write_dvm_tables(tmp_path, dvm_tables({"2_1": 2}))
    (tmp_path / "Price_table.csv").write_text("Maker, Genmodel, Genmodel_ID, Year\r\nAbarth,124,2_1,2016\r\n")
    with pytest.raises(InputError, match=r"Price_table\.csv has no column 'Entry_price'"):
        join_tables(tmp_path)
    (tmp_path / "Image_table.csv").unlink()
    (tmp_path / "Price_table.csv").unlink()
    with pytest.raises(InputError, match=r"Price_table\.csv does not exist"):
        join_tables(tmp_path)


# DVM: from the archives


@pytest.fixture(scope="module")
def dvm_archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_dvm(folder, dvm_tables({"2_1": 100, "9_2": 140, "10_3": 99}))
    return folder


@pytest.fixture(scope="module")
def dvm_root(dvm_archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare.prepare("dvm", dvm_archives, root)
    return root


def test_dvm_from_archive_to_batch(dvm_root: Path):
    samples = load("dvm", dvm_root)
    assert len(samples) == 240
    assert list(samples.table.columns) == [*NUMERIC, *CATEGORICAL]
    assert (len(samples.numeric), len(samples.categorical)) == (13, 4)
    for (path,), advert, model in zip(samples.images, samples.ids, samples.target, strict=True):
        assert path.name.endswith(f"$${advert}$$image_0.jpg")
        assert path.parent.parts[-5:-2] == ("resized_DVM", "Abarth", "124 Spider")
        assert advert.startswith(f"{model}$$")
    assert samples.image_size == 128
    data = TabularImageData(samples, image_size=8, batch_size=16, workers=0)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (16, 3, 8, 8)
    assert batch["table"].shape == (16, 17), "four categories with one value each"
    assert data.classes == ["2_1", "9_2"]


def test_dvm_extracts_only_the_photographs_it_uses(dvm_root: Path):
    assert len(list(dvm_root.rglob("*.jpg"))) == 240


def test_dvm_split_is_fixed_and_stratified(dvm_root: Path):
    samples = load("dvm", dvm_root)
    assert shares(samples) == {
        "train": {"2_1": 40, "9_2": 56},
        "val": {"2_1": 10, "9_2": 14},
        "test": {"2_1": 50, "9_2": 70},
    }
    assert "seed 2022" in samples.note
    first, other = (TabularImageData(samples, image_size=8, seed=seed, workers=0).splits for seed in (0, 1))
    assert all((first[name] == other[name]).all() for name in first)
    pd.testing.assert_series_equal(load("dvm", dvm_root).split, samples.split)


def test_dvm_takes_the_published_split(dvm_archives: Path, tmp_path: Path):
    numbers = {"train": range(1, 21), "val": range(21, 31), "test": range(31, 61)}
    adverts = {split: [f"{model}$${n}" for model in ("2_1", "9_2") for n in numbers[split]] for split in numbers}
    adverts["test"] += ["9_2$$9999"]  # listed, but not among the adverts
    archives = tmp_path / "archives"
    archives.mkdir()
    for name in ("tables_V2.0.zip", "resized_DVM_v2.zip"):
        (archives / name).symlink_to(dvm_archives / name)
    for split, listed in adverts.items():
        (archives / f"{split}_ids_dvm_all_views.txt").write_text(",".join(listed) + ",")
    prepare.prepare("dvm", archives, tmp_path)
    samples = load("dvm", tmp_path)
    found = {split: set(ids) for split, ids in samples.ids.groupby(samples.split)}
    adverts["test"].pop()
    assert found == {split: set(listed) for split, listed in adverts.items()}
    assert len(samples) == 120
    assert "120 adverts that they do not list are left out, 1 that they list are not in dvm.csv" in samples.note
    for (path,), advert in zip(samples.images, samples.ids, strict=True):
        assert f"$${advert}$$" in path.name

    (tmp_path / "dvm" / "val_ids_dvm_all_views.txt").unlink()
    with pytest.raises(InputError, match=r"some of the id files but not val_ids_dvm_all_views\.txt"):
        load("dvm", tmp_path)


def test_dvm_leaves_out_adverts_without_their_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tables = dvm_tables({"2_1": 101})
    names = tables["Image_table.csv"]["Image_name"]
    write_dvm(tmp_path, tables, without=tuple(names[names.str.contains("$$7$$", regex=False)]))
    prepare.prepare("dvm", tmp_path, tmp_path)
    frame = pd.read_csv(tmp_path / "dvm" / "dvm.csv")
    assert len(frame) == 100
    assert "2_1$$7" not in set(frame["Adv_ID"])
    assert "lacks the photographs of 1 adverts" in capsys.readouterr().out


def test_dvm_photographs_are_found_where_names_are_encoded_otherwise(tmp_path: Path):
    tables = dvm_tables({"2_1": 100})
    names = tables["Image_table.csv"]["Image_name"]
    tables["Image_table.csv"]["Image_name"] = names.str.replace("Abarth", "Citroën")
    write_dvm(tmp_path, tables)
    with zipfile.ZipFile(tmp_path / "resized_DVM_v2.zip") as zipped:
        members = {name: zipped.read(name) for name in zipped.namelist()}
    with zipfile.ZipFile(tmp_path / "resized_DVM_v2.zip", "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name.replace("Citroën", "Citro\u00d9n"), content)
    prepare.prepare("dvm", tmp_path, tmp_path)
    images = pd.read_csv(tmp_path / "dvm" / "dvm.csv")["image"]
    assert len(images) == 100
    assert all((tmp_path / "dvm" / image).is_file() for image in images)


def test_an_archive_without_tables_is_named(tmp_path: Path):
    for name in ("tables_V2.0.zip", "resized_DVM_v2.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as zipped:
            zipped.writestr("readme.csv", "nothing")
    with pytest.raises(InputError, match=r"tables_V2\.0\.zip holds no Ad_table\.csv"):
        prepare.prepare("dvm", tmp_path, tmp_path)


# CelebA


@pytest.fixture(params=["\n", "\r\n"])
def celeba_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Prepared; only the MD5 sums of the originals are replaced by those of the miniatures."""
    files = write_celeba(tmp_path / "archives", newline=request.param)
    monkeypatch.setattr(CelebA, "file_list", files)
    prepare.prepare("celeba", tmp_path / "archives", tmp_path)
    return tmp_path


def test_celeba_from_archive_to_batch(celeba_root: Path):
    samples = load("celeba", celeba_root)
    assert len(samples) == 60
    assert list(samples.table.columns) == [name for name in ATTRIBUTES if name != "Attractive"]
    assert (samples.numeric, len(samples.categorical)) == ([], 39)
    assert set(np.unique(samples.table)) == {-1, 1}
    assert samples.target.tolist() == ["not attractive", "attractive"] * 30
    third = (celeba_root / "archives" / "list_attr_celeba.txt").read_text().splitlines()[4].split()
    assert samples.images[2] == (celeba_root / "celeba" / "img_align_celeba" / third[0],)
    assert samples.table.iloc[2].tolist() == [int(value) for value in third[1:3] + third[4:]]
    assert shares(samples) == {
        "train": {"attractive": 15, "not attractive": 15},
        "val": {"attractive": 7, "not attractive": 8},
        "test": {"attractive": 8, "not attractive": 7},
    }
    data = TabularImageData(samples, image_size=8, batch_size=8, workers=0)
    batch = next(iter(data.train_dataloader()))
    assert (batch["image"].shape, batch["table"].shape) == ((8, 3, 8, 8), (8, 78))
    assert data.split_sizes == {"train": 30, "val": 15, "test": 15}
    assert samples.image_size == 128


def test_celeba_joins_the_partition_by_file(celeba_root: Path, monkeypatch: pytest.MonkeyPatch):
    expected = load("celeba", celeba_root).split
    path = celeba_root / "celeba" / "list_eval_partition.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    with pytest.raises(InputError, match=r"list_eval_partition\.txt is not the published file .*mmlab"):
        load("celeba", celeba_root)
    monkeypatch.setattr(
        CelebA, "file_list", [("", calculate_md5(path.with_name(name)), name) for _, _, name in CelebA.file_list[1:]]
    )
    pd.testing.assert_series_equal(load("celeba", celeba_root).split, expected)


# SUN Attribute


@pytest.fixture
def votes() -> np.ndarray:
    random = np.random.default_rng(0)
    drawn = random.choice([0, 1 / 3, 0.3333, 2 / 3, 0.6667, 0.6666, 1], (100, 102))
    drawn[:, sun_names().index("open area")] = np.where(np.arange(100) % 5 < 2, 0.6666, 0.3334)
    return drawn


def test_sun_from_archive_to_batch(tmp_path: Path, votes: np.ndarray):
    paths = write_sun(tmp_path, votes)
    prepare.prepare("sun", tmp_path, tmp_path)
    samples = load("sun", tmp_path)
    assert samples.ids.tolist() == paths
    assert samples.images[1] == (tmp_path / "sun" / "images" / "a" / "abbey" / "sun_0001.jpg",)
    assert list(samples.table.columns) == [name for name in sun_names() if name != "open area"]
    assert {"enclosed area", "semi-enclosed area"} < set(samples.categorical)
    assert samples.target.tolist() == ["open area", "open area", "no open area", "no open area", "no open area"] * 20
    assert shares(samples) == {
        "train": {"open area": 28, "no open area": 42},
        "val": {"open area": 4, "no open area": 6},
        "test": {"open area": 8, "no open area": 12},
    }
    data = TabularImageData(samples, image_size=8, batch_size=8, workers=0)
    batch = next(iter(data.train_dataloader()))
    assert (batch["image"].shape, batch["table"].shape) == ((8, 3, 8, 8), (8, 202))
    assert samples.image_size == 128
    other = TabularImageData(load("sun", tmp_path), image_size=8, seed=5, workers=0)
    assert all((data.splits[name] == other.splits[name]).all() for name in data.splits)


def test_sun_attributes_need_two_of_three_votes(tmp_path: Path, votes: np.ndarray):
    votes[:6, 3] = [2 / 3, 0.6667, 0.6666, 0.3334, 0.5, 1]
    votes[6:, 3] = np.float32(2 / 3)
    write_sun(tmp_path, votes)
    prepare.prepare("sun", tmp_path, tmp_path)
    held = load("sun", tmp_path).table["attribute 3"]
    assert held.tolist()[:6] == ["yes", "yes", "yes", "no", "no", "yes"]
    assert set(held[6:]) == {"yes"}


def test_sun_files_that_do_not_belong_together_are_refused(tmp_path: Path, votes: np.ndarray):
    write_sun(tmp_path, votes)
    prepare.prepare("sun", tmp_path, tmp_path)
    write_sun(tmp_path / "other", votes[:50])
    prepare.prepare("sun", tmp_path / "other", tmp_path / "other")
    stray = tmp_path / "other" / "sun" / "SUNAttributeDB" / "images.mat"
    stray.replace(tmp_path / "sun" / "SUNAttributeDB" / "images.mat")
    with pytest.raises(InputError, match=r"do not belong together: 50 images, 102 attributes"):
        load("sun", tmp_path)
