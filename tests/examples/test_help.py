"""The commands explain themselves: a page of help, all about one option or method, and a sentence for each mistake."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
from imports import run_with_imports
from tabular_image import export, predict, prepare, train
from tabular_image.command_line import as_written, save
from tabular_image.data import DATASETS
from tabular_image.errors import InputError
from tabular_image.methods import METHODS, SETTINGS
from tabular_image.options import Options
from tabular_image.wording import Option, in_words, options_of

SCRIPTS = Path(train.__file__).parent
TYPES = re.compile(r"\b(type:|str\b|bool\b|null\b|None\b|\w+Int\b|\w+Float\b|Optional|Literal|Interval)|\w\+ ")
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.main,
    "predict": predict.main,
    "export": export.main,
    "prepare": prepare.main,
}


def printed(capsys: pytest.CaptureFixture[str], *words: str, command: str = "train") -> str:
    with pytest.raises(SystemExit) as end:
        COMMANDS[command](list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str, command: str = "train") -> str:
    """The sentence, without `error: `."""
    assert COMMANDS[command](list(words)) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert "Parser key" not in text
    return text.removeprefix("error: ").strip()


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_help_is_a_page_in_words(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(capsys, "--help", command=command).splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= columns
    assert [line for line in lines if TYPES.search(line)] == []
    assert f"  python examples/tabular_image/{command}.py" in "\n".join(lines)


def test_help_has_four_groups_with_every_common_option_once(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "-h")
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == ["Examples", "Data", "Model", "Training", "Run"]
    options = re.findall(r"^  --(\w+) ", text.partition("Data:")[2], re.MULTILINE)
    common = [field.name for field in fields(Options) if field.name != "settings"]
    assert options == [*common, "config", "print_config"]
    model = text[text.index("Model:") : text.index("Training:")]
    assert [name for name in METHODS if not re.search(rf"\b{name}\b", model)] == []
    data = text[text.index("Data:") : text.index("Model:")]
    assert [name for name in DATASETS if not re.search(rf"\b{name}\b", data)] == []


def test_the_line_of_an_option_says_what_it_takes_and_what_happens_without(capsys: pytest.CaptureFixture[str]):
    text = flat(printed(capsys, "--help"))
    for line in (
        "--learning_rate Learning rate at the start (a number above 0; default 0.003)",
        "--optimizer Optimizer (one of sgd, adam, adamw; default adamw)",
        "--augment Vary the training images (true or false; default false)",
        "--validation Rows for validation (a share between 0 and 1; default 0.1)",
        "--table leaves100: kind of table (one of texture, margin, shape)",
    ):
        assert line in text
    assert "--path The table, as CSV and its kin, Excel or Parquet (required)" in flat(
        printed(capsys, "--help", command="predict")
    )


@pytest.mark.parametrize("option", options_of(Options, skip={"settings"}), ids=lambda option: option.name)
def test_all_about_an_option(option: Option, capsys: pytest.CaptureFixture[str]):
    text = flat(printed(capsys, "--help", option.name))
    assert text.startswith(f"--{option.name}: {option.takes}")
    assert option.text in text
    assert option.text.endswith(".")
    assert not TYPES.search(text)


@pytest.mark.parametrize("name", METHODS)
def test_all_about_a_method(name: str, capsys: pytest.CaptureFixture[str]):
    text = flat(printed(capsys, "--help", name))
    assert re.search(rf"--method {name}: [A-Z].*?\.", text)
    for option in options_of(SETTINGS[name], f"{name}."):
        assert f"--{option.name}: {option.takes}" in text
        assert option.text in text
        assert option.text.endswith(".")


def test_all_about_a_data_set_and_all_methods(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "--help", "csv")
    assert "--image_column:" in text
    assert "--table:" not in text
    assert printed(capsys, "--help", "config").startswith("--config: a path\n")
    assert printed(capsys, "--help", "print_config").startswith("--print_config: no value\n")
    text = printed(capsys, "--help", "method")
    assert [name for name in METHODS if f"\n{name}: " not in text] == []


@pytest.mark.parametrize("words", [["--help=select"], ["--help", "--select"], ["--method", "kd", "-h", "select"]])
def test_other_ways_to_ask(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert printed(capsys, *words).startswith("--select: one of accuracy, balanced_accuracy, loss\n")


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("selct", "'selct'; did you mean --help select?"),
        ("gal", "'gal'; did you mean --help gaal?"),
        ("gaal.margn", "did you mean --help gaal.margin?"),
        ("nonsense", "'nonsense'; train.py --help lists the options"),
    ],
)
def test_nothing_to_say(topic: str, words: str, capsys: pytest.CaptureFixture[str]):
    assert words in refused(capsys, "--help", topic)


@pytest.mark.parametrize("script", ["train.py", "predict.py", "export.py", "prepare.py"])
def test_help_imports_no_torch(script: str):
    done, names = run_with_imports(SCRIPTS / script, "--help", *(["gaal"] if script == "train.py" else []))
    assert done.returncode == 0
    assert names & {"torch", "torchvision", "lightning", "pandas", "sklearn", "scipy", "matplotlib"} == set()


MISTAKES = [
    ("--learning_rat 0.1", "there is no option --learning_rat; did you mean --learning_rate? --help lists the options"),
    ("--learning-rat 0.1", "there is no option --learning-rat; did you mean --learning_rate? --help lists the options"),
    ("--gaal.margn 2", "there is no option --gaal.margn; did you mean --gaal.margin? --help lists the options"),
    ("--epoch=3", "there is no option --epoch; did you mean --epochs? --help lists the options"),
    ("--seed 1 --nonsense 1", "there is no option --nonsense; --help lists the options"),
    (
        "--margin 0.1",
        "there is no option --margin; did you mean --gaal.margin, --gaal_joint.margin or --gaal_star.margin? "
        "--help lists the options",
    ),
    ("--epochs many", "--epochs takes a whole number above 0, not 'many'; see --help epochs"),
    ("--epochs=0", "--epochs takes a whole number above 0, not '0'; see --help epochs"),
    ("--seed -1", "--seed takes a whole number, 0 or more, not '-1'; see --help seed"),
    ("--lr 0", "--learning_rate takes a number above 0, not '0'; see --help learning_rate"),
    ("--pictures maybe", "--pictures takes true or false, not 'maybe'; see --help pictures"),
    (
        "--fusion men",
        "--fusion takes one of mean, product, calibrated, auto, not 'men'; did you mean 'mean'? See --help fusion",
    ),
    ("--gaal.max_norm a", "--gaal.max_norm takes a number above 0, not 'a'; see --help gaal.max_norm"),
    ("--gaal 3", "--gaal is no option by itself; its options are --gaal.OPTION; see --help gaal"),
    ("--epochs", "--epochs is followed by no value; it takes a whole number above 0; see --help epochs"),
    ("--epochs --seed 3", "--epochs is followed by no value; it takes a whole number above 0; see --help epochs"),
    ("--config", "--config is followed by a file; see --help"),
    ("--seed 1 foo", "'foo' belongs to no option; options are --NAME VALUE, or --NAME '[a, b]'; see --help"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_a_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture[str]):
    assert refused(capsys, *words.split()) == sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("epohcs: 3", "there is no option epohcs; did you mean epochs?"),
        ("lr: 0.1", "there is no option lr; did you mean learning_rate?"),
        ("gaal:\n  margn: 1", "there is no option gaal.margn; did you mean gaal.margin?"),
        ("gal:\n  margin: 1", "there is no option gal.margin; did you mean gaal.margin?"),
        ("seed: 1\nepochs: many", "epochs takes a whole number above 0, not 'many'; see"),
        ("epochs: 1.5", "epochs takes a whole number above 0, not 1.5; see"),
        ("fusion: men", "fusion takes one of mean, product, calibrated, auto, not 'men'; did you mean 'mean'?"),
        ("gaal.margin: x", "gaal.margin takes a number, not 'x'; see"),
    ],
)
def test_a_mistake_in_a_file_is_a_sentence(
    content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    told = refused(capsys, "--config", str(file))
    assert told.startswith(f"cannot use the options in {file} ({sentence}")
    assert told.endswith("; give a YAML file of options, such as the config.yaml of a run")


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("predict", "--path a.csv", "--run is missing: Folder of a run of train.py"),
        ("predict", "--run a --pth b", "there is no option --pth; did you mean --path?"),
        ("predict", "--run a --path b --device gpu", "--device takes one of cpu, cuda, not 'gpu';"),
        ("export", "--run a --onnx maybe", "--onnx takes true or false, not 'maybe';"),
        ("export", "", "--run is missing"),
        ("prepare", "dv --archives a", "NAME takes one of dvm, celeba, sun, not 'dv'; did you mean 'dvm'?"),
        ("prepare", "--archives a", "NAME is missing"),
        ("prepare", "sun --archive a", "there is no option --archive; did you mean --archives?"),
    ],
)
def test_a_mistake_of_another_command_is_a_sentence(
    command: str, words: str, sentence: str, capsys: pytest.CaptureFixture[str]
):
    told = refused(capsys, *words.split(), command=command)
    assert told.startswith(sentence)
    assert "--help" in told


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("--lr 0.1", "--learning_rate 0.1"),
        ("--lr=0.1 --gaal.image-fraction=0.2", "--learning_rate 0.1 --gaal.image_fraction 0.2"),
        ("--learning_rate 0.2 --lr 0.1", "--learning_rate 0.1"),  # the later wins
        ("--lr 0.1 --learning-rate 0.2", "--learning_rate 0.2"),
        ("--image-column+ a --image-column+=b", "--image_column+ a --image_column+ b"),
        ("--out a-b --path=c-d", "--out a-b --path c-d"),  # values keep their hyphens
    ],
)
def test_other_spellings(words: str, same: str, tmp_path: Path):
    options = as_written(words.split())
    assert options == as_written(same.split())
    save(options, tmp_path / "config.yaml")
    assert "lr:" not in (tmp_path / "config.yaml").read_text().split()
    assert as_written(["--config", str(tmp_path / "config.yaml")]).learning_rate == options.learning_rate


def test_the_data_set_of_prepare_may_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words in (["sun", "--archives", str(tmp_path)], ["--archives", str(tmp_path), "sun"]):
        assert f"{tmp_path} lacks SUNAttributeDB.tar.gz" in refused(capsys, *words, command="prepare")


def test_a_negative_number_is_a_value():
    assert as_written(["--gaal.margin", "-0.1"]).settings.margin == -0.1
    with pytest.raises(InputError, match="'-x' belongs to no option"):
        as_written(["-x"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Literal["a", "b"] | None, "one of a, b"),
        (str | list[str], "text, or several as '[a, b]'"),
        (list[int], "numbers as '[1, 2]'"),
        (list[str] | None, "names as '[a, b]'"),
        (bool, "true or false"),
    ],
)
def test_types_in_words(kind: Any, words: str):
    assert in_words(kind) == words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "option"),
    [
        ("table1", "seeds"),
        ("ablation", "machine.jobs"),
        ("tasks", "which"),
        ("step", "repeats"),
        ("launches", "guides"),
    ],
)
def test_benchmarks_explain_themselves(
    module: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = next((Path(__file__).parents[2] / "benchmarks").glob(f"*/{module}.py"))
    monkeypatch.setenv("COLUMNS", "80")

    def ended(*words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", [str(script), *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    code, text, _ = ended("--help")
    assert code == 0
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 80
    assert f"  python benchmarks/{script.parent.name}/{module}.py --" in text
    assert f"  --{option} " in text
    assert not re.search(r"type:|PositiveInt|list\[|Optional|\w\+ ", text)
    code, text, _ = ended("--help", option.partition(".")[0])
    assert code == 0
    assert f"--{option}: " in text
    code, _, error = ended(f"--{option}x", "1")
    assert code == 2
    assert error == f"error: there is no option --{option}x; did you mean --{option}? --help lists the options\n"
