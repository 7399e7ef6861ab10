"""Tables as people have them: how a file is read, what a column is taken for, and what is told of it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tabular_image.command_line import parse
from tabular_image.data import Samples, load
from tabular_image.data.columns import infer
from tabular_image.data.identity import fingerprinted
from tabular_image.data.leaks import leaks
from tabular_image.data.module import TabularImageData
from tabular_image.data.reading import read_table
from tabular_image.data.splits import split_rows
from tabular_image.errors import InputError

# Files

RUSSIAN = "kind,size\nкит,1.5\nклин,2\n"
ROWS = [["ant", "1.5"], ["bee", "2"]]


def zipped(text: str, *names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, text)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "rows", "lines"),
    [
        pytest.param("kind,size\nant,1.5\nbee,2\n", ROWS, [2, 3], id="plain"),
        pytest.param("kind;size\nant;1.5\nbee;2\n", ROWS, [2, 3], id="semicolons"),
        pytest.param("kind\tsize\nant\t1.5\nbee\t2\n", ROWS, [2, 3], id="tabs"),
        pytest.param("kind|size\nant|1.5\nbee|2\n", ROWS, [2, 3], id="bars"),
        pytest.param("kind  size\nant   1.5\nbee     2\n", ROWS, [2, 3], id="blanks"),
        pytest.param("kind , size \n ant , 1.5\nbee,2 \n", ROWS, [2, 3], id="blanks at the border of cells"),
        pytest.param('kind, "size"\nant, "1.5"\n"bee" ,2\n', ROWS, [2, 3], id="blanks before quotes"),
        pytest.param("kind,size\nant,1.5,\nbee,2,\n", ROWS, [2, 3], id="a comma at the end of data rows"),
        pytest.param("kind,size,,\nant,1.5,,\nbee,2,,\n", ROWS, [2, 3], id="commas at the end of all rows"),
        pytest.param("kind,size\nant,1.5\n\n,\nbee,2\n\n", ROWS, [2, 5], id="blank lines and rows"),
        pytest.param("kind,size\r\nant,1.5\r\nbee,2\r\n", ROWS, [2, 3], id="lines as Windows ends them"),
        pytest.param("kind,size\rant,1.5\rbee,2\r", ROWS, [2, 3], id="lines as old Macs ended them"),
        pytest.param("kind,size\nant,1.5\nbee,2", ROWS, [2, 3], id="no line end at the end"),
        pytest.param("sep=;\nkind;size\nant;1.5\nbee;2\n", ROWS, [3, 4], id="Excel's line of the separator"),
        pytest.param('kind,size\n"a\nb",1.5\nbee,2\n', [["a\nb", "1.5"], ["bee", "2"]], [2, 4], id="quoted line end"),
        pytest.param('kind,size\n"a, ""b""",1.5\nbee,2\n', [['a, "b"', "1.5"], ["bee", "2"]], [2, 3], id="quotes"),
        pytest.param("kind;size\na, b;1,5\nbee;2\n", [["a, b", "1,5"], ["bee", "2"]], [2, 3], id="commas in cells"),
        pytest.param("kind,size\nNA,02139\n,2\n", [["NA", "02139"], ["", "2"]], [2, 3], id="text stays text"),
        pytest.param("\ufeffkind,size\nant,1.5\nbee,2\n", ROWS, [2, 3], id="byte order mark"),
        pytest.param("kind,size\nänt,1.5\nbee,2\n".encode("cp1252"), [["änt", "1.5"], ROWS[1]], [2, 3], id="cp1252"),
        pytest.param(RUSSIAN.encode("cp1251"), [["кит", "1.5"], ["клин", "2"]], [2, 3], id="cp1251"),
        pytest.param("kind,size\nänt,1.5\nbee,2\n".encode("utf-16"), [["änt", "1.5"], ROWS[1]], [2, 3], id="utf-16"),
        pytest.param("kind,size\nant,1.5\nbee,2\n".encode("utf-16-le"), ROWS, [2, 3], id="utf-16 without a mark"),
        pytest.param(gzip.compress(b"kind,size\nant,1.5\nbee,2\n", mtime=0), ROWS, [2, 3], id="gzip"),
        pytest.param(bz2.compress(b"kind,size\nant,1.5\nbee,2\n"), ROWS, [2, 3], id="bzip2"),
        pytest.param(lzma.compress(b"kind,size\nant,1.5\nbee,2\n"), ROWS, [2, 3], id="xz"),
        pytest.param(zipped("kind,size\nant,1.5\nbee,2\n", "table.csv"), ROWS, [2, 3], id="zip"),
    ],
)
def test_a_file_is_read_as_its_writer_meant_it(tmp_path: Path, content: str | bytes, rows: list, lines: list[int]):
    path = tmp_path / "own.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    table = read_table(path)
    assert list(table.frame) == ["kind", "size"]
    assert table.frame.to_numpy().tolist() == rows
    assert table.places.tolist() == lines


