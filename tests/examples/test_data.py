"""Data sets in their published layouts, splits, encoding and batches, on files written here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tabular_image.data import DATASETS, Samples, images, load
from tabular_image.data.images import random_affine, read_image
from tabular_image.data.module import TabularImageData
from tabular_image.data.splits import split_rows
from tabular_image.data.tables import TableColumn, encode_table
from tabular_image.errors import ImageError, InputError
from tabular_image.options import Options
from tabular_image.run import build_data
from torch import Tensor
from torchvision.transforms import functional


def make_samples(rows: int = 60, classes: int = 3, **changes: object) -> Samples:
    random = np.random.default_rng(0)
    samples = Samples(
        name="made",
        images=random.integers(0, 255, (rows, 8, 8), dtype=np.uint8),
        table=pd.DataFrame({"size": random.normal(5, 2, rows), "colour": random.choice(["red", "blue"], rows)}),
        numeric=["size"],
        categorical=["colour"],
        target=pd.Series([f"class {row % classes}" for row in range(rows)]),
        ids=pd.Series(range(rows), name="id"),
        grey=True,
        image_size=8,
    )
    return replace(samples, **changes)  # type: ignore[arg-type]


def save_image(path: Path, size: tuple[int, int] = (12, 10), value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


# Splits


def test_splits_cover_all_rows_once_and_keep_class_shares():
    samples = make_samples(300)
    splits = split_rows(samples, validation=0.1, test=0.2, seed=1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 210, "val": 30, "test": 60}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(300))
    for rows in splits.values():
        assert samples.target.iloc[rows].value_counts().nunique() == 1


def test_splits_depend_on_the_seed_alone():
    first, again, other = (split_rows(make_samples(), seed=seed)["test"] for seed in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize("groups", [None, pd.Series([f"patient {row // 5}" for row in range(100)])])
def test_folds_test_each_row_once(groups: pd.Series | None):
    samples = make_samples(100, groups=groups)
    splits = [split_rows(samples, folds=5, fold=fold, seed=2) for fold in range(5)]
    assert sorted(np.concatenate([split["test"] for split in splits])) == list(range(100))
    for split in splits:
        assert sorted(np.concatenate(list(split.values()))) == list(range(100))
        assert all(len(rows) for rows in split.values())
    assert not np.array_equal(splits[0]["test"], split_rows(samples, folds=5, seed=3)["test"])


@pytest.mark.parametrize(
    ("changes", "folds", "fold", "words"),
    [
        ({"split": pd.Series(["train", "val", "test"] * 20)}, 5, 0, "made has fixed splits"),
        ({}, 5, 5, "no fold 5 of 5"),
        ({}, 1, 0, "no fold 0 of 1"),
        ({}, 61, 0, "cannot be cut into 61 folds"),
    ],
)
def test_impossible_folds_are_refused(changes: dict[str, object], folds: int, fold: int, words: str):
    with pytest.raises(InputError, match=words):
        split_rows(make_samples(**changes), folds=folds, fold=fold)


def test_groups_are_never_torn():
    groups = pd.Series([f"patient {row // 5}" for row in range(200)])
    samples = make_samples(200, groups=groups)
    splits = split_rows(samples)
    owners = [set(groups.iloc[rows]) for rows in splits.values()]
    assert all(owners)
    assert sum(len(owner) for owner in owners) == groups.nunique()


def test_published_split_is_kept_and_validation_is_cut_from_training():
    column = pd.Series(["Train"] * 40 + ["test"] * 20)
    splits = split_rows(make_samples(split=column), validation=0.1)
    assert splits["test"].tolist() == list(range(40, 60))
    assert len(splits["val"]) == 4
    assert set(splits["val"]) | set(splits["train"]) == set(range(40))
    full = pd.Series(["train"] * 30 + ["valid"] * 15 + ["test"] * 15)
    assert split_rows(make_samples(split=full))["val"].tolist() == list(range(30, 45))


def test_class_of_two_rows_always_trains():
    target = pd.Series(["common"] * 58 + ["rare"] * 2)
    for seed in range(10):
        rows = split_rows(make_samples(target=target), test=0.5, seed=seed)["train"]
        assert "rare" in set(target.iloc[rows])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": pd.Series(["a"] * 59 + ["b"])}, ["'b'", "single sample", "made, id 59", "remove the row"]),
        ({"target": pd.Series(["a"] * 60)}, ["same target", "add rows of another class"]),
        ({"split": pd.Series(["train"] * 59 + ["dev set"])}, ["made, id 59", "'dev set'", "'train', 'val' or 'test'"]),
        ({"split": pd.Series(["train"] * 60)}, ["test split is empty", "mark some rows 'test'"]),
        ({"split": pd.Series(["val"] * 30 + ["test"] * 30)}, ["train split is empty"]),
        (
            {"split": pd.Series(["train"] * 30 + ["test"] * 30), "groups": pd.Series(["one", "two"] * 30)},
            ["group 'one'", "more than one split"],
        ),
        ({"groups": pd.Series(["one", "two"] * 30)}, ["2 groups are too few", "test split"]),
        (
            {
                "target": pd.Series(["a", "b"] * 20 + ["c"] * 20),
                "split": pd.Series(["train"] * 20 + ["val"] * 10 + ["test"] * 30),
            },
            ["class 'c' has no training row", "made, id 40"],
        ),
    ],
)
def test_impossible_splits_say_why(changes: dict[str, object], words: list[str]):
    with pytest.raises(InputError) as caught:
        split_rows(make_samples(**changes))
    assert [word for word in words if word not in str(caught.value)] == []


def test_too_many_classes_for_a_split_say_so():
    with pytest.raises(InputError, match="test split of 12 of 60 rows cannot hold each of the 20 classes"):
        split_rows(make_samples(classes=20))


def test_shares_must_leave_training_rows():
    with pytest.raises(InputError, match=r"validation=0\.5 and test=0\.5"):
        split_rows(make_samples(), validation=0.5, test=0.5)


# Tables


def test_statistics_come_from_training_rows_alone():
    samples = make_samples()
    train = np.arange(40)
    changed = samples.table.copy()
    changed.loc[40:, "size"] = 1e6
    changed.loc[40:, "colour"] = "green"
    encoded = encode_table(samples, train)
    before, after = encoded.values, encode_table(replace(samples, table=changed), train).values
    assert before.dtype == np.float32
    np.testing.assert_array_equal(before[:40], after[:40])
    np.testing.assert_allclose(before[:40, 0].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(before[:40, 0].std(), 1, atol=1e-6)
    assert (after[40:, 1:] == 0).all(), "an unseen category is a row of zeros"
    assert encoded.columns == [
        TableColumn("size", 0, 1, categorical=False),
        TableColumn("colour", 1, 3, categorical=True),
    ]


def test_missing_empty_constant_and_infinite_values_stay_finite():
    table = pd.DataFrame(
        {
            "gaps": [1.0, np.nan, 3.0, np.inf, 2.0, np.nan],
            "empty": [np.nan] * 6,
            "constant": [7] * 6,
            "late": [np.nan] * 4 + [1.0, 2.0],
            "kind": ["a", None, "b", "a", None, "b"],
            "mixed": [1, "one", None, 2.5, True, "1"],
        }
    )
    samples = make_samples(6, table=table, numeric=list(table.columns[:4]), categorical=["kind", "mixed"])
    encoded = encode_table(samples, np.arange(4))
    assert np.isfinite(encoded.values).all()
    assert encoded.values[1, 0] == pytest.approx(encoded.values[3, 0]), "both take the training median"
    assert encoded.problems == ["made, id 3: column 'gaps' holds inf, which is not finite; the cell counts as missing"]


def test_text_in_a_numeric_column_names_the_row():
    table = pd.DataFrame({"size": ["1", "2", "3 cm"] * 20, "colour": "red"})
    with pytest.raises(InputError, match=re.escape("made, id 2: column 'size' is numeric but holds '3 cm'")):
        encode_table(make_samples(table=table), np.arange(40))


def test_a_table_without_columns_is_refused():
    with pytest.raises(InputError, match="no column that can be used"):
        encode_table(make_samples(numeric=[], categorical=[]), np.arange(40))


# Batches


def test_batches_have_the_documented_form():
    data = TabularImageData(make_samples(100), batch_size=16, workers=0)
    batch = next(iter(data.train_dataloader()))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "image": ((16, 1, 8, 8), torch.float32),
        "table": ((16, 3), torch.float32),
        "target": ((16,), torch.int64),
        "row": ((16,), torch.int64),
    }
    assert data.classes == ["class 0", "class 1", "class 2"]
    assert data.table_width == 3
    assert data.class_counts.sum() == data.split_sizes["train"] == 70
    assert (batch["row"] % 3 == batch["target"]).all()
    assert len(data.train_dataloader()) == 4, "the last, smaller batch is dropped"
    assert sum(len(batch["row"]) for batch in data.test_dataloader()) == 20


def test_a_single_small_batch_is_kept():
    data = TabularImageData(make_samples(), batch_size=64, workers=0)
    assert [len(batch["row"]) for batch in data.train_dataloader()] == [42]


def read_epoch(data: TabularImageData, epoch: int) -> dict[str, Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_batches_depend_on_seed_and_epoch_not_on_workers():
    samples = make_samples()
    state = torch.get_rng_state()
    alone = TabularImageData(samples, batch_size=8, augment=True, workers=0)
    helped = TabularImageData(samples, batch_size=8, augment=True, workers=2, cache=0)
    expected, found = read_epoch(alone, 1), read_epoch(helped, 1)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert torch.equal(state, torch.get_rng_state()), "reading must not touch the model's generator"
    other = read_epoch(alone, 2)
    assert not torch.equal(expected["row"], other["row"])
    shared = int(expected["row"][0])
    if shared in other["row"]:
        assert not torch.equal(expected["image"][0], other["image"][other["row"] == shared][0])


@pytest.mark.parametrize("folds", [None, 5])
def test_runs_with_one_split_seed_share_their_rows_and_shuffle_by_their_seeds(folds: int | None):
    samples = make_samples()
    options = [
        Options(seed=seed, split_seed=split, folds=folds) for seed, split in ((1, 7), (2, 7), (7, None), (1, None))
    ]
    one, other, drawn, apart = (build_data(each, samples) for each in options)
    for data in (other, drawn):
        assert all(np.array_equal(data.splits[name], rows) for name, rows in one.splits.items())
    assert not np.array_equal(apart.splits["test"], one.splits["test"])
    assert not torch.equal(read_epoch(one, 0)["row"], read_epoch(other, 0)["row"])


def test_only_training_images_are_augmented():
    samples = make_samples()
    plain, augmented = (TabularImageData(samples, augment=augment, workers=0) for augment in (False, True))
    same = [
        torch.equal(next(iter(loader(plain)))["image"], next(iter(loader(augmented)))["image"])
        for loader in (
            TabularImageData.train_dataloader,
            TabularImageData.val_dataloader,
            TabularImageData.test_dataloader,
        )
    ]
    assert same == [False, True, True]


def test_images_in_memory_are_those_of_the_files(tmp_path: Path):
    for row in range(60):
        save_image(tmp_path / f"{row}.png", size=(12, 5 + row % 7), value=4 * row)
    samples = make_samples(images=[(tmp_path / f"{row}.png", tmp_path / f"{59 - row}.png") for row in range(60)])
    cached, read = (TabularImageData(samples, workers=0, cache=cache) for cache in (60 * 8 * 8, 60 * 8 * 8 - 1))
    assert isinstance(cached.samples.images, np.ndarray)
    assert read.samples.images is samples.images
    for first, second in zip(cached.train_dataloader(), read.train_dataloader(), strict=True):
        assert torch.equal(first["image"], second["image"])


@pytest.mark.parametrize(
    ("draws", "moved"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.9], {}),
        ([1.0, 0.5, 0.5, 0.5, 0.9], {"angle": 30.0}),
        ([0.0, 0.5, 0.5, 0.5, 0.9], {"angle": -30.0}),
        ([0.5, 1.0, 0.5, 0.5, 0.9], {"scale": 1.5}),
        ([0.5, 0.5, 0.0, 1.0, 0.9], {"translate": [4, -4]}),
    ],
)
def test_each_image_moves_as_torchvision_would_move_it(draws: list[float], moved: dict[str, object]):
    image = torch.rand(1, 3, 16, 16)
    move = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | moved
    expected = functional.affine(image, **move, interpolation=functional.InterpolationMode.BILINEAR)
    batch = torch.cat([image, image])
    found = random_affine(
        batch, torch.tensor([draws, [0.5] * 4 + [0.9]]), degrees=30, shift=0.25, scale=(0.5, 1.5), mirror=True
    )
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:], image)


def test_an_image_is_mirrored_only_on_request():
    image = torch.rand(1, 1, 6, 6)
    draws = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.1]])
    torch.testing.assert_close(random_affine(image, draws, mirror=True), image.flip(3))
    torch.testing.assert_close(random_affine(image, draws), image)


def test_an_absent_table_is_in_no_batch():
    data = TabularImageData(make_samples(), workers=0)
    present, absent = next(iter(data.test_dataloader())), next(iter(data.test_dataloader(table=False)))
    assert "table" not in absent
    assert present["table"].any()
    assert all(torch.equal(present[name], absent[name]) for name in ("image", "target", "row"))


class Recorder(L.LightningModule):
    """Sees every training row and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen += [batch["row"], batch["image"]]
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_trainer_sees_the_same_batches(tmp_path: Path, workers: int):
    def fit(epochs: int, resume: Path | None = None) -> Recorder:
        data = TabularImageData(make_samples(), batch_size=16, augment=True, workers=workers, cache=0)
        model = Recorder()
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole = fit(3).seen
    fit(2)
    resumed = fit(3, tmp_path / "2.ckpt").seen
    assert len(resumed) == len(whole) // 3
    assert all(torch.equal(a, b) for a, b in zip(whole[-len(resumed) :], resumed, strict=True))


