"""Miniatures of the archives that DVM-CAR, CelebA and SUN Attribute publish, down to their oddities."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.io import savemat

_ADVERT = ["Maker", "Genmodel", "Genmodel_ID", "Adv_ID", "Adv_year", "Adv_month", "Color", "Reg_year", "Bodytype"]
_ADVERT += ["Runned_Miles", "Engin_size", "Gearbox", "Fuel_type", "Price"]
_EXTRA = ["Engine_power", "Annual_Tax", "Wheelbase", "Height", "Width", "Length", "Average_mpg", "Top_speed"]
_HEADERS = {
    "Ad_table.csv": [*_ADVERT, "Seat_num", "Door_num"],
    "Ad_table (extra).csv": [*_ADVERT, *_EXTRA, "Seat_num", "Door_num"],
    "Price_table.csv": ["Maker", "Genmodel", "Genmodel_ID", "Year", "Entry_price"],
    "Image_table.csv": ["Genmodel_ID", "Image_ID", "Image_name", "Predicted_viewpoint", "Quality_check"],
}
# Names that the originals write with a blank in front.
_BLANK = {"Genmodel", "Genmodel_ID", "Year", "Entry_price"}
_BLANK |= {"Image_ID", "Image_name", "Predicted_viewpoint", "Quality_check"}
ATTRIBUTES = [
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald"),
    *("Bangs", "Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair"),
    *("Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin"),
    *("Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones"),
    *("Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard"),
    *("Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks"),
    *("Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings"),
    *("Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young"),
]


def picture(value: int = 100) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 50, 50)).save(stream, "JPEG")
    return stream.getvalue()


def dvm_tables(models: dict[str, int]) -> dict[str, pd.DataFrame]:
    """Tables of so many adverts of each model, two photographs each, nothing missing; to be spoilt by a test."""
    adverts = pd.DataFrame(
        [
            {
                **{"Maker": "Abarth", "Genmodel": "124 Spider", "Genmodel_ID": model, "Adv_ID": f"{model}$${number}"},
                **{"Adv_year": 2018, "Adv_month": 4, "Color": "Blue", "Reg_year": 2016.0 + number % 2},
                **{"Bodytype": "Saloon", "Runned_Miles": 1000 + number, "Engin_size": "1.4L", "Gearbox": "Manual"},
                **{"Fuel_type": "Petrol", "Price": 9000 + number, "Seat_num": 2.0, "Door_num": 2.0},
                **{"Engine_power": 170.0, "Annual_Tax": "145*", "Wheelbase": 2000, "Height": 1000, "Width": 3000},
                **{"Length": 4000, "Average_mpg": "44.1 mpg", "Top_speed": "143 mph"},
            }
            for model, count in models.items()
            for number in range(1, count + 1)
        ]
    ).astype(object)
    prices = pd.DataFrame(
        [
            {"Maker": "Abarth", "Genmodel": "124 Spider", "Genmodel_ID": model, "Year": year, "Entry_price": year * 10}
            for model in models
            for year in (2015, 2016, 2017)
        ]
    ).astype(object)
    images = pd.DataFrame(
        [
            {
                **{"Genmodel_ID": model, "Image_ID": f"{advert}$${view}"},
                "Image_name": f"Abarth$$124 Spider$${year:.0f}$${colour}$${advert}$$image_{view}.jpg",
                **{"Predicted_viewpoint": 45 * view, "Quality_check": "P" if view == 0 else None},
            }
            for model, advert, year, colour in adverts[["Genmodel_ID", "Adv_ID", "Reg_year", "Color"]].itertuples(
                index=False
            )
            for view in (1, 0)
        ]
    )
    return {
        "Ad_table.csv": adverts[_HEADERS["Ad_table.csv"]].copy(),
        "Ad_table (extra).csv": adverts[_HEADERS["Ad_table (extra).csv"]].copy(),
        "Price_table.csv": prices,
        "Image_table.csv": images,
    }


def write_dvm_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        header = [f" {column}" if column in _BLANK else column for column in frame.columns]
        if name == "Image_table.csv":
            header[0] = header[0].strip()
        frame.to_csv(
            folder / name,
            header=header,
            index=False,
            lineterminator="\r\n",
            encoding="utf-8-sig" if name == "Ad_table (extra).csv" else "utf-8",
        )
    (folder / "Basic_table.csv").write_text(
        "Automaker,Automaker_ID,Genmodel,Genmodel_ID\r\nAbarth,2,124 Spider,2_1\r\n"
    )
    (folder / "Sales_table.csv").write_text("Maker,Genmodel ,Genmodel_ID ,2020,2019\r\nABARTH,ABARTH 124,2_1,0,9\r\n")
    (folder / "Trim_table.csv").write_text("Genmodel_ID,Maker,Genmodel,Trim\r\n2_1,Abarth,124 Spider,Base\r\n")


def write_dvm(folder: Path, tables: dict[str, pd.DataFrame], without: tuple[str, ...] = ()) -> None:
    """The two archives; `without` names photographs that the second lacks."""
    write_dvm_tables(folder / "unpacked", tables)
    with zipfile.ZipFile(folder / "tables_V2.0.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.mkdir("tables_V2.0")
        for path in (folder / "unpacked").iterdir():
            zipped.write(path, f"tables_V2.0/{path.name}")
        zipped.writestr("__MACOSX/tables_V2.0/._Ad_table.csv", b"\0")
    with zipfile.ZipFile(folder / "resized_DVM_v2.zip", "w") as zipped:
        zipped.mkdir("resized_DVM")
        for name in tables["Image_table.csv"]["Image_name"]:
            if name not in without:
                zipped.writestr("/".join(["resized_DVM", *name.split("$$")[:4], name]), picture())
        zipped.writestr(f"__MACOSX/resized_DVM/._{tables['Image_table.csv']['Image_name'].iloc[1]}", b"\0")


def write_celeba(folder: Path, rows: int = 60, newline: str = "\n") -> list[tuple[str, str, str]]:
    """The zip and the two lists; returns them as torchvision lists the originals: id, MD5 sum and name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{row:06d}.jpg" for row in range(1, rows + 1)]
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as zipped:
        zipped.mkdir("img_align_celeba")
        for row, file in enumerate(files):
            zipped.writestr(f"img_align_celeba/{file}", picture(row))
    values = np.where(np.random.default_rng(0).random((rows, len(ATTRIBUTES))) < 0.5, 1, -1)
    values[:, ATTRIBUTES.index("Attractive")] = np.where(np.arange(rows) % 2, 1, -1)
    lines = [str(rows), " ".join(ATTRIBUTES) + " "]
    lines += [file + "".join(f" {value:2d}" for value in row) for file, row in zip(files, values, strict=True)]
    (folder / "list_attr_celeba.txt").write_bytes((newline.join(lines) + newline).encode())
    parts = [f"{file} {0 if row < rows / 2 else 1 if row < 3 / 4 * rows else 2}" for row, file in enumerate(files)]
    (folder / "list_eval_partition.txt").write_bytes((newline.join(parts) + newline).encode())
    return [
        ("some-id", hashlib.md5((folder / name).read_bytes()).hexdigest(), name)
        for name in ("img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt")
    ]