def test_row_names_of_r_are_a_column(tmp_path: Path):
    (tmp_path / "table.txt").write_text('"kind" "size"\n"1" "ant" 1.5\n"2" "bee" 2\n')  # write.table(frame)
    (tmp_path / "table.csv").write_text('"","kind","size"\n"1","ant",1.5\n"2","bee",2\n')  # write.csv(frame)
    assert list(read_table(tmp_path / "table.txt").frame) == ["row name", "kind", "size"]
    assert list(read_table(tmp_path / "table.csv").frame) == ["column 1", "kind", "size"]


def test_excel_and_parquet_are_read_as_text(tmp_path: Path):
    frame = pd.DataFrame(
        {"kind": ["ant", None], "size": [1.5, 2.0], "legs": [6, None], "seen": pd.to_datetime(["2024-01-05", None])}
    )
    expected = [["ant", "1.5", "6", "2024-01-05 00:00:00"], ["", "2", "", ""]]
    frame.to_excel(tmp_path / "own.xlsx", index=False)
    frame.to_parquet(tmp_path / "own.parquet")
    for name, places, lines in (("own.xlsx", "line", [2, 3]), ("own.parquet", "row", [1, 2])):
        table = read_table(tmp_path / name)
        assert list(table.frame) == ["kind", "size", "legs", "seen"]
        assert table.frame.to_numpy().tolist() == expected
        assert (table.places.name, table.places.tolist()) == (places, lines)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.csv", None, ["does not exist", "table with a header"]),
        ("own.csv", b"", ["is empty"]),
        ("own.csv", b"\n\n", ["is empty"]),
        ("own.csv", b"kind,size\n", ["a header but no rows"]),
        ("own.csv", b"kind,size\n,\n", ["a header but no rows"]),
        ("own.csv", b"kind,kind\nant,bee\n", ["line 1", "columns 1 and 2", "'kind'", "another name"]),
        ("own.csv", b"kind,Kind , kind\nant,bee,cat\n", ["columns 1 and 3", "'kind'"]),
        ("own.csv", b"kind,size\nant,1\nbee,2,3\n", ["line 3", "3 cells", "header has 2", "quote"]),
        ("own.csv", b"kind,size,age\nant,1,3\nbee,2\n", ["line 3", "2 cells", "header has 3", "fill in"]),
        ("own.csv", b'kind,size\nant,"1\nbee,2\ncat,3\n', ["line 2", "quotation mark", "never closed"]),
        ("own.csv", b"\x89PNG\r\n\x1a\n\0\0\0\r", ["is not text", "save the table as CSV"]),
        ("own.csv.gz", b"kind,size\nant,1\n", ["is not a gzip file", "rename the file"]),
        (
            "own.csv.gz",
            gzip.compress(b"kind,size\nant,1\n" * 99, mtime=0)[:-20],
            ["cannot decompress the gzip file", "again"],
        ),
        ("own.csv.bz2", bz2.compress(b"kind,size\nant,1\n" * 99)[:-20], ["cannot decompress the bzip2 file"]),
        ("own.csv.xz", lzma.compress(b"kind,size\nant,1\n" * 99)[:-20], ["cannot decompress the xz file"]),
        ("own.zip", zipped("kind", "a.csv", "b.csv"), ["cannot decompress the zip file", "2 files"]),
        ("own.xlsx", b"no sheet", ["cannot read", "save the table again"]),
        ("own.parquet", b"no table", ["cannot read", "save the table again"]),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: bytes | None, words: list[str]):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / name)
    message = str(caught.value)
    assert [word for word in [name, *words] if word not in message] == []
    assert "\n" not in message


