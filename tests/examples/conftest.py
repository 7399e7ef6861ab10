from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV of 72 pictures: three classes, told apart by brightness and by a number."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    kinds = np.arange(72) % 3
    for row, kind in enumerate(kinds):
        pixels = np.clip(generator.normal(80 * kind + 40, 40, (8, 8)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
    frame = pd.DataFrame(
        {
            "picture": [f"{row}.png" for row in range(72)],
            "kind": np.array(["ant", "bee", "cat"])[kinds],
            "size": generator.normal(kinds, 1.0),
            "colour": generator.choice(["red", "green"], 72),
        }
    )
    frame.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


@pytest.fixture
def arguments(table):
    """Builds a command line on that CSV."""

    def build(out, **options):
        given = {
            **{"dataset": "csv", "path": table, "image_column": "picture", "target_column": "kind"},
            **{"epochs": 2, "batch_size": 16, "image_size": 8, "workers": 0, "threads": 1, "accelerator": "cpu"},
            **{"out": out},
        }
        return [str(word) for name, value in (given | options).items() for word in (f"--{name}", value)]

    return build
