from __future__ import annotations

import dataclasses
import os
import shlex
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tabular_image import page, sections, train
from tabular_image.data.samples import Samples
from tabular_image.data.targets import Target
from tabular_image.page import changed, conflict, figure, final_figures, headline
from tabular_image.sections import calibration, confident_mistakes, confusion, task_sections
from tabular_image.tasks import build_task

from gaal_surgery import AlignmentStats, ConflictMonitor, HalfSpace

TITLES = [
    *("Test figures", "Learning curves", "Confusion", "Calibration", "Conflict over training", "Confident mistakes"),
    *("Columns of the table", "Where the run comes from"),
]
HOSTILE = {
    "ant": "<script>alert(1)</script>",
    "bee": "\"><img src=x onerror='alert(2)'>&amp;",
    "cat": "\N{CAT FACE} \N{HEBREW LETTER SHIN}\N{RIGHT-TO-LEFT OVERRIDE}" + 120 * "w",
}
COLUMNS = {"size": "</td></table><script>alert(3)</script>", "colour": "<b onclick=x>&lt;", "kind": "</title>{{ 7*7 }}"}


class Page(HTMLParser):
    """Tags with their attributes, and the text of each tag; an unclosed one is an error."""

    void = ("meta", "img", "br")

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in self.void else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]

    def pictures(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def cards(logits, target, images):
    """The cards of rows with these images, the rows in reverse order."""
    count = len(target)
    samples = Samples(
        **{"name": "pets", "images": images, "table": pd.DataFrame(index=range(count)), "numeric": []},
        **{
            "categorical": [],
            "target": pd.Series(["-"] * count),
            "ids": pd.Series(range(100, 100 + count), name="pet"),
        },
    )
    rows = torch.arange(count - 1, -1, -1)
    return confident_mistakes(samples, ["ant", "bee", "cat"], rows, logits, target).cards


@pytest.fixture(scope="module")
def hostile(table, tmp_path_factory):
    """The page of a run on a file whose names are all hostile, and the run's command."""
    folder = tmp_path_factory.mktemp("hostile")
    frame = pd.read_csv(table)
    frame["kind"] = frame["kind"].map(HOSTILE)
    path, out = folder / "<i>a&amp;b.csv", folder / "run"
    frame.rename(columns=COLUMNS).to_csv(path, index=False)
    words = ["--dataset", "csv", "--path", path, "--image_root", table.parent, "--image_column", "picture"]
    words += ["--target_column", COLUMNS["kind"], "--image_size", 8, "--epochs", 2, "--batch_size", 16]
    words += ["--threads", 1, "--accelerator", "cpu", "--learning_rate", 1e-5, "--out", out]
    words = [str(word) for word in words]
    assert train.main(words) == 0
    return Page(out / "report.html"), shlex.join(words)


def test_every_section_is_there_in_order(hostile):
    assert hostile[0].of("h2") == TITLES


def test_the_page_needs_nothing_but_itself(hostile):
    read = hostile[0]
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "a")
        assert not attributes.keys() & {"href", "srcset", "data", "action"}
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    (style,) = read.of("style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_every_picture_says_what_it_shows(hostile):
    assert len(hostile[0].pictures()) > 3  # curves, calibration, conflict, and those of rows
    assert all(picture["alt"] for picture in hostile[0].pictures())


def test_names_of_the_user_are_text_and_never_markup(hostile):
    read, command = hostile
    written = {tag for tag, _ in read.tags}
    assert not written & {"script", "b", "i"}
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    heading, cells = "".join(read.of("bdi")), read.of("td")
    assert heading == "<i>a&amp;b.csv"
    assert read.of("title") == ["gaal on <i>a&amp;b.csv"]
    assert {COLUMNS["size"], COLUMNS["colour"], COLUMNS["kind"]} <= set(cells)
    assert set(HOSTILE.values()) <= set(read.of("span"))  # of the matrix
    assert set(read.of("dd")) & set(HOSTILE.values())
    assert any(command in text for text in read.of("pre"))


def test_the_page_has_the_figures_and_options_of_the_run(hostile):
    cells = hostile[0].of("td")
    assert {"fused, mean (--fusion)", "fused, product", "image", "table", "fused, without the table"} <= set(cells)
    assert cells[cells.index("learning_rate") :][:3] == ["learning_rate", "1e-05", "0.003"]
    assert "momentum" not in cells


def test_without_pictures_there_is_no_page_and_a_late_page_has_the_date_of_the_training(arguments, tmp_path):
    out = tmp_path / "run"
    assert train.main(arguments(out, epochs=1, pictures="false")) == 0
    assert not (out / "report.html").exists()
    os.utime(out / "metrics.csv", (10**9, 10**9))
    assert train.main(["--out", str(out), "--resume", "true", "--pictures", "true"]) == 0
    assert any(text.startswith("2001-09-") for text in Page(out / "report.html").of("p"))


def test_a_method_without_a_monitor_has_no_conflicts(arguments, tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", epochs=1, method="table")) == 0
    expected = [title for title in TITLES if title != "Conflict over training"]
    assert Page(tmp_path / "run" / "report.html").of("h2") == expected
    assert "\nno " not in capsys.readouterr().out


def test_a_section_that_fails_costs_a_sentence(arguments, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(page, "curves", fail)
    assert train.main(arguments(tmp_path / "run", epochs=1)) == 0
    expected = [title for title in TITLES if title != "Learning curves"]
    assert Page(tmp_path / "run" / "report.html").of("h2") == expected
    assert "\ncould not make section 'learning curves' in report.html: no ink\n" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_costs_a_sentence(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(out, epochs=1, pictures="false")) == 0
    (out / "report.html").mkdir()
    assert train.main(["--out", str(out), "--resume", "true", "--pictures", "true"]) == 0
    assert "\ncould not make report.html: cannot write " in capsys.readouterr().out


# Sections.


def test_up_to_forty_classes_have_a_matrix_and_more_have_pairs():
    for count, matrix, pairs in ((40, True, 5), (41, False, 20)):
        target = torch.arange(count).repeat(2)
        predicted = (target + 1) % count
        section = confusion([f"kind {name}" for name in range(count)], torch.eye(count)[predicted], target)
        assert (section.matrix is not None) == matrix
        assert len(section.tables[0].rows) == pairs


def test_confusion_counts_rows_and_shares_of_the_true_class():
    target = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 1, 1, 2, 1, 0, 2])
    section = confusion(["ant", "bee", "cat"], torch.eye(3)[predicted], target)
    assert section.matrix.rows[0] == [(1, 0.25), (2, 0.5), (1, 0.25)]
    assert section.tables[0].rows[0] == ("ant", "bee", 2, "50.0%")
    assert {row[:3] for row in section.tables[0].rows[1:]} == {("ant", "cat", 1), ("bee", "ant", 1)}
    assert section.text[0].startswith("4 of 7 test rows are predicted wrongly. The largest class has 57.1%")


def test_no_mistake_is_no_pair_and_no_card():
    target = torch.tensor([0, 1, 2])
    assert not confusion(["ant", "bee", "cat"], torch.eye(3), target).tables
    assert not cards(torch.eye(3), target, np.zeros((3, 4, 4), np.uint8))


def test_calibration_error_is_that_of_a_hand_count():
    """Nine rows at a probability of 0.75, of which three are right: off by 75 - 33.3 points."""
    logits = torch.tensor([[3.0, 1.0]]).log().expand(9, 2)
    section = calibration(logits, torch.tensor([0] * 3 + [1] * 6))
    assert "off by 41.7 percentage points" in section.text[0]
    assert "over-confident by 41.7 points" in section.text[0]
    assert "under-confident" in calibration(logits, torch.zeros(9, dtype=torch.long)).text[0]


def test_mistakes_come_by_probability_with_the_pictures_of_their_rows():
    logits = torch.tensor([[2.0, 0, 0], [5, 0, 0], [0, 3, 0], [9, 0, 0]])
    shown = cards(logits, torch.tensor([1, 2, 0, 0]), np.zeros((4, 4, 4), np.uint8))
    assert [card.name for card in shown] == ["pet 102", "pet 101", "pet 103"]  # the fourth is right
    assert shown[0].facts[:2] == (("true", "cat"), ("predicted", "ant"))
    assert shown[0].facts[2] == ("probability", f"{logits[1].softmax(0)[0]:.1%}")
    assert all(card.picture.source.startswith("data:image/png;base64,") for card in shown)


def test_at_most_twelve_mistakes_are_shown():
    assert len(cards(torch.eye(3)[[0] * 20], torch.ones(20, dtype=torch.long), np.zeros((20, 4, 4), np.uint8))) == 12


def test_a_picture_that_cannot_be_read_any_more_leaves_its_card(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images = [(tmp_path / "gone.png",), (tmp_path / "broken.png",), ()]
    shown = cards(torch.eye(3), torch.tensor([1, 2, 0]), images)
    assert [card.picture for card in shown] == [None] * 3
    template = page._ENVIRONMENT.get_template("page.html.jinja")
    section = dataclasses.replace(sections.Section("Mistakes"), cards=shown)
    (tmp_path / "page.html").write_text(
        template.render(method="a", dataset="b", headline="c", run="d", sections=[section], long=20), encoding="utf-8"
    )
    read = Page(tmp_path / "page.html")
    assert not read.pictures()
    assert [text for text in read.of("div") if "picture" in text] == ["picture cannot be read"] * 3


def four_houses(target):
    return Samples(
        **{"name": "houses", "images": np.zeros((4, 4, 4, 3), np.uint8), "table": pd.DataFrame(index=range(4))},
        **{"numeric": [], "categorical": [], "target": target, "ids": pd.Series(range(4), name="house")},
    )


def test_sections_of_a_regression():
    task = build_task(Target("regression", ("price",), (4,), 4, mean=10.0, deviation=2.0))
    mean, target = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.1, 2.0, 30.0, 3.0])
    outputs = torch.stack([mean, torch.zeros(4)], dim=1)
    builds = task_sections(task, four_houses(pd.Series(target)), torch.arange(4), outputs, target)
    values, misses = [build() for build in builds]
    assert "holds the true value of 75.0% of 4 test rows" in values.text[0]  # all but 30, 1.64 deviations of 1
    assert "width of the interval is 6.579" in values.text[0]
    assert values.pictures[0].alt
    assert [card.name for card in misses.cards] == ["house 2", "house 3", "house 0", "house 1"]
    assert misses.cards[0].facts == (("true", "70"), ("predicted", "16"), ("difference", "-54"))