def sun_names() -> list[str]:
    names = [f"attribute {number}" for number in range(102)]
    names[0] = "sailing/ boating"
    names[60:63] = ["open area", "semi-enclosed area", "enclosed area"]
    return names


def write_sun(folder: Path, votes: np.ndarray) -> list[str]:
    """The two archives; `votes` of shape (N, 102). Returns the paths of the N photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [f"a/abbey/sun_{row:04d}.jpg" if row % 2 else f"z/zoo/sun_{row:04d}.jpg" for row in range(len(votes))]
    files = {}
    for name, variable, value in (
        ("attributes", "attributes", _cells(sun_names())),
        ("images", "images", _cells(paths)),
        ("attributeLabels_continuous", "labels_cv", votes),
    ):
        stream = io.BytesIO()
        savemat(stream, {variable: value}, do_compression=True)
        files[f"SUNAttributeDB/{name}.mat"] = stream.getvalue()
    write_tar(folder / "SUNAttributeDB.tar.gz", files)
    write_tar(
        folder / "SUNAttributeDB_Images.tar.gz", {f"images/{path}": picture(row) for row, path in enumerate(paths)}
    )
    return paths


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _cells(texts: list[str]) -> np.ndarray:
    """A column of strings as Matlab's cell array."""
    cells = np.empty((len(texts), 1), dtype=object)
    cells[:, 0] = texts
    return cells