def test_a_separator_and_an_encoding_that_are_named_are_taken(tmp_path: Path):
    (tmp_path / "own.csv").write_bytes("kind^size\nžák^1\n".encode("cp1250"))
    assert read_table(tmp_path / "own.csv", "^", "cp1250").frame.to_numpy().tolist() == [["žák", "1"]]
    with pytest.raises(InputError, match="give the --encoding of the file"):
        read_table(tmp_path / "own.csv", "^", "utf-8")
    with pytest.raises(InputError, match="give the --encoding of the file"):
        read_table(tmp_path / "own.csv", "^", "klingon")


# Columns

NAN = float("nan")


def column(cells: list[str], name: str = "column", separator: str = ","):
    target = pd.Series((["a", "b", "b"] * len(cells))[: len(cells)])
    return infer(pd.Series(cells, name=name, dtype=str), target, separator)


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["3", "1.5", "-2", "+4", "1e3", ""], [3, 1.5, -2, 4, 1000, NAN]),
        (["1,000", "12,500", "7"], [1000, 12500, 7]),
        (["1,234,567.5", "0.5", "12"], [1234567.5, 0.5, 12]),
        (["12,5", "1,25", "7"], [12.5, 1.25, 7]),
        (["1.234,5", "0,5", "12"], [1234.5, 0.5, 12]),
        (["0,125", "0,250", "0,5"], [0.125, 0.25, 0.5]),
        (["1 234,5", "0,5", "12"], [1234.5, 0.5, 12]),
        (["1\u202f234,5", "1\u00a0000", "12"], [1234.5, 1000, 12]),
        (["1'234.5", "1\u2019000", "12"], [1234.5, 1000, 12]),
        (["40%", "12.5 %", "7%"], [0.4, 0.125, 0.07]),
        (["$1,200", "$3.50", "$7"], [1200, 3.5, 7]),
        (["12 kg", "3.5 kg", "7 kg"], [12, 3.5, 7]),
        (["\u22125", "3", "1"], [-5, 3, 1]),
        (["3", "unknown", "1", "N/A", "?", "2"], [3, NAN, 1, NAN, NAN, 2]),
        (["3", "inf", "1", "-Infinity"], [3, float("inf"), 1, float("-inf")]),
        (["3", "-1.8e308", "1e200", "2"], [3, float("-inf"), 1e200, 2]),
        (["2"] * 40 + ["3 cm", "1"], [2] * 40 + [NAN, 1]),
    ],
)
def test_numbers_as_people_write_them(cells: list[str], numbers: list[float]):
    found = column(cells)
    assert found.kind == "number"
    np.testing.assert_array_equal(found.values, numbers)
    assert set(found.odd) == {row for row, value in enumerate(numbers) if np.isnan(value) and cells[row]}


def test_a_comma_that_may_be_either_sign_is_a_decimal_sign_beside_semicolons():
    assert column(["1,000", "2,500", "7"], separator=",").values.tolist() == [1000, 2500, 7]
    assert column(["1,000", "2,500", "7"], separator=";").values.tolist() == [1, 2.5, 7]


@pytest.mark.parametrize(
    ("cells", "dates"),
    [
        (["2024-01-31", "2023-12-01", ""], ["2024-01-31", "2023-12-01", None]),
        (["31.01.2024", "01.12.2023"], ["2024-01-31", "2023-12-01"]),
        (["01/31/2024", "12/01/2023"], ["2024-01-31", "2023-12-01"]),
        (["31/01/2024", "01/12/2023"], ["2024-01-31", "2023-12-01"]),
        (["2024-01-31 10:30:00", "2023-12-01 00:00:00"], ["2024-01-31 10:30", "2023-12-01"]),
        (["2024-01-31T10:30:00Z", "2023-12-01T00:00:00Z"], ["2024-01-31 10:30", "2023-12-01"]),
        (["Jan 31, 2024", "Dec 1, 2023", "unknown"], ["2024-01-31", "2023-12-01", None]),
        (
            [f"2024-01-{day:02d}" for day in range(1, 31)] + ["soon"],
            [f"2024-01-{d:02d}" for d in range(1, 31)] + [None],
        ),
    ],
)
def test_dates_as_people_write_them(cells: list[str], dates: list[str | None]):
    found = column(cells)
    assert found.kind == "date"
    assert found.values.tolist() == pd.to_datetime(pd.Series(dates), format="mixed").tolist()


