"""One-hundred plant species leaves (Mallah, Cope and Orwell, 2013; UCI): a silhouette and a histogram of the leaf."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..errors import InputError
from .samples import Samples

_FILES = {"texture": "data_Tex_64.txt", "margin": "data_Mar_64.txt", "shape": "data_Sha_64.txt"}


def leaves100(root: Path, table: str = "texture") -> Samples:
    """Leaf silhouettes and a 64-number description of each leaf; 99 or 100 species of 16 leaves.

    Layout of `root`: `data/Genus_Species/*_NN.ab.jpg`, grey masks, and `data_{Tex,Mar,Sha}_64.txt` without a header:
    the species, then 64 numbers.

    Row k of a species *within a file* belongs to picture number k of that species. There are two traps. The shape file
    lists the species in another order than the other files, so rows are never joined by their number in the file. The
    texture file lacks a row of Acer Campestre, and nothing says which row. With texture that species is therefore left
    out (99 species).

    Args:
        root: The folder of the set.
        table: "texture", "margin" or "shape". The texture is from a photograph that the set lacks, so the texture adds
            to the silhouette.

    Raises:
        InputError: An unknown `table`, or a file is missing.
    """
    if table not in _FILES:
        raise InputError(f"leaves100 has no table {table!r}; choose one of {', '.join(_FILES)}")
    path = root / _FILES[table]
    if not path.is_file():
        raise InputError(f"{path} does not exist; {root} must hold the leaves100 set as UCI publishes it")
    numbers = [f"{table}_{place:02d}" for place in range(1, 65)]
    frame = pd.read_csv(path, names=["species", *numbers])
    pictures = pd.DataFrame({"path": sorted((root / "data").glob("*/*.ab.jpg"))})
    if pictures.empty:
        raise InputError(f"{root / 'data'} holds no *.ab.jpg; it must hold one folder of leaf masks a species")
    pictures["species"] = [picture.parent.name.replace("_", " ") for picture in pictures["path"]]
    # The case of the file names varies between species, so the number alone orders them.
    pictures["number"] = pictures["path"].map(lambda picture: int(picture.name.split("_")[-1].split(".")[0]))
    pictures = pictures.sort_values(["species", "number"])

    frame["place"] = frame.groupby("species").cumcount()
    pictures["place"] = pictures.groupby("species").cumcount()
    incomplete = frame["species"].value_counts().ne(pictures["species"].value_counts(), fill_value=0)
    frame = frame[~frame["species"].isin(incomplete.index[incomplete])]
    joined = frame.merge(pictures, on=["species", "place"], validate="one_to_one").reset_index(drop=True)
    left_out = ", ".join(incomplete.index[incomplete])
    return Samples(
        name=f"leaves100 ({table})",
        images=[(path,) for path in joined["path"]],
        table=joined[numbers],
        numeric=numbers,
        categorical=[],
        target=joined["species"],
        ids=(joined["species"] + " " + joined["number"].map("{:02d}".format)).rename("leaf"),
        grey=True,
        note=f"left out, because pictures and table rows do not match: {left_out}" if left_out else "",
    )
