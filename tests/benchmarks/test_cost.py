"""The cost benchmarks at tiny sizes: whole commands, and tables whose ratios follow from their times; no timing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import guide
import launches
import numpy as np
import pandas as pd
import projection
import pytest
import scaling
import start
import step
import timing
import torch

import gaal_surgery

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch):
    """Few and small operands, and the number of threads as it was."""
    monkeypatch.setattr(timing, "OUT_OF_CACHE", 2**16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(out: Path, name: str) -> pd.DataFrame:
    assert (out / f"{name}.png").stat().st_size > 0
    table = pd.read_csv(out / f"{name}.csv")
    assert table["machine"].str.contains("torch").all()
    return table


def assert_positive(table: pd.DataFrame, *columns: str) -> None:
    values = table[list(columns)].to_numpy(dtype=float)
    assert np.isfinite(values).all()
    assert (values > 0).all()


def assert_ratio_to(table: pd.DataFrame, ratio: str, value: str, baseline: str, by: list[str]) -> None:
    """`ratio` is `value` over that of the way `baseline`, within each group."""
    reference = table[table["way"] == baseline].set_index(by)[value]
    expected = table[value] / pd.MultiIndex.from_frame(table[by]).map(reference)
    np.testing.assert_allclose(table[ratio], expected, rtol=1e-9)


@pytest.mark.slow
def test_steps(tmp_path: Path):
    step.main(["small"], [4], [5, 3], [2, 3], image_size=16, repeats=1, out=tmp_path)
    size = ["encoder", "batch", "classes", "modalities"]
    ways = read(tmp_path, "step")
    assert len(ways[size].drop_duplicates()) == 3
    assert set(ways["way"]) >= {
        "joint",
        "plain",
        "fresh",
        "fresh, run anew",
        "fresh, joint turn",
        "cached",
        "update, fresh",
        "authors",
        "TorchJD UPGrad",
    }
    assert_positive(ways, "ms", "lower_quartile", "upper_quartile", "peak_mib")
    assert_ratio_to(ways, "/ plain", "ms", "plain", size)
    assert_ratio_to(ways, "/ authors", "ms", "authors", size)
    assert_ratio_to(ways, "peak / plain", "peak_mib", "plain", size)
    surgery = read(tmp_path, "step-surgery")
    assert surgery["turn"].tolist() == ["table1", "image", "round"] * 2 + ["table1", "table2", "image", "round"]
    assert_positive(surgery, "encoder_ms", "plain_ms")
    np.testing.assert_allclose(surgery["surgery / plain"], surgery["surgery_ms"] / surgery["plain_ms"], rtol=1e-9)


def test_guided_ways_have_guides_and_others_have_none():
    rounds = step.Rounds(step.Size("small", 4, 5, 2), image_size=16, device=CPU)
    for name, way in rounds.ways().items():
        if isinstance(getattr(way, "args", [None])[0], step.GradientAlignedAlternator):
            way()
            assert bool(way.args[0].stats.guides) == (name != "plain")


def test_the_joint_turn_trains_every_part():
    rounds = step.Rounds(step.Size("small", 4, 5, 3), image_size=16, device=CPU)
    ways = rounds.ways()
    for way, parts in ("fresh", [rounds.encoders, rounds.head]), ("fresh, joint turn", rounds.trained):
        before = [parameter.clone() for parameter in rounds.trained.parameters()]
        ways[way]()
        moved = [not torch.equal(*pair) for pair in zip(rounds.trained.parameters(), before, strict=True)]
        assert sum(moved) == sum(len(list(part.parameters())) for part in parts), way


@pytest.mark.slow
def test_guide_gradients(tmp_path: Path):
    guide.main(["6x3", "8x4"], [2, 20], hidden=5, repeats=1, out=tmp_path)
    table = read(tmp_path, "guide")
    assert set(table["head"]) == {"Linear 6x3", "Linear 8x4", "MLP 8x5x4"}
    assert_positive(table, "ms", "/ baseline", "peak_mib", "copy_gb_s", "gflop_s")
    linear = table[table["head"].str.startswith("Linear")].reset_index()
    assert_positive(linear, "floor_ms")
    assert_ratio_to(linear, "/ baseline", "ms", "closed form", ["head", "k"])
    np.testing.assert_allclose(linear["/ floor"], linear["ms"] / linear["floor_ms"], rtol=1e-9)


def test_samples_gradients_that_would_not_fit_are_left_out(tmp_path: Path):
    guide.main(["6x3"], [2], per_sample_gib=0, repeats=1, out=tmp_path)
    assert not read(tmp_path, "guide")["way"].str.contains("vmap").any()


def test_ways_to_the_guide_gradient_agree():
    head, features, target = torch.nn.Linear(6, 3), torch.randn(20, 6), torch.randint(3, (20,))
    expected = list(guide.guide_gradient(head, features, target, torch.nn.functional.cross_entropy).values())
    for way in (guide.closed_form, guide.per_sample_mean, guide.chunked_mean, guide.mean_backward):
        torch.testing.assert_close(list(way(head, features, target)), expected)
    clipped = guide.guide_gradient(head, features, target, torch.nn.functional.cross_entropy, max_norm=0.5)
    torch.testing.assert_close(guide.closed_form(head, features, target, 0.5), list(clipped.values()))


@pytest.mark.slow
def test_projections(tmp_path: Path):
    projection.main(["6x3", "3*2x2"], [1, 2], compiled=False, repeats=1, out=tmp_path)
    table = read(tmp_path, "projection")
    problem = ["parameters", "guides"]
    assert len(table[problem].drop_duplicates()) == 4
    assert_positive(table, "ms", "/ floor", "/ cached floor")
    both = table[table["stage"] == "both"].reset_index()
    assert_ratio_to(both, "/ library/both", "ms", "library", problem)
    copies = both[both["way"] == "copy"]
    np.testing.assert_allclose(copies["/ floor"], 2 / (2 * copies["guides"] + 3), rtol=1e-9)
    assert table["winner"].sum() == 4 * 3
    torchjd = read(tmp_path, "projection-torchjd")
    assert_ratio_to(torchjd, "/ align", "ms", "align", problem)


@pytest.mark.parametrize("way", projection.WAYS)
@pytest.mark.parametrize("shapes", ["7x5", "4*3x2"])
@pytest.mark.parametrize("weights", [[1.0, -0.3, 0.0], [1.0, 0.0, 2.0]])
def test_ways_to_project_agree(way: str, shapes: str, weights: list[float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(projection, "BLOCK", 16)
    gradients = [[torch.randn(shape) for shape in projection.parse(shapes)] for _ in range(3)]
    rival = projection.WAYS[way]
    torch.testing.assert_close(rival.gramian(gradients), projection.gramian(gradients), rtol=1e-5, atol=1e-5)
    expected = gaal_surgery.combine(gradients, torch.tensor(weights))
    rival.combine(gradients, torch.tensor(weights))
    torch.testing.assert_close(gradients[0], expected)


@pytest.mark.slow
def test_scaling(tmp_path: Path):
    scaling.main([4, 8], [3], [5], [1, 2], [1, 2], repeats=1, out=tmp_path)
    table = read(tmp_path, "scaling")
    assert table["factor"].tolist() == ["batch"] * 2 + ["classes", "width"] + ["guides"] * 2 + ["processes"] * 2
    assert_positive(table, "copy_gb_s", "gflop_s")
    np.testing.assert_allclose(table["/ predicted"], table["ms"] / table["predicted_ms"], rtol=1e-9)


@pytest.mark.parametrize(("cache", "where"), [(2**30, "in memory"), (0, "from files")])
def test_a_large_set_begins(
    cache: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(start.TabularImageData.__init__.__kwdefaults__, "cache", cache)
    start.begin(start.write_set(tmp_path, rows=200, side=8), 8, workers=1, batches=1)
    assert f"8 px, {where}" in capsys.readouterr().out


def test_peak_memory_counts_what_is_held_at_once():
    def work() -> None:
        for _ in range(3):
            torch.empty(1000, dtype=torch.uint8)
        kept = [torch.empty(1000, dtype=torch.uint8) for _ in range(2)]
        del kept

    assert timing.peak_memory(work, CPU) == 2000


def test_every_way_runs_equally_often():
    calls: list[str] = []
    seconds = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, repeats=4)
    assert seconds.shape == (4, 3)
    assert sorted(calls) == sorted("abc" * (timing.WARM_UP + 4))


NEEDS_TRITON = pytest.mark.skipif(
    find_spec("triton") is None or torch.__version__ < "2.7", reason="needs triton 3.3, which torch 2.7 brings"
)


class TestLaunches:
    """How many operators a device's path takes."""

    @staticmethod
    def linear():
        return launches.HEADS["Linear 2048x286"]()

    @pytest.mark.parametrize(("kernels", "most"), [(False, 24), pytest.param(True, 14, marks=NEEDS_TRITON)])
    def test_of_align(self, kernels, most):
        assert 0 < launches.of_align(self.linear(), 1, fused=kernels).total() <= most

    @pytest.mark.parametrize(("kernels", "most"), [(False, 40), pytest.param(True, 30, marks=NEEDS_TRITON)])
    def test_of_a_guided_step(self, kernels, most):
        assert 0 < launches.of_step(self.linear(), 1, fused=kernels).total() <= most

    @NEEDS_TRITON
    def test_the_kernels_are_launched_once_each(self):
        counts = launches.of_align(self.linear(), 1, fused=True)
        assert {counts[f"gaal_surgery::{name}"] for name in ("inner_products", "weighted_sum")} == {1}

    def test_views_and_allocations_are_left_out_and_fills_counted(self):
        tensor = torch.empty(4, 3, device="meta")
        with launches.Launches() as counted:
            torch.empty_like(tensor[:2].T.detach()).unbind()
            torch.zeros(3, device="meta")
            tensor.copy_(tensor.double())
            torch._foreach_copy_([tensor], [tensor])
        assert counted.counts == {"zeros": 1, "_to_copy": 1, "copy_": 1, "_foreach_copy_": 1}

    @pytest.mark.slow
    @NEEDS_TRITON
    def test_the_command(self, capsys):
        launches.main([1])
        assert capsys.readouterr().out.count("fused") == len(launches.HEADS)
