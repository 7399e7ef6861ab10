"""CelebA (Liu et al., 2015): a face; its 39 other attributes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from torchvision.datasets import CelebA
from torchvision.datasets.utils import check_integrity

from ..errors import InputError
from . import PAGES
from .paper import require
from .samples import Samples


def celeba(root: Path) -> Samples:
    """Whether a face counts as attractive, from the face and its 39 other attributes; 202,599 rows.

    Layout of `root`, which is also torchvision's: `img_align_celeba/NNNNNN.jpg`; `list_attr_celeba.txt`: the number of
    rows, the names of the attributes, then a file and 40 times 1 or -1 in each row; `list_eval_partition.txt`: a file
    and 0, 1 or 2 for training, validation or test (162,770 / 19,867 / 19,962), which is the one protocol.

    The two lists are compared with the MD5 sums that torchvision publishes. torchvision's dataset class is not used:
    the class needs four more lists, and holds all lists as Python objects while reading.

    The reference configuration has images of 225 pixels: `--image_size 225`.

    Args:
        root: The folder of the set.

    Raises:
        InputError: The set is not prepared, or a list differs from the published list.
    """
    require("celeba", root, "img_align_celeba")
    attributes = pd.read_csv(_checked(root, "list_attr_celeba.txt"), sep=r"\s+", skiprows=1)
    partition = pd.read_csv(
        _checked(root, "list_eval_partition.txt"), sep=r"\s+", names=["file", "split"], index_col="file"
    )["split"]
    target = attributes.pop("Attractive").map({1: "attractive", -1: "not attractive"})
    files = pd.Series(attributes.index, name="file")
    return Samples(
        name="celeba",
        images=[(root / "img_align_celeba" / file,) for file in files],
        table=attributes.reset_index(drop=True),
        numeric=[],
        categorical=list(attributes.columns),
        target=target.reset_index(drop=True),
        ids=files,
        split=files.map(partition).map({0: "train", 1: "val", 2: "test"}),
        image_size=128,
    )


def _checked(root: Path, name: str) -> Path:
    path = require("celeba", root, name)
    md5 = next(md5 for _, md5, published in CelebA.file_list if published == name)
    if not check_integrity(path, md5):
        raise InputError(f"{path} is not the published file (MD5 sum {md5}); download it again from {PAGES['celeba']}")
    return path