@pytest.mark.parametrize(
    "cells",
    [
        ["02139", "10001", "02139", "10001"],
        ["NA", "EU", "EU", "NA"],
        ["True", "False", "False", "True"],
        ["1.2.3", "1.10.0", "1.2.3", "1.2.3"],
        ["0-10", "10-20", "0-10", "10-20"],
        ["A1", "A2", "A2", "A1"],
        ["12:30", "13:45", "12:30", "12:30"],
        ["1_000", "2_000", "1_000", "1_000"],
        ["none", "some", "some", "none"],
        ["3", "many", "3", "few", "3", "few", "many", "3"],
    ],
)
def test_categories_keep_their_text(cells: list[str]):
    found = column(cells)
    assert found.kind == "category"
    assert found.values.tolist() == cells


@pytest.mark.parametrize(
    ("cells", "name", "why"),
    [
        (["", "", "", ""], "x", "empty"),
        (["7"] * 8, "x", "one value"),
        ([str(number) for number in range(8)], "x", "in the order of the rows"),
        ([str(100 + 7 * number) for number in range(8)], "x", "in the order of the rows"),
        ([str(900 - number**2) for number in range(8)], "x", "in the order of the rows"),
        (["1", "20", "21", "2", "22", "23", "3", "24", "25"], "x", "in the order of the classes"),
        (["5", "2", "9", "1", "4", "3"], "patient_id", "named so"),
        (["5", "2", "9", "1", "4", "3"], "patientId", "named so"),
        ([f"remark {number}" for number in range(8)], "x", "different texts in most rows"),
    ],
)
def test_columns_that_a_model_should_not_see(cells: list[str], name: str, why: str):
    found = column(cells, name)
    assert found.kind == "left out"
    assert why in found.why


def test_numbers_in_the_order_of_nothing_are_kept():
    assert column(["5", "2", "9", "1", "4", "3"], "paid").kind == "number"
    assert column(["1.5", "2.5", "3.5", "4.5", "5.5", "6.5"]).kind == "number", "a trend is no identifier"


# A table with pictures