def test_sections_of_labels():
    task = build_task(Target("multilabel", ("old", "<big>"), (2, 2), 4))
    outputs = torch.tensor([[4.0, -1.0], [-1.0, 2.0], [-3.0, -2.0], [0.5, 0.1]])
    target = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    samples = four_houses(pd.DataFrame(target.bool().numpy(), columns=task.target.names))
    labels, mistakes = [build() for build in task_sections(task, samples, torch.arange(4), outputs, target)]
    assert labels.tables[0].rows[0][:3] == ("old", 3, 2)
    assert labels.tables[0].rows[1][:3] == ("<big>", 1, 2)
    assert [card.name for card in mistakes.cards] == ["house 1", "house 3"]
    assert mistakes.cards[0].facts == (("label", "old"), ("there", "yes"), ("probability", "26.9%"))


# Figures.


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.5, "0.5000"), (123456.78, "123,456.8"), (1234, "1,234"), ("<", "<")]
)
def test_cells(value, text):
    assert figure(value) == text


def test_the_headline_takes_any_measures():
    results = {"split_sizes": {"test": 1097}, "test": {"fused": {"accuracy": 0.71}, "image": {"accuracy": 0.5}}}
    said = headline(results)
    assert said == "On 1,097 test rows the fused prediction is right for 71.0%, the image prediction for 50.0%."
    results["test"] = {"fused": {"rmse": 0.25, "r2": None}}
    assert headline(results) == "On 1,097 test rows the fused prediction has RMSE 0.2500, R² -."
    results["test"] = {"fused": {"accuracy": None}}
    assert headline(results) == "On 1,097 test rows the fused prediction has accuracy -."


