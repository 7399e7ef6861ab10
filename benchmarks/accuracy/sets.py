"""The sets of a command: options, overridden options, digests of the data, and the folder of the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml
from protocol import ENDINGS, SETS, DataSet, data_set, from_yaml
from runs import Machine, Results, opened
from tabular_image.data.identity import fingerprinted, identity
from tabular_image.errors import InputError
from tabular_image.methods import SETTINGS
from tabular_image.options import Options
from tabular_image.run import read_samples

RESULTS = Path(__file__).resolve().parent / "results"
OWN = Path(Machine().folder)
_RECIPE = ("optimizer", "learning_rate", "weight_decay")
_REPEATED = ("seed", "fold")
_CARRYING_OUT = ("data_root", "accelerator", "workers", "threads", "out", "pictures", "resume")


def home(sets: Sequence[str]) -> Path:
    """The folder of results and tables: in the checkout for the protocol's sets, else below the current folder.

    The protocols of fixed features, of the small CNN trained for longer, and of ResNets have folders of their own.
    """
    if not set(sets) <= SETS.keys():
        return OWN
    for ending in ENDINGS:
        if sets and all(name.endswith(ending) for name in sets):
            return RESULTS / ending.removeprefix("-")
    return RESULTS


@contextmanager
def begun(
    sets: Sequence[str],
    results: str | None,
    out: str | None,
    machine: Machine,
    recipes: Sequence[str],
    train: bool = True,
) -> Iterator[tuple[list[DataSet], Results]]:
    """The sets of a command with the digests of their data, and the results so far.

    Args:
        sets: the sets as the command line names them.
        results: the results file; None takes runs.csv in `home`.
        out: folder of the tables; None takes `home`.
        machine: names the folders of the data and of the runs.
        recipes: names of the recipes that replace the optimizer and learning rate of a YAML file.
        train: whether the command trains. With false, data that cannot be read are assumed to be the results' data.

    Raises:
        SystemExit: A set, a file or a folder cannot be used.
    """
    chosen = _differing(list(map(data_set, sets)))
    for which in chosen:
        if sentence := overridden(which, machine, recipes):
            print(sentence)
    folder = Path(out or home(sets))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: {folder} cannot be a folder ({error.strerror}); give another --out") from error
    with opened(results or home(sets) / "runs.csv", machine if train else None) as finished:
        yield [replace(which, data=_digest(which, finished, machine, train)) for which in chosen], finished


def overridden(which: DataSet, machine: Machine, recipes: Sequence[str]) -> str:
    """One line that names the overridden settings of a YAML file, and what overrides them; empty without any."""
    if which.given in SETS:
        return ""
    reasons = {"method": "the method of each row"}
    reasons |= dict.fromkeys(_RECIPE, f"the recipe{'s' * (len(recipes) > 1)} {', '.join(recipes)}")
    reasons |= dict.fromkeys(_REPEATED, "every seed and fold")
    reasons |= dict.fromkeys(_CARRYING_OUT, "--machine")
    replaced: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        value = getattr(which.options, name)
        if value != getattr(Options(), name) and (name, value) != ("data_root", machine.data_root):
            replaced.setdefault(reason, []).append(f"{name} {value}")
    groups = {str(name).partition(".")[0] for name in yaml.safe_load(Path(which.given).read_text(encoding="utf-8"))}
    for method in groups & SETTINGS.keys():
        default = vars(SETTINGS[method]())
        for name, value in vars(from_yaml(which.given, "--method", method).settings).items():
            if value != default[name]:
                replaced.setdefault("the settings of each row", []).append(f"{method}.{name} {value}")
    parts = [f"{', '.join(names)} (by {reason})" for reason, names in replaced.items()]
    return f"careful: {which.given}: the protocol overrides {', '.join(parts)}" if parts else ""


def _differing(sets: list[DataSet]) -> list[DataSet]:
    """The sets, after a check that their names differ.

    Raises:
        SystemExit: Two sets have one name, and would write one table.
    """
    named: dict[str, DataSet] = {}
    for which in sets:
        other = named.setdefault(which.name, which)
        if other is not which:
            raise SystemExit(
                f"error: {other.given} and {which.given} are both called {which.name}, and one table would replace the "
                "other; name each set once, and rename a YAML file whose name is taken"
            )
    return sets


def _digest(which: DataSet, finished: Results, machine: Machine, train: bool) -> str:
    """The digest of a set's data. Without training, data that cannot be read have the digest of the finished runs.

    Raises:
        SystemExit: Data for training cannot be read, or the finished runs are of several data sets.
    """
    try:
        options = replace(which.options, data_root=machine.data_root)
        return identity(fingerprinted(read_samples(options), threads=machine.jobs)).digest
    except InputError as error:
        if train:
            raise SystemExit(f"error: {which.given}: {error}") from error
        free = {"method", *_RECIPE, *_REPEATED}
        common = {name: value for name, value in which.options.configuration().items() if name not in free}
        found = finished.digests({name: value for name, value in common.items() if "." not in name})
        if len(found) > 1:
            raise SystemExit(
                f"error: {finished.path} holds runs on {len(found)} different data sets for {which.given}, and the "
                f"data that would choose one cannot be read ({error}); give the data's folder as --machine.data_root"
            ) from error
        print(f"careful: {which.name}: the data were not checked, and all finished runs are shown ({error})")
        return next(iter(found), "")
