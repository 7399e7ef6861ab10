import json
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from matplotlib.figure import Figure
from strategies import problems

from gaal_surgery import AlignmentStats, ConflictMonitor, HalfSpace, Orthogonal, gramian
from gaal_surgery.projection import weigh
from gaal_surgery.stats import plot_cosines

NAMES = ("image", "table", "audio", "text", "video")
MAPPINGS = ("cosine_before", "cosine_after", "coefficient", "guide_norm", "intervened", "ignored")
COLUMNS = ["step", "modality", "guide", "gradient_norm", *MAPPINGS]


RULE = HalfSpace()


def stats_of(gradient, guides, rule=RULE, modality="tactile"):
    vectors = [torch.as_tensor(vector, dtype=torch.float64) for vector in (gradient, *guides)]
    products = gramian(vectors)
    return AlignmentStats(modality, NAMES[: len(guides)], products, weigh(products, rule))


def measured(before, after, modality="tactile"):
    """A step in conflict with its guides, whose samples it hurts in these shares."""
    stats = stats_of([3.0, 4.0], [[-2.0, 0.0]] * len(before), modality=modality)
    return replace(stats, hurt=torch.tensor([before, after]))


def values(mapping):
    return [tensor.item() for tensor in mapping.values()]


def cosines(vector, guides):
    """Cosine with every guide; 0 where a vector is 0, or as good as."""
    norms = np.linalg.norm(vector) * np.linalg.norm(guides, axis=1)
    return np.divide(guides @ vector, norms, out=np.zeros(len(guides)), where=norms > 0)


class TestAlignmentStats:
    @given(problems())
    def test_agree_with_the_vectors_themselves(self, problem):
        rule = HalfSpace(0.3, relative=True)
        stats = stats_of(problem.gradient, problem.guides, rule)
        aligned = problem.aligned(rule)
        assert all(tuple(getattr(stats, name)) == NAMES[: len(problem.guides)] for name in MAPPINGS)
        np.testing.assert_allclose(stats.gradient_norm, np.linalg.norm(problem.gradient))
        np.testing.assert_allclose(values(stats.guide_norm), np.linalg.norm(problem.guides, axis=1))
        np.testing.assert_allclose(values(stats.cosine_before), cosines(problem.gradient, problem.guides), atol=1e-12)
        rebuilt = problem.gradient + values(stats.coefficient) @ problem.guides
        np.testing.assert_allclose(rebuilt, aligned, atol=1e-9)
        if np.linalg.norm(aligned) > 1e-6 * np.linalg.norm(problem.gradient):
            np.testing.assert_allclose(values(stats.cosine_after), cosines(aligned, problem.guides), atol=1e-6)
        assert values(stats.intervened) == [coefficient != 0 for coefficient in values(stats.coefficient)]
        assert not any(values(stats.ignored))

    def test_of_a_step_with_one_guide_of_every_kind(self):
        nan = float("nan")
        stats = stats_of([3.0, 4.0], [[-1.0, 0.0], [0.0, 2.0], [nan, 1.0], [0.0, 0.0]])
        assert stats.modality == "tactile"
        assert values(stats.cosine_before) == pytest.approx([-0.6, 0.8, 0, 0])
        assert values(stats.cosine_after) == pytest.approx([0, 1, 0, 0])
        assert values(stats.coefficient) == pytest.approx([3, 0, 0, 0])
        assert values(stats.guide_norm) == pytest.approx([1, 2, nan, 0], nan_ok=True)
        assert values(stats.intervened) == [True, False, False, False]
        assert values(stats.ignored) == [False, False, True, False]

    def test_a_guide_taken_away_is_an_intervention_too(self):
        stats = stats_of([3.0, 4.0], [[2.0, 0.0]], Orthogonal())
        assert values(stats.coefficient) == pytest.approx([-1.5])
        assert values(stats.intervened) == [True]

    def test_of_a_gradient_that_is_not_finite_show_no_intervention(self):
        stats = stats_of([float("inf"), 1.0], [[-1.0, 2.0]])
        assert stats.gradient_norm.item() == float("inf")
        for name in ("cosine_before", "cosine_after", "coefficient", "intervened", "ignored"):
            assert values(getattr(stats, name)) == [0]

    def test_hold_the_shares_of_hurt_samples_where_they_were_measured(self):
        stats = measured([0.75, 0.5], [0.25, 0.5])
        assert {name: share.item() for name, share in stats.hurt_before.items()} == {"image": 0.75, "table": 0.5}
        assert {name: share.item() for name, share in stats.hurt_after.items()} == {"image": 0.25, "table": 0.5}
        assert stats_of([3.0, 4.0], [[-1.0, 0.0]]).hurt_before == {}

    def test_are_empty_before_the_first_step(self):
        stats = AlignmentStats()
        assert stats.hurt_before == stats.hurt_after == {}
        assert stats.modality is None
        assert stats.gradient_norm is None
        assert all(getattr(stats, name) == {} for name in MAPPINGS)

    def test_reading_and_collecting_them_never_waits_for_the_device(self):
        """On the meta device nothing can be read."""
        stats = AlignmentStats("image", ("a", "b"), torch.ones(3, 3, device="meta"), torch.ones(3, device="meta"))
        ConflictMonitor().update(stats)
        tensors = [tensor for name in MAPPINGS for tensor in getattr(stats, name).values()]
        assert len(tensors) == 2 * len(MAPPINGS)
        assert all(tensor.is_meta and tensor.ndim == 0 for tensor in (*tensors, stats.gradient_norm))


