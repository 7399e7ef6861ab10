"""The page of a finished run, for a person to open: one file, without scripts or network access."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy.stats import binomtest

from .data.module import TabularImageData
from .errors import reason
from .files import writing
from .methods.base import Method
from .options import Options
from .report import conflict_picture, curves, final_lines, words
from .sections import Build, Cell, Section, Table, as_picture, task_sections
from .style import styled

PAGE = "report.html"
_LONG = 20  # tables of more rows are folded


def write_page(
    folder: Path,
    *,
    results: Mapping[str, Any],
    options: Options,
    data: TabularImageData,
    method: Method,
    outputs: Mapping[str, Mapping[str, Any]],
    epochs: pd.DataFrame,
) -> None:
    """Writes `report.html` into the run folder.

    A section or a page that cannot be made is reported and left out: a run never fails because of its page.

    Args:
        folder: the run folder.
        results: as in `results.json`.
        options: the options of the run.
        data: rows, class names and ids.
        method: with the weights of the best epoch.
        outputs: collated outputs of `Method.predict_step` for "test".
        epochs: one row an epoch, as in `metrics.csv`.
    """
    test = outputs["test"]
    main = next(iter(method.predictions(test["logits"]).values()))
    *about_predictions, examples = task_sections(method.task, data.samples, test["row"], main, test["target"])
    builds: list[Build] = [
        partial(final_figures, results),
        partial(learning_curves, results, epochs),
        *about_predictions,
        partial(conflict, results, method),
        examples,
        partial(columns, data),
        partial(origin, results, options),
    ]
    sections = []
    for build in builds:
        with _told_and_left_out(f"section {build.func.__name__.replace('_', ' ')!r} in {PAGE}"):
            sections.append(build())
    with _told_and_left_out(PAGE):
        page = _ENVIRONMENT.get_template("page.html.jinja").render(
            method=options.method,
            dataset=data.samples.name,
            headline=headline(results),
            run=_run(folder, results),
            sections=[section for section in sections if section],
            long=_LONG,
        )
        with writing(folder / PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may hold any byte


def headline(results: Mapping[str, Any]) -> str:
    """The main result in a sentence."""
    (main, figures), *others = results["test"].items()
    start = f"On {results['split_sizes']['test']:,} test rows the {main} prediction"
    if figures.get("accuracy") is None:
        return f"{start} has {', '.join(f'{words(name)} {figure(value)}' for name, value in figures.items())}."
    alone = [f", the {name} prediction for {its['accuracy']:.1%}" for name, its in others]
    return f"{start} is right for {figures['accuracy']:.1%}{''.join(alone)}."


def final_figures(results: Mapping[str, Any]) -> Section:
    """The table at the end of a run."""
    lines = final_lines(results)
    measures = list(dict.fromkeys(name for figures in lines.values() for name in figures))
    rows = [[name, *map(figures.get, measures)] for name, figures in lines.items()]
    text = (
        f"Figures of {results['split_sizes']['test']:,} test rows, with the weights of epoch {results['best_epoch']}. "
        "“Without the table” is the prediction for the same rows when their tables are absent."
    )
    header = ["prediction", *map(words, measures)]
    return Section("Test figures", [text, *_interval(results)], tables=[Table(header, rows)])


def _interval(results: Mapping[str, Any]) -> list[str]:
    """A sentence on how far so few test rows tell the accuracy; nothing without an accuracy."""
    (main, figures), *_ = results["test"].items()
    rows = results["split_sizes"]["test"]
    if figures.get("accuracy") is None:
        return []
    low, high = binomtest(round(figures["accuracy"] * rows), rows).proportion_ci(method="wilson")
    return [
        f"The 95% interval of the accuracy of the {main} prediction is {low:.1%} to {high:.1%} (Wilson), by the number "
        "of test rows alone."
    ]


def learning_curves(results: Mapping[str, Any], epochs: pd.DataFrame) -> Section:
    """Loss and figure by epoch."""
    text = (
        f"Epoch {results['best_epoch']} was the best of {results['epochs']} on the validation rows, and its weights "
        "were tested. Epochs count from 0."
    )
    alt = f"Losses by epoch, and validation {words(results['figure'])} by epoch with the best epoch marked."
    return Section("Learning curves", [text], pictures=[as_picture(curves(epochs, results["figure"]), alt)])


def conflict(results: Mapping[str, Any], method: Method) -> Section | None:
    """Cosines between the gradients of the modalities; None for a method that does not measure cosines."""
    if not results["conflict"]:
        return None
    text = [
        "A step is in conflict where the cosine is below 0: the step of one modality then raises the loss of the most "
        "uncertain samples of the other modality."
    ]
    observed = not any(row["intervened"] for row in results["conflict"])
    for row in results["conflict"]:
        surgery = "" if observed else f", and surgery changed {row['intervened']:.0%} of the steps"
        text.append(
            f"Turn of {row['modality']}, guided by {row['guide']}: {row['conflict']:.0%} of {row['steps']:,} steps "
            f"were in conflict{surgery}."
        )
    if observed:
        text.append("Surgery changed no step: the conflicts were only observed.")
    alt = "Cosine between the gradients of the modalities by step of the training, one line for each turn."
    return Section("Conflict over training", text, pictures=[as_picture(conflict_picture(method.monitor), alt)])


def columns(data: TabularImageData) -> Section:
    """How each column is used, and what was noticed in the data."""
    samples = data.samples
    kinds = {"number": samples.numeric, "category": samples.categorical, "date": samples.dates}
    rows = [
        (str(name), kind, f"{samples.table[name].isna().mean():.0%}", _content(samples.table[name], kind))
        for kind, names in kinds.items()
        for name in names
    ]
    header = ("column", "taken for", "missing", "content")
    sizes = ", ".join(f"{size:,} {split}" for split, size in data.split_sizes.items())
    noticed = [Table(("careful",), [[line] for line in data.warnings])] if data.warnings else []
    skipped = [Table(("skipped",), [[line] for line in data.skipped])] if data.skipped else []
    text = f"{len(samples):,} rows: {sizes}. {len(rows)} columns of the table are read, as follows."
    return Section(
        "Columns of the table",
        [text],
        tables=[*noticed, *skipped, Table(header, rows)],
        listing=samples.note,
    )


def origin(results: Mapping[str, Any], options: Options) -> Section:
    """What is needed to repeat the run."""
    rows = [(name, str(value), str(default)) for name, value, default in changed(options)]
    versions = list(results["versions"].items())
    text = f"Digest of the data: {results['data']}. Seed: {results['seed']}."
    tables = [
        Table(("option", "value", "default"), rows, "Options that differ from their defaults"),
        Table(("package", "version"), versions, "Versions"),
    ]
    return Section("Where the run comes from", [text], tables=tables, listing=results["command"] or "")


def changed(options: Options) -> list[tuple[str, Any, Any]]:
    """Name, value and default of every option that differs from its default, with the method's own options."""
    groups = [("", options, Options()), (f"{options.method}.", options.settings, type(options.settings)())]
    return [
        (f"{prefix}{field.name}", getattr(given, field.name), getattr(default, field.name))
        for prefix, given, default in groups
        if given is not None
        for field in fields(given)
        if field.name not in ("settings", "resume") and getattr(given, field.name) != getattr(default, field.name)
    ]


