"""Does surgery help? GAAL against alternation without it, and against concatenation, over seeds.

Runs `examples/tabular_image/train.py` for every variant and seed, each into a folder of its own. An interrupted
benchmark continues where it stopped, finished runs are never repeated. Then prints, and writes as CSV, the test
accuracies, the share of steps in conflict, and paired tests of GAAL against every other variant.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pandas as pd
from jsonargparse import auto_cli
from scipy.stats import ttest_rel

TRAIN = Path(__file__).resolve().parents[2] / "examples" / "tabular_image" / "train.py"

# One protocol for every variant: small CNN, AdamW, cosine schedule, the epoch with the best validation accuracy.
COMMON = "--optimizer adamw --learning_rate 0.003 --weight_decay 0.01 --schedule cosine --augment true"
# 16 leaves a species: 80% of the rows train, and every species still has a row in validation and test.
LEAVES = "--dataset leaves100 --epochs 40 --validation 0.08 --test 0.12"
SETS = {
    "leaves100-texture": f"{LEAVES} --table texture",
    "leaves100-margin": f"{LEAVES} --table margin",
    "fashion": "--dataset fashion --epochs 12",
}
VARIANTS = {
    "concatenation": "--method concatenation",
    "alternating": "--method alternating",
    "gaal": "--method gaal",
    "gaal-update": "--method gaal --align update",
}
FUSIONS = ("mean", "product", "calibrated")


def main(
    dataset: Literal["leaves100-texture", "leaves100-margin", "fashion"],
    data_root: str = "data",
    seeds: int = 5,
    variants: list[str] | None = None,
    jobs: int = 2,
    runs: str = "runs/surgery",
    train: bool = True,
    out: str | None = None,
) -> None:
    """Run what is missing, then summarise.

    Args:
        dataset: the set, with its protocol.
        data_root: folder with one folder a data set.
        seeds: how many seeds, from 0.
        variants: which of concatenation, alternating, gaal, gaal-update; None takes all.
        jobs: runs at a time, one thread each.
        runs: where the run folders go.
        train: train what is missing; false summarises the finished runs alone.
        out: CSV file of the results, one row a run; None writes none.
    """
    chosen = {
        (variant, seed): Path(runs) / f"{dataset}-{variant}-seed{seed}"
        for seed in range(seeds)
        for variant in variants or VARIANTS
    }
    missing = {run: folder for run, folder in chosen.items() if not (folder / "results.json").exists()}
    if train:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda run: _train(dataset, *run, data_root, missing[run]), missing))
    else:
        chosen = {run: folder for run, folder in chosen.items() if run not in missing}
    rows = [_measured(dataset, *run, folder) for run, folder in chosen.items()]
    if not rows:
        raise SystemExit(f"there is no finished run of {dataset} in {runs}")
    table = pd.DataFrame(rows).sort_values(["variant", "seed"], ignore_index=True)
    if out is not None:
        table.to_csv(out, index=False)
    _summarise(table)


def _train(dataset: str, variant: str, seed: int, data_root: str, folder: Path) -> None:
    machine = ["--data_root", data_root, "--threads", "1", "--workers", "0", "--out", str(folder)]
    resume = ["--resume", "true"] if folder.exists() else []
    options = f"{SETS[dataset]} {VARIANTS[variant]} {COMMON} --seed {seed}".split()
    training = subprocess.run([sys.executable, str(TRAIN), *options, *machine, *resume], capture_output=True, text=True)
    if training.returncode != 0:
        raise SystemExit(f"{folder} failed: {training.stderr.strip().splitlines()[-1]}")
    print(f"finished {folder}", flush=True)


def _measured(dataset: str, variant: str, seed: int, folder: Path) -> dict[str, object]:
    measured = json.loads((folder / "results.json").read_text())
    test = measured["test"]
    row: dict[str, object] = {"set": dataset, "variant": variant, "seed": seed, "fused": test["fused"]["accuracy"]}
    row |= {name: test[name]["accuracy"] for name in ("image", "table")}
    row |= {f"{split}_{name}": measured["fusions"][name][split] for name in FUSIONS for split in ("val", "test")}
    row |= {f"conflict_{turn['modality']}": turn["conflict"] for turn in measured.get("conflict") or []}
    return row


def _summarise(table: pd.DataFrame) -> None:
    figures = ["fused", *(f"test_{name}" for name in FUSIONS), "image", "table"]
    figures += [name for name in table if name.startswith("conflict_")]
    by_variant = table.groupby("variant", sort=False)[figures]
    means = by_variant.mean().round(4).assign(seeds=by_variant.size())
    print(f"\n{table['set'][0]}: mean over seeds\n{means.to_string()}")
    print(f"\nstandard deviation\n{by_variant.std().round(4).to_string()}")
    if "gaal" not in set(table["variant"]):
        return
    print("\ngaal minus the other, paired by seed: mean difference, and p of scipy.stats.ttest_rel")
    gaal = table[table["variant"] == "gaal"].set_index("seed")
    for variant, other in table[table["variant"] != "gaal"].groupby("variant"):
        other = other.set_index("seed")
        for figure in ("fused", "test_product", "test_calibrated", "image", "table"):
            pairs = pd.concat([gaal[figure], other[figure]], axis=1, join="inner").to_numpy()
            if len(pairs) < 2:
                continue
            test = ttest_rel(pairs[:, 0], pairs[:, 1])
            print(f"{variant:<16}{figure:<17}{(pairs[:, 0] - pairs[:, 1]).mean():+.4f}  p = {test.pvalue:.3f}")


if __name__ == "__main__":
    auto_cli(main)