@pytest.fixture
def monitor():
    """Four steps: a turn in conflict, a turn not, one without a guide, and the first again with an ignored guide."""
    monitor = ConflictMonitor()
    monitor.update(stats_of([3.0, 4.0], [[-2.0, 0.0]], modality="table"))
    monitor.update(stats_of([1.0, 0.0], [[1.0, 0.0], [0.0, -1.0]], modality=None))
    monitor.update(AlignmentStats())
    monitor.update(stats_of([1.0, 1.0], [[float("inf"), 0.0]], modality="table"))
    return monitor


class TestConflictMonitor:
    def test_history_has_a_row_for_every_step_and_guide(self, monitor):
        frame = pd.DataFrame(monitor.history())
        assert list(frame) == COLUMNS
        assert frame["step"].tolist() == [0, 1, 1, 3]
        assert frame["modality"].astype(object).where(frame["modality"].notna(), None).tolist() == [
            *("table", None, None, "table")
        ]
        assert frame["guide"].tolist() == ["image", "image", "table", "image"]
        assert frame["gradient_norm"].tolist() == pytest.approx([5, 1, 1, 2**0.5])
        assert frame["cosine_before"].tolist() == pytest.approx([-0.6, 1, 0, 0])
        assert frame["cosine_after"].tolist() == pytest.approx([0, 1, 0, 0])
        assert frame["coefficient"].tolist() == pytest.approx([1.5, 0, 0, 0])
        assert frame["guide_norm"].tolist() == pytest.approx([2, 1, 1, float("inf")])
        assert frame["intervened"].tolist() == [True, False, False, False]
        assert frame["ignored"].tolist() == [False, False, False, True]
        assert frame["intervened"].dtype == frame["ignored"].dtype == bool

    def test_summary_has_a_row_for_every_turn_and_guide(self, monitor):
        table, *others = monitor.summary()
        assert table == {
            **{"modality": "table", "guide": "image", "steps": 2, "conflict": 0.5, "intervened": 0.5},
            **{"cosine_before": pytest.approx(-0.3), "cosine_after": pytest.approx(0)},
        }
        assert [(row["modality"], row["guide"], row["steps"]) for row in others] == [
            (None, "image", 1),
            (None, "table", 1),
        ]
        assert all(row["conflict"] == row["intervened"] == 0 for row in others)

    def test_is_empty_at_first(self):
        monitor = ConflictMonitor()
        assert monitor.history() == {column: [] for column in COLUMNS}
        assert monitor.summary() == []

    def test_reading_in_between_changes_nothing(self, monitor):
        again = ConflictMonitor()
        for stats in (stats_of([3.0, 4.0], [[-2.0, 0.0]], modality="table"), AlignmentStats()):
            again.update(stats)
            again.history()
        again.update(stats_of([1.0, 1.0], [[1.0, 0.0]], modality="table"))
        assert again.history()["step"] == [0, 2]
        assert monitor.history() == monitor.history()

    def test_history_is_a_copy(self, monitor):
        expected = monitor.history()["step"]
        monitor.history()["step"].clear()
        assert monitor.history()["step"] == expected

    @pytest.mark.parametrize("way", ["torch", "json"])
    def test_a_checkpoint_continues_the_history(self, monitor, way, tmp_path):
        path = tmp_path / "monitor"
        if way == "torch":
            torch.save(monitor.state_dict(), path)
            state = torch.load(path, weights_only=True)
        else:
            path.write_text(json.dumps(monitor.state_dict()))
            state = json.loads(path.read_text())
        resumed = ConflictMonitor()
        resumed.update(stats_of([1.0], [[1.0]]))  # forgotten
        resumed.load_state_dict(state)
        assert resumed.history() == monitor.history()
        for each in (monitor, resumed):
            each.update(stats_of([1.0, 0.0], [[-1.0, 0.0]], modality="image"))
        assert resumed.history() == monitor.history()
        assert resumed.history()["step"][-1] == 4

    def test_a_state_dict_does_not_change_with_the_monitor(self, monitor):
        state = monitor.state_dict()
        expected = json.dumps(state)
        resumed = ConflictMonitor()
        resumed.load_state_dict(state)
        for each in (monitor, resumed):
            each.update(stats_of([1.0, 0.0], [[-1.0, 0.0]]))
            each.history()
        assert json.dumps(state) == expected

    def test_hurt_samples_are_recorded_where_they_were_measured(self, monitor):
        monitor.update(measured([0.75], [0.5], modality="table"))
        monitor.update(measured([0.25], [0.0], modality="table"))
        history = monitor.history()
        assert list(history) == [*COLUMNS, "hurt_before", "hurt_after"]
        assert history["hurt_before"] == [None] * 4 + [0.75, 0.25]
        assert history["hurt_after"] == [None] * 4 + [0.5, 0]
        table, *others = monitor.summary()
        assert (table["steps"], table["hurt_before"], table["hurt_after"]) == (4, 0.5, 0.25)
        assert not any("hurt_before" in row or "hurt_after" in row for row in others)
        axes = monitor.plot(Figure().add_subplot())
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels[0] == "table's turn, guide image: 75% of steps in conflict, hurt samples 50%, after surgery 25%"
        assert labels[1] == "guide image: 0% of steps in conflict"

    def test_a_checkpoint_from_before_hurt_samples_were_measured_goes_on(self, monitor):
        resumed = ConflictMonitor()
        resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
        for each in (monitor, resumed):
            each.update(measured([0.75], [0.5], modality="table"))
        again = ConflictMonitor()
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        assert again.history() == resumed.history() == monitor.history()
        assert again.history()["hurt_after"] == [None] * 4 + [0.5]
        assert again.summary() == monitor.summary()

    def test_plots_every_turn_and_guide_with_its_share_of_conflict(self, monitor):
        mpl.use("agg")
        axes = monitor.plot()
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == [
            "table's turn, guide image: 50% of steps in conflict",
            "guide image: 0% of steps in conflict",
            "guide table: 0% of steps in conflict",
        ]
        points = axes.collections[0].get_offsets()
        np.testing.assert_allclose(points, [[0, -0.6], [3, 0]], atol=1e-12)
        axes.figure.canvas.draw()
        mpl.pyplot.close(axes.figure)

    @pytest.mark.parametrize(
        ("smooth", "steps", "drawn"), [(1, [0, 3], [-0.6, 0]), (2, [3], [-0.3]), (100, [3], [-0.3])]
    )
    def test_plots_on_given_axes_the_running_mean_asked_for(self, monitor, smooth, steps, drawn):
        figure = Figure()
        axes = figure.add_subplot()
        assert monitor.plot(axes, smooth=smooth) is axes
        np.testing.assert_allclose(axes.lines[0].get_xydata(), list(zip(steps, drawn, strict=True)), atol=1e-12)

    def test_the_plot_spans_the_cosines_and_zero_with_room_for_the_legend(self):
        axes = Figure(figsize=(6, 3)).add_subplot()
        plot_cosines(axes, {"one": ([0, 1], [0.02, 0.05]), "two": ([0, 1], [0.03, 0.04])})
        low, high = axes.get_ylim()
        assert -0.01 < low < 0
        assert 0.06 < high < 0.08
        assert [0, 0] in [list(line.get_ydata()) for line in axes.lines]

    def test_plotting_nothing_says_what_to_do(self):
        with pytest.raises(ValueError, match=r"nothing to plot: call update\(optimizer.stats\)"):
            ConflictMonitor().plot()

    def test_plotting_without_matplotlib_says_how_to_install_it(self, monitor, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'gaal_surgery\[plot\]'"):
            monitor.plot()