def test_quantile_cuts_come_from_training_rows():
    prices = pd.Series(np.arange(100.0) ** 2)
    split = pd.Series(["train"] * 60 + ["val"] * 10 + ["test"] * 30)
    data = TabularImageData(make_samples(100, target=prices, quantiles=4, split=split), workers=0)
    cuts = prices[:60].quantile([0.25, 0.5, 0.75])
    assert data.class_counts.tolist() == [15, 15, 15, 15]
    assert data.classes == [
        f"below {cuts[0.25]:,.6g}",
        f"{cuts[0.25]:,.6g} to {cuts[0.5]:,.6g}",
        f"{cuts[0.5]:,.6g} to {cuts[0.75]:,.6g}",
        f"{cuts[0.75]:,.6g} and above",
    ]
    assert all((batch["target"] == 3).all() for batch in data.test_dataloader())


def test_several_images_make_one_mosaic(tmp_path: Path):
    for place, value in enumerate((0, 80, 160, 240)):
        save_image(tmp_path / f"{place}.png", value=value, size=(10, 10))
    paths = tuple(tmp_path / f"{place}.png" for place in range(4))
    data = TabularImageData(make_samples(images=[paths] * 60), image_size=16, workers=0)
    pixels = next(iter(data.val_dataloader()))["image"][0, 0] * 0.226 + 0.449
    found = [pixels[y, x].item() * 255 for y in (4, 12) for x in (4, 12)]
    assert found == pytest.approx([0, 80, 160, 240], abs=1)