@pytest.fixture
def own(tmp_path: Path):
    """Writes a table of pictures of noise, with two classes, and more columns; reads it as the pipeline does."""
    random = np.random.default_rng(0)

    def write(rows: int = 40, **columns: object) -> Path:
        for row in range(rows):
            pixels = random.integers(0, 255, (6, 6), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{row}.png")
        frame = pd.DataFrame({"photo": [f"{row}.png" for row in range(rows)], "kind": ["ant", "bee"] * (rows // 2)})
        frame.assign(**columns).to_csv(tmp_path / "own.csv", index=False)
        return tmp_path / "own.csv"

    return write


def read(path: Path, **options: object) -> Samples:
    return fingerprinted(load("csv", path=path, **{"image_column": "photo", "target_column": "kind"} | options))


@pytest.mark.parametrize("value", ["1e200", "-1.8e308", "inf", "1e12"])
def test_a_number_that_would_drown_its_column_is_named_with_its_line(own, value: str):
    sizes = np.random.default_rng(1).normal(5, 2, 40).round(3).astype(str)
    sizes[33] = value
    data = TabularImageData(read(own(size=sizes)), workers=0)
    assert len(data.warnings) == 1
    assert data.warnings[0].startswith("own.csv, line 35: column 'size' holds ")
    assert data.warnings[0].endswith("the cell counts as missing")
    values = torch_table(data)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(1, abs=0.3)


def torch_table(data: TabularImageData) -> np.ndarray:
    return data.train_table.numpy()


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e300])
def test_a_column_of_extreme_numbers_is_standardised(own, scale: float):
    sizes = np.random.default_rng(1).normal(5, 2, 40)
    plain, scaled = (
        torch_table(TabularImageData(read(own(size=sizes * factor)), workers=0)) for factor in (1.0, scale)
    )
    np.testing.assert_allclose(plain, scaled, rtol=1e-5, atol=1e-6)


def test_amounts_with_a_long_tail_stay(own):
    amounts = np.random.default_rng(1).lognormal(0, 4, 40)
    assert TabularImageData(read(own(amount=amounts)), workers=0).warnings == []


def test_many_categories_take_little_room_and_few_are_one_hot(own):
    names = np.random.default_rng(1).permutation([f"name {row // 2}" for row in range(240)])
    data = TabularImageData(read(own(240, name=names, colour=["red", "blue", "red"] * 80)), workers=0)
    widths = {False: 0, True: 0}
    for place in data.table_columns:
        widths[place.categorical] += place.stop - place.start
    assert widths == {False: 64, True: 2}
    table = data.table[:, :64].numpy()
    assert len({row.tobytes() for row in table}) == 120, "each value has its own code"


def test_a_date_becomes_features(own):
    days = pd.date_range("2020-01-01", periods=40, freq="40D")
    order = np.random.default_rng(1).permutation(40)
    data = TabularImageData(read(own(seen=days[order].strftime("%d.%m.%Y"))), workers=0)
    names = [place.name for place in data.table_columns]
    assert "seen_year" in names
    assert any("month" in name for name in names)
    assert any("weekday" in name for name in names)
    year = data.table[:, names.index("seen_year")].numpy()
    assert np.corrcoef(year, days[order].year)[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_column_that_is_filled_in_one_split_alone_is_read(own, split: str):
    part = np.array(["train", "train", "val", "test"] * 10)
    filled = np.where(part == split, "x", "")
    later = np.where(part == split, "2024-01-05", "")
    number = np.where(part == split, np.arange(40) * 37 % 41, None)
    path = own(part=part, mark=filled, when=later, size=number)
    data = TabularImageData(read(path, split_column="part"), workers=0)
    assert np.isfinite(data.table.numpy()).all()
    assert data.split_sizes == {"train": 20, "val": 10, "test": 10}


def test_lines_in_messages_are_those_of_the_file(own):
    path = own(note=["a\nb"] * 40)
    text = path.read_text().replace("7.png", "absent.png").replace("photo,kind,note\n", "photo,kind,note\n\n\n")
    path.write_text(text)
    lines = [number for number, line in enumerate(text.splitlines(), start=1) if line.startswith("absent.png")]
    with pytest.raises(InputError, match=rf"own\.csv, line {lines[0]}: image .*absent\.png does not exist"):
        TabularImageData(read(path), workers=0)


def test_rows_without_a_picture_are_skipped_as_told_even_when_they_are_most(own):
    path = own(size=np.random.default_rng(1).normal(5, 2, 40))
    frame = pd.read_csv(path)
    frame.loc[:3, "photo"] = ""
    frame.loc[4:23, "photo"] = "absent.png"
    frame.to_csv(path, index=False)
    data = TabularImageData(read(path), workers=0, skip_corrupt=True)
    assert len(data.skipped) == 24
    assert data.samples.ids.tolist() == list(range(26, 42))
    with pytest.raises(InputError, match=r"own\.csv, line 2: no image is named"):
        TabularImageData(read(path), workers=0)


@pytest.mark.parametrize(
    "name",
    ["[size]", "- size", "null", "~", "#size", "a: b", "1", "true", "größe", "a,b", "{x}", "'q'", "&x", "*", " x y"],
)
def test_options_accept_any_column_name(own, name: str):
    sizes = np.random.default_rng(1).normal(5, 2, 40)
    path = own(**{name: sizes})
    options = parse(["--dataset", "csv", "--path", str(path), f"--numeric={name}", "--target_column", "kind"])
    assert read(path, numeric=options.numeric).numeric == [name.strip()]
    options = parse(["--dataset", "csv", "--path", str(path), f"--group_column={name}"])
    assert read(path, group_column=options.group_column).groups is not None


@pytest.mark.parametrize("given", ["[a, b]", "a,b", "a, b", ["a", "b"]])
def test_several_columns_are_a_list(own, given: str | list[str]):
    path = own(a=range(40), b=range(40, 80), c=np.random.default_rng(1).normal(5, 2, 40))
    options = parse(["--dataset", "csv", f"--numeric={given}"]).numeric if isinstance(given, str) else given
    assert read(path, numeric=options).numeric == ["a", "b"]
    assert read(path).numeric == ["c"]


def test_an_empty_list_names_nothing(own):
    path = own(size=np.random.default_rng(1).normal(5, 2, 40), colour=["red", "blue"] * 20)
    none = parse(["--dataset", "csv", "--numeric=[]"]).numeric
    assert (read(path).numeric, read(path, numeric=none).numeric) == (["size"], [])
    assert read(path, numeric=none).categorical == ["colour"]


def test_several_image_columns_make_a_mosaic(own):
    path = own(back=[f"{39 - row}.png" for row in range(40)])
    samples = read(path, image_column="[photo, back]")
    assert [picture.name for picture in samples.images[3]] == ["3.png", "36.png"]


# Leaks


def told(samples: Samples) -> str:
    return "\n".join(leaks(samples, split_rows(samples)))


def test_one_picture_in_two_splits_is_told(own):
    path = own()
    (path.parent / "11.png").write_bytes((path.parent / "0.png").read_bytes())
    part = ["train", "train", "val", "test"] * 10
    frame = pd.read_csv(path).assign(part=part)
    frame.to_csv(path, index=False)
    sentence = told(read(path, split_column="part"))
    assert "1 pictures are in more than one split" in sentence
    assert "line 2 (train) and line 13 (test)" in sentence
    assert "--group_column" in sentence
    frame["part"] = ["train", "train", "val", "test", *["train", "train", "val", "test"] * 9]
    frame.loc[11, "part"] = "train"
    frame.to_csv(path, index=False)
    assert told(read(path, split_column="part")) == ""


@pytest.mark.parametrize(
    "values",
    [
        ["ant", "bee"] * 20,
        ["yes", "no"] * 20,
        [3, 7] * 20,
        np.tile([1.0, 9.0], 20) + np.random.default_rng(0).normal(0, 0.1, 40),
        [f"{kind}{row % 5}" for row, kind in enumerate(["x", "y"] * 20)],
    ],
)
def test_a_column_that_tells_the_target_is_told(own, values: list):
    sentence = told(read(own(code=values)))
    assert "column 'code' alone tells the class of 100% of the held-out rows" in sentence
    assert "leave the column out" in sentence


def test_an_informative_column_is_no_leak(own):
    random = np.random.default_rng(1)
    size = np.tile([0.0, 1.0], 100) + random.normal(0, 0.7, 200)
    colour = np.where(random.random(200) < 0.85, np.tile(["red", "blue"], 100), "green")
    assert told(read(own(200, size=size, colour=colour))) == ""


@pytest.mark.parametrize(
    "values",
    [
        [f"patient {row // 2}" for row in range(80)],
        [f"{row // 2 * 2 % 79} {row // 40}" for row in range(80)],
        [(row // 4 * 2 + row % 2) * 37 % 1009 for row in range(80)],
    ],
)
def test_members_that_are_torn_apart_are_told_unless_grouped(own, values: list):
    path = own(80, member=values)
    sentence = told(read(path))
    assert "share their value of column 'member' with training rows" in sentence
    assert "--group_column member" in sentence
    assert told(read(path, group_column="member")) == ""


def test_ages_are_no_members(own):
    assert told(read(own(80, age=np.random.default_rng(0).integers(20, 60, 80)))) == ""


def test_the_kinds_and_the_file_are_printed(own):
    path = own(size=["1.5", "2,000.5"] * 20, unsure=["3", "1", "?", "2"] * 10)
    note = read(path).note
    assert note.startswith("columns of own.csv (UTF-8, separated by commas):\n")
    assert re.search(r"size +number +- +numbers; comma between thousands", note)
    assert re.search(
        r"unsure +number +25% +numbers; '\?' in line 4 counts as missing; '\?' in line 8 .*as do 8 more", note
    )