def figure(value: Cell) -> str:
    """A cell of a table as text."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
        case int():
            return f"{value:,}"
        case _:
            return value


def _content(cells: pd.Series, kind: str) -> str:
    """The values of a column in a few words."""
    filled = cells.dropna()
    if filled.empty:
        return "-"
    if kind == "category":
        return f"{filled.nunique():,} different"
    if kind == "date":
        return f"{filled.min():%Y-%m-%d} to {filled.max():%Y-%m-%d}"
    numbers = pd.to_numeric(filled)
    return f"{numbers.min():.4g} to {numbers.max():.4g}"


def _run(folder: Path, results: Mapping[str, Any]) -> str:
    """When the last epoch ended, which may be before the page is written; how long the training took, and on what."""
    end = datetime.fromtimestamp((folder / "metrics.csv").stat().st_mtime).astimezone()
    return f"{end:%Y-%m-%d %H:%M %Z}, {results['seconds']:.0f} s of training on {results['device']}"


@contextmanager
def _told_and_left_out(what: str) -> Iterator[None]:
    """Draws in the pipeline's look, and reports what fails."""
    try:
        with warnings.catch_warnings(), styled():
            warnings.simplefilter("ignore")  # such as warnings of odd metadata in a picture
            yield
    except Exception as error:
        print(f"could not make {what}: {reason(error)}")


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["figure"] = figure