# Images


def test_sixteen_bits_are_scaled_and_orientation_is_applied(tmp_path: Path):
    Image.fromarray(np.full((4, 6), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert set(np.asarray(read_image(tmp_path / "deep.png", grey=True)).ravel()) == {128}
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", grey=False).size == (4, 6)


@pytest.fixture
def pictures(tmp_path: Path) -> Samples:
    for row in range(60):
        save_image(tmp_path / f"{row}.png")
    return make_samples(images=[(tmp_path / f"{row}.png",) for row in range(60)])


def test_corrupt_image_names_file_row_and_remedy(pictures: Samples, tmp_path: Path):
    Image.effect_noise((32, 32), 50).save(tmp_path / "7.png")
    whole = (tmp_path / "7.png").read_bytes()
    for broken in (b"no image", whole[: len(whole) // 2], b""):
        (tmp_path / "7.png").write_bytes(broken)
        with pytest.raises(InputError) as caught:
            TabularImageData(pictures, workers=0)
        message = str(caught.value)
        assert "made, id 7" in message
        assert str(tmp_path / "7.png") in message
        assert "--skip_corrupt true" in message
        assert "\n" not in message


def test_missing_image_names_file_row_and_remedy(pictures: Samples, tmp_path: Path):
    (tmp_path / "9.png").unlink()
    (tmp_path / "11.png").unlink()
    with pytest.raises(
        InputError, match=r"made, id 9: image .*9\.png does not exist \(and 1 more rows .*--skip_corrupt true"
    ):
        TabularImageData(pictures, workers=0)


def test_skipped_rows_are_dropped_and_listed(pictures: Samples, tmp_path: Path):
    (tmp_path / "7.png").write_bytes(b"no image")
    (tmp_path / "9.png").unlink()
    data = TabularImageData(pictures, workers=0, skip_corrupt=True)
    assert len(data.skipped) == 2
    assert "id 7: cannot read image" in data.skipped[0]
    assert "id 9: image" in data.skipped[1]
    assert sum(data.split_sizes.values()) == 58
    assert data.samples.ids.tolist() == [row for row in range(60) if row not in (7, 9)]
    batch = next(iter(data.train_dataloader()))
    targets = [data.classes[target] for target in batch["target"]]
    assert targets == data.samples.target.iloc[batch["row"].numpy()].tolist()


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path):
    with pytest.raises(InputError, match="no image of made can be read"):
        TabularImageData(make_samples(images=[(tmp_path / "none.png",)] * 60), workers=0, skip_corrupt=True)


def halve(path: Path) -> None:
    """A picture whose header is right and whose pixels end too early."""
    Image.effect_noise((32, 32), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(("cache", "before", "after"), [(0, 0, 60), (2**30, 60, 60)])
def test_a_picture_is_decoded_once(
    cache: int, before: int, after: int, pictures: Samples, monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, grey: (decoded.append(path), read(path, grey))[1])
    data = TabularImageData(pictures, workers=0, cache=cache)
    assert len(set(decoded)) == len(decoded) == before
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert list(loader)
    assert len(set(decoded)) == len(decoded) == after


def test_files_that_are_missing_or_no_image_are_found_before_any_is_decoded(pictures: Samples, tmp_path: Path):
    (tmp_path / "7.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"id 7: cannot read image .*7\.png \(not an image\); .*--skip_corrupt true"):
        TabularImageData(pictures, workers=0, cache=0)
    (tmp_path / "9.png").unlink()
    data = TabularImageData(pictures, workers=0, cache=0, skip_corrupt=True)
    assert [sentence.split(": ")[0] for sentence in data.skipped] == ["made, id 7", "made, id 9"]
    assert sum(data.split_sizes.values()) == 58


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_pixels_end_the_epoch_that_meets_them(pictures: Samples, tmp_path: Path, workers: int):
    data = TabularImageData(pictures, batch_size=8, workers=workers, cache=0)
    row = data.splits["train"][5]
    halve(tmp_path / f"{row}.png")
    with pytest.raises(ImageError) as caught:
        list(data.train_dataloader())
    message = str(caught.value)
    assert message.startswith(f"made, id {row}: cannot read image {tmp_path / f'{row}.png'} (")
    assert "--skip_corrupt true" in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_damaged_pixels_are_in_no_batch_and_listed_once(
    pictures: Samples, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
):
    whole = TabularImageData(pictures, batch_size=60, augment=True, workers=0, cache=0)
    rows = [whole.splits["train"][5], *whole.splits["test"]]
    expected = read_epoch(whole, 1)
    for row in rows:
        halve(tmp_path / f"{row}.png")
    data = TabularImageData(pictures, batch_size=60, augment=True, workers=workers, cache=0, skip_corrupt=True)
    found = read_epoch(data, 1)
    kept = expected["row"] != rows[0]
    assert len(found["row"]) == len(kept) - 1
    assert all(torch.equal(found[name], expected[name][kept]) for name in expected)
    assert list(data.test_dataloader()) == []
    read_epoch(data, 2)
    assert len(data.skipped) == len(rows)
    assert capsys.readouterr().out.splitlines() == [f"skipped: {sentence}" for sentence in data.skipped]


def test_a_training_batch_without_images_ends_the_run_even_when_skipping(pictures: Samples, tmp_path: Path):
    data = TabularImageData(pictures, workers=0, cache=0, skip_corrupt=True)
    for row in data.splits["train"][1:]:
        halve(tmp_path / f"{row}.png")
    with pytest.raises(ImageError, match="hardly any image of this training batch"):
        list(data.train_dataloader())


# Published layouts


def test_leaves_join_by_species_and_number_not_by_line(tmp_path: Path):
    """The shape file is in another order, the texture file lacks a row, and file names vary in case."""
    root = tmp_path / "leaves100"
    species = ["Acer Campestre", "Acer Mono", "Quercus x Hispanica"]
    for place, name in enumerate(species):
        folder = name.replace(" ", "_")
        for number in range(1, 17):
            stem = folder.lower() if place == 1 else folder
            save_image(root / "data" / folder / f"{stem}_{number:02d}.ab.jpg", value=place * 50)

    def line(place: int, number: int) -> str:
        return ",".join([species[place], *[f"{place}.{number:02d}"] * 64])

    ordered = [line(place, number) for place in range(3) for number in range(1, 17)]
    (root / "data_Mar_64.txt").write_text("\n".join(ordered))
    (root / "data_Sha_64.txt").write_text("\n".join(ordered[16:] + ordered[:16]))
    (root / "data_Tex_64.txt").write_text("\n".join(ordered[1:]))

    for table in ("margin", "shape"):
        samples = load("leaves100", tmp_path, table=table)
        assert len(samples) == 48
        for (path,), value, name in zip(samples.images, samples.table.iloc[:, 0], samples.target, strict=True):
            assert path.parent.name == name.replace(" ", "_")
            number = int(re.findall(r"_(\d+)\.", path.name)[0])
            assert value == pytest.approx(species.index(name) + number / 100)
    texture = load("leaves100", tmp_path)
    assert sorted(set(texture.target)) == species[1:]
    numbers = [int(path.name.split("_")[-1][:2]) for (path,) in texture.images]
    assert (texture.table.iloc[:, 0] % 1).tolist() == pytest.approx([number / 100 for number in numbers])
    assert "Acer Campestre" in texture.note
    assert texture.grey
    with pytest.raises(InputError, match="no table 'colour'; choose one of texture, margin, shape"):
        load("leaves100", tmp_path, table="colour")


def test_houses_hide_the_price_and_keep_four_photos(tmp_path: Path):
    folder = tmp_path / "houses" / "Houses Dataset"
    for house in range(1, 13):
        for view in ("bathroom", "bedroom", "frontal", "kitchen"):
            save_image(folder / f"{house}_{view}.jpg")
    lines = [f"{house} 2.5 1000 0{house % 2}255 {house * 10000}" for house in range(1, 13)]
    (folder / "HousesInfo.txt").write_text("\n".join(lines))
    samples = load("houses", tmp_path)
    assert list(samples.table.columns) == ["bedrooms", "bathrooms", "area", "zipcode"]
    assert samples.categorical == ["zipcode"]
    assert samples.table["zipcode"].iloc[0] == "01255"
    assert [path.name for path in samples.images[9]] == [
        f"10_{view}.jpg" for view in ("frontal", "bedroom", "bathroom", "kitchen")
    ]
    assert samples.quantiles == 4
    assert samples.target.iloc[9] == 100000


def test_fashion_keeps_na_and_drops_what_leaks(tmp_path: Path):
    rows = [
        f"{100 + row},Men,Apparel,Topwear,{'Shirts' if row < 40 else 'NA' if row < 80 else 'Belts'},NA,Summer,2012,NA"
        for row in range(110)
    ]
    root = tmp_path / "fashion_small"
    root.mkdir()
    header = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage"
    (root / "styles.csv").write_text("\n".join([header, *rows]))
    samples = load("fashion", tmp_path)
    assert len(samples) == 80, "types with fewer than 40 products are left out"
    assert set(samples.target) == {"Shirts", "NA"}
    assert set(samples.table.columns) == {"gender", "baseColour", "season", "year", "usage"}
    assert samples.table["usage"].eq("NA").all()
    assert samples.images[3][0] == root / "images" / "103.jpg"


def test_digits_show_one_half_and_measure_the_other():
    samples = load("digits")
    assert len(samples) == 1797
    assert (samples.images[:, :, :4] == 0).all()
    assert samples.split is not None
    assert samples.split.value_counts().to_dict() == {"test": 1097, "train": 500, "val": 200}
    assert samples.table.notna().all().all()
    holes = samples.table["holes"].groupby(samples.target).mean()
    assert holes["0"] > 0.8
    assert holes["8"] > 1.2 > 0.2 > holes["1"]


@pytest.mark.parametrize(
    ("name", "root", "options", "words"),
    [
        ("flowers", None, {}, ["no data set 'flowers'", "digits, leaves100, houses, fashion, csv"]),
        ("houses", None, {}, ["--data_root"]),
        ("houses", "nowhere", {}, ["houses does not exist"]),
        ("digits", None, {"table": "shape"}, ["no option 'table'"]),
        ("csv", None, {"path": "x.csv"}, ["needs the option 'image_column'; give --image_column"]),
    ],
)
def test_load_says_what_is_wrong(name: str, root: str | None, options: dict[str, str], words: list[str]):
    with pytest.raises(InputError) as caught:
        load(name, root, **options)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.entries.items() if entry.origin == "as published"])
def test_an_empty_folder_is_named(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"does not exist; .* must hold"):
        load(name, tmp_path)


# Anyone's own CSV


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    for row in range(20):
        save_image(tmp_path / "pictures" / f"{row}.png")
    return pd.DataFrame(
        {
            "number": range(1, 21),
            "picture": [f"pictures/{row}.png" for row in range(20)],
            "diagnosis": ["NA", "01"] * 10,
            "age": [40.5, None] * 10,
            "smoker": [True, False] * 10,
            "ward": ["north", "south", None, "NA"] * 5,
            "remark": [f"remark {row}" for row in range(20)],
            "hospital": "one",
            "nothing": None,
            "patient": [f"p{row // 2}" for row in range(20)],
            "part": ["train", "train", "val", "test"] * 5,
        }
    )


def read_csv(tmp_path: Path, table: pd.DataFrame, **options: object) -> Samples:
    table.to_csv(tmp_path / "own.csv", index=False)
    given: dict[str, object] = {"image_column": "picture", "target_column": "diagnosis"} | options
    return load("csv", path=tmp_path / "own.csv", **given)


def test_csv_infers_columns_and_says_so(tmp_path: Path, table: pd.DataFrame):
    samples = read_csv(tmp_path, table, split_column="part", group_column="patient")
    assert samples.numeric == ["age"]
    assert samples.categorical == ["smoker", "ward"]
    assert set(samples.target) == {"NA", "01"}, "classes stay as written"
    assert samples.ids.tolist()[:2] == [2, 3]
    assert samples.split is not None
    assert samples.groups is not None
    header, *lines = [re.split(r"\s{2,}", line.strip()) for line in samples.note.splitlines()[1:]]
    assert header == ["column", "kind", "missing", "why"]
    assert lines == [
        ["number", "left out", "-", "an identifier: all different, in the order of the rows"],
        ["picture", "image", "-", "--image_column"],
        ["diagnosis", "target", "-", "--target_column; 2 classes"],
        ["age", "number", "50%", "numbers"],
        ["smoker", "category", "-", "2 different texts"],
        ["ward", "category", "25%", "3 different texts"],
        ["remark", "left out", "-", "different texts in most rows"],
        ["hospital", "left out", "-", "one value"],
        ["nothing", "left out", "100%", "empty"],
        ["patient", "group", "-", "--group_column"],
        ["part", "split", "-", "--split_column"],
    ]
    assert samples.images[3] == (tmp_path / "pictures" / "3.png",)


def test_csv_takes_named_columns_as_they_are(tmp_path: Path, table: pd.DataFrame):
    samples = read_csv(tmp_path, table, numeric=["number"], categorical=["remark"])
    assert (samples.numeric, samples.categorical) == (["number"], ["remark"])
    assert re.search(r"age +left out +50% +not named", samples.note)
    inferred = read_csv(tmp_path, table, numeric=["number"], group_column="patient", split_column="part")
    assert inferred.categorical == ["smoker", "ward"]


def test_csv_trains(tmp_path: Path, table: pd.DataFrame):
    data = TabularImageData(read_csv(tmp_path, table, categorical=["ward"]), workers=0, image_size=8, test=0.3)
    assert next(iter(data.train_dataloader()))["image"].shape == (data.split_sizes["train"], 3, 8, 8)


def test_csv_images_may_start_elsewhere(tmp_path: Path, table: pd.DataFrame):
    table["picture"] = [f"{row}.png" for row in range(20)]
    with pytest.raises(InputError) as caught:
        read_csv(tmp_path, table)
    for word in ("own.csv, line 2", "0.png (column 'picture') does not exist", "no image of the 20 rows", "image_root"):
        assert word in str(caught.value)
    assert len(read_csv(tmp_path, table, image_root=tmp_path / "pictures")) == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_column": "diagnose"}, ["no column 'diagnose'", "target_column", "'diagnosis'", "number, picture"]),
        ({"numeric": ["age", "heigth"]}, ["no column 'heigth'", "numeric"]),
        ({"categorical": ["diagnosis"]}, ["'diagnosis'", "target_column and as categorical", "name the column once"]),
        ({"split_column": "ward"}, ["line 4", "'ward' (split_column) is empty", "5 of 20 rows"]),
    ],
)
def test_csv_names_the_wrong_column(tmp_path: Path, table: pd.DataFrame, options: dict[str, object], words: list[str]):
    with pytest.raises(InputError) as caught:
        read_csv(tmp_path, table, **options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_csv_that_is_none_is_refused(tmp_path: Path):
    options = {"image_column": "picture", "target_column": "diagnosis"}
    with pytest.raises(InputError, match=r"absent\.csv does not exist"):
        load("csv", path=tmp_path / "absent.csv", **options)
    for name, content, message in (
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"picture,diagnosis\n", "no rows"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", r"line 3: the row has 3 cells and the header has 2"),
        ("binary.csv", b"\x89PNG\r\n\x1a\n\0\0\0", "is not text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load("csv", path=tmp_path / name, **options)
