"""SUN Attribute (Patterson and Hays, 2012): a photograph of a scene; its 101 other attributes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.io import loadmat

from ..errors import InputError
from .paper import fix_split, require
from .samples import Samples

_TARGET = "open area"
_LEAST = 2 / 3 - 0.01  # two of three votes, stored as 0.6667 or 0.6666, but not one of two


def sun(root: Path) -> Samples:
    """Whether a scene is an open area, from the photograph and the 101 other attributes; 14,340 rows.

    Layout of `root`: `SUNAttributeDB/attributes.mat` (102 names), `images.mat` (14,340 paths below `images/`, such as
    `a/abbey/sun_*.jpg`) and `attributeLabels_continuous.mat` (14,340 x 102, the share of three votes); and `images/`.

    An attribute holds where at least two of three votes say so, in the target and in the table. The publisher fixes no
    split. The one protocol is 70% to train, 10% to validate and 20% to test, stratified, always with the same seed.

    The trap: "enclosed area" and "semi-enclosed area" look like the target's complement. The released code drops both
    columns for its table-only model (99 columns), and keeps both for its fused models (101). Here every method reads
    the same 101 columns.

    The reference configuration has images of 225 pixels: `--image_size 225`.

    Args:
        root: The folder of the set.

    Raises:
        InputError: The set is not prepared, or its files do not belong together.
    """
    folder = root / "SUNAttributeDB"
    pictures = require("sun", root, "images")
    names, images, votes = (
        loadmat(require("sun", root, f"SUNAttributeDB/{file}.mat"))[variable]
        for file, variable in (
            ("attributes", "attributes"),
            ("images", "images"),
            ("attributeLabels_continuous", "labels_cv"),
        )
    )
    columns = [str(cell.item()).strip() for cell in names.ravel()]
    paths = [str(cell.item()).strip() for cell in images.ravel()]
    if votes.shape != (len(paths), len(columns)) or _TARGET not in columns:
        raise InputError(
            f"the files in {folder} do not belong together: {len(paths)} images, {len(columns)} attributes with "
            f"{_TARGET!r} among them, and votes of shape {votes.shape}; extract the published archive again"
        )
    table = pd.DataFrame(np.where(votes >= _LEAST, "yes", "no"), columns=columns)
    target = table.pop(_TARGET).map({"yes": _TARGET, "no": f"no {_TARGET}"})
    samples = Samples(
        name="sun",
        images=[(pictures / path,) for path in paths],
        table=table,
        numeric=[],
        categorical=list(table.columns),
        target=target,
        ids=pd.Series(paths, name="image"),
        image_size=128,
    )
    return fix_split(samples, validation=0.1, test=0.2)