def test_the_options_of_a_method_are_compared_with_their_defaults(arguments, tmp_path):
    from tabular_image.command_line import as_written

    options = as_written(arguments(tmp_path, **{"gaal.margin": 0.1}))
    assert ("gaal.margin", 0.1, 0.0) in changed(options)
    assert not [name for name, *_ in changed(options) if name in ("seed", "settings", "gaal.relative")]


def test_few_test_rows_tell_an_accuracy_within_a_wide_interval():
    def sentences(rows):
        results = {"split_sizes": {"test": rows}, "best_epoch": 1, "fusion": "", "fusion_measures": {}}
        figures = {"fused": {"accuracy": 0.75}}
        return final_figures(results | {"test": figures, "without_table_measures": figures}).text

    assert "is 46.8% to 91.1% (Wilson)" in sentences(12)[-1]
    assert "is 72.2% to 77.6% (Wilson)" in sentences(1000)[-1]


@pytest.mark.parametrize("intervened", [0.0, 0.25])
def test_a_method_without_surgery_is_said_to_observe(intervened):
    monitor = ConflictMonitor()
    opposed = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
    monitor.update(AlignmentStats("image", ("table",), opposed, HalfSpace()(opposed)))
    row = {"modality": "image", "guide": "table", "conflict": 0.25, "steps": 8, "intervened": intervened}
    text = " ".join(conflict({"conflict": [row]}, SimpleNamespace(monitor=monitor)).text)
    assert "25% of 8 steps were in conflict" in text
    assert ("surgery changed 25% of the steps" in text) == bool(intervened)
    assert ("Surgery changed no step" in text) == (not intervened)
