"""A trained model is used: the artifact, new rows, the commands."""

from __future__ import annotations

import io
import json
import shutil
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tabular_image import artifact, export, predict, train
from tabular_image.command_line import as_written
from tabular_image.errors import InputError
from tabular_image.methods.base import collate
from tabular_image.prediction import Predictor
from tabular_image.run import build_data, read_samples

ROWS = 90
TARGETS = {"classification": "kind", "multilabel": "[big, striped]", "regression": "price"}


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A folder with pictures, and a CSV file as people write it: semicolons, decimal commas, units, dates, gaps."""
    folder = tmp_path_factory.mktemp("pets")
    generator = np.random.default_rng(0)
    kinds = np.arange(ROWS) % 3
    for row, kind in enumerate(kinds):
        pixels = generator.normal(60 * kind + 60, 30, (12, 12, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
    weight = generator.normal(4 * kinds + 5, 1)
    table = pd.DataFrame(
        {
            "picture": [f"{row}.png" for row in range(ROWS)],
            "weight": [f"{value:.2f} kg".replace(".", ",") for value in weight],
            "born": [f"{1 + row % 28:02d}.0{1 + row % 9}.20{10 + kind}" for row, kind in enumerate(kinds)],
            "colour": generator.choice(["red", "black", "white", ""], ROWS),
            "code": [f"0{1 + kind}" for kind in kinds],
            "kind": np.array(["cat", "dog", "emu"])[kinds],
            "price": [
                f"{100 * 2**kind + noise:.1f}".replace(".", ",") for kind, noise in zip(kinds, weight, strict=True)
            ],
            "big": np.where(kinds == 2, "yes", "no"),
            "striped": np.where(np.arange(ROWS) % 4 == 0, "yes", "no"),
        }
    )
    table.to_csv(folder / "pets.csv", sep=";", index=False)
    return folder


def trained(folder, out, task="classification", method="gaal_joint", *more):
    arguments = ["--dataset", "csv", "--path", str(folder / "pets.csv"), "--image_column", "picture"]
    arguments += ["--target_column", TARGETS[task], "--task", task, "--method", method, "--fusion", "calibrated"]
    arguments += ["--numeric", "weight", "--categorical", "[colour, code]"]
    settings = {"epochs": 2, "image_size": 8, "workers": 0, "accelerator": "cpu", "pictures": "false", "out": out}
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    assert train.main([*arguments, *more]) == 0
    return out


@pytest.fixture(scope="module")
def run(pets, tmp_path_factory):
    return trained(pets, tmp_path_factory.mktemp("runs") / "run")


def rows_of(run, pets):
    """The test rows of the run as a user has them, and their positions."""
    data = data_of(run)
    frame = pd.read_csv(pets / "pets.csv", sep=";", dtype=str, keep_default_na=False)
    return frame.iloc[data.splits["test"]], data


def data_of(run):
    options = as_written(["--config", str(run / "config.yaml")])
    return build_data(options, read_samples(options))


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("method", ["gaal_joint", *slow("gaal", "concatenation", "image", "table")])
def test_predictions_are_those_of_the_run_to_the_bit(pets, tmp_path, task, method):
    run = trained(pets, tmp_path / "run", task, method)
    frame, data = rows_of(run, pets)
    _, _, model = artifact.load(run)
    outputs = collate([model.predict_step(batch) for batch in data.test_dataloader()])
    expected = next(iter(model.predictions(outputs["logits"]).values()))
    predicted = Predictor.load(run).predict(frame, pets)
    assert predicted["predicted"].tolist() == model.task.answers(expected).tolist()
    details = model.task.details(expected)
    assert torch.equal(torch.tensor(predicted[details.columns].to_numpy()), torch.tensor(details.to_numpy()))
    assert predicted.index.tolist() == frame.index.tolist()
    written = pd.read_csv(run / "predictions.csv", keep_default_na=False).iloc[:, 2].tolist()
    assert predicted["predicted"].tolist() == written


def test_features_of_pictures_are_made_alike(pets, tmp_path):
    run = trained(pets, tmp_path / "run", "classification", "gaal", "--image_encoder", "features", "--image_size", "16")
    frame, _ = rows_of(run, pets)
    predicted = Predictor.load(run).predict(frame, pets)["predicted"].tolist()
    assert predicted == pd.read_csv(run / "predictions.csv").iloc[:, 2].tolist()


def test_what_is_missing_in_a_row_is_marked_and_the_rest_predicted(run, pets):
    frame, _ = rows_of(run, pets)
    whole = Predictor.load(run).predict(frame, pets)
    damaged = frame.copy()
    damaged.iloc[0, 0] = ""
    damaged.iloc[1, 0] = "nowhere.png"
    damaged.iloc[2, 1:5] = ""
    damaged.iloc[3, :5] = ""
    damaged.iloc[4, 3] = "a colour that nobody has seen"
    predictor = Predictor.load(run)
    predicted = predictor.predict(damaged, pets, name="pets.csv")
    assert predicted["seen"].tolist()[:5] == ["table alone", "table alone", "image alone", "nothing", "image and table"]
    assert predicted["predicted"].isna().tolist()[:5] == [False, False, False, True, False]
    assert predicted.iloc[3][["cat", "dog", "emu"]].isna().all()
    assert predicted[["cat", "dog", "emu"]].drop(index=predicted.index[3]).sum(axis=1).to_numpy() == pytest.approx(1)
    assert [sentence for sentence in predictor.problems if "nowhere.png does not exist" in sentence]
    np.testing.assert_allclose(predicted["cat"][5:], whole["cat"][5:], rtol=1e-5)


@pytest.mark.parametrize("method", ["image", "gaal", *slow("table", "concatenation", "maximum", "alternating")])
def test_every_method_says_what_it_sees(pets, tmp_path, method):
    predictor = Predictor.load(trained(pets, tmp_path / "run", "classification", method, "--epochs", "1"))
    frame, _ = rows_of(tmp_path / "run", pets)
    alone = predictor.predict(frame.drop(columns="picture"), pets)
    assert set(alone["seen"]) == {"nothing" if method == "image" else "table alone"}
    pictures = predictor.predict(frame[["picture"]], pets)
    assert set(pictures["seen"]) == {"nothing" if method == "table" else "image alone"}
    for predicted, blind in ((alone, method == "image"), (pictures, method == "table")):
        assert predicted["predicted"].isna().all() == blind


def test_a_voice_that_is_left_answers_by_its_own_calibration(run, pets):
    predictor = Predictor.load(run)
    frame, data = rows_of(run, pets)
    table = data.table[data.splits["test"]]
    model = predictor.method
    with torch.no_grad():
        expected = model.alone["table"]({"table": model.head(model.encoders["table"](table))}).softmax(dim=1)
    predicted = predictor.predict(frame.drop(columns="picture"), pets)
    torch.testing.assert_close(torch.tensor(predicted[["cat", "dog", "emu"]].to_numpy()), expected)


def test_cells_are_read_as_those_of_the_training(run, pets):
    predictor = Predictor.load(run)
    frame, _ = rows_of(run, pets)
    known = predictor.predict(frame, pets)
    typed = frame.assign(weight=frame["weight"].str.removesuffix(" kg").str.replace(",", ".").astype(float))
    pd.testing.assert_frame_equal(predictor.predict(typed, pets), known)
    # 1,500 has a decimal comma here, whatever a file of such numbers alone looks like.
    odd = frame.assign(weight="1,500 kg")
    assert (
        predictor.predict(odd, pets)["cat"].tolist()
        == predictor.predict(frame.assign(weight=1.5), pets)["cat"].tolist()
    )


def test_dates_are_read_in_the_format_of_the_training(pets, tmp_path):
    run = trained(pets, tmp_path / "run", "classification", "table", "--numeric", "", "--epochs", "1")
    predictor = Predictor.load(run)
    assert predictor.recipe.dates == ["born"]
    frame, _ = rows_of(run, pets)
    few = frame.iloc[:1].assign(born="05.06.2011")  # the fifth of June, as in the training, and not the sixth of May
    typed = frame.iloc[:1].assign(born=pd.Timestamp("2011-06-05"))
    pd.testing.assert_frame_equal(predictor.predict(few, pets), predictor.predict(typed, pets))


def test_a_column_that_is_missing_is_told(run, pets):
    frame, _ = rows_of(run, pets)
    predictor = Predictor.load(run)
    with pytest.raises(
        InputError, match="pets has no column 'colour', which the model was trained with; add this column, with"
    ):
        predictor.predict(frame.drop(columns="colour"), pets, name="pets")
    with pytest.raises(
        InputError, match=r"has no column that the model was trained with; it needs weight, colour, code, p"
    ):
        predictor.predict(frame[["kind"]], pets)
    with pytest.raises(InputError, match="pets has no rows; give at least one"):
        predictor.predict(frame.iloc[:0], pets, name="pets")


# The commands.


def test_the_command_writes_a_line_a_row(run, pets, tmp_path, capsys):
    out = tmp_path / "new" / "predicted.csv"
    assert predict.main(["--run", str(run), "--path", str(pets / "pets.csv"), "--out", str(out)]) == 0
    assert f"{ROWS} rows: {ROWS} from image and table" in capsys.readouterr().err
    written = pd.read_csv(out)
    assert list(written) == ["line", "predicted", "seen", "cat", "dog", "emu"]
    assert written["line"].tolist() == list(range(2, ROWS + 2))
    assert predict.main(["--run", str(run / "model.pt"), "--path", str(pets / "pets.csv")]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_mistakes_are_sentences(run, pets, tmp_path, capsys):
    def told(*arguments):
        assert predict.main(list(map(str, arguments))) == 2
        return capsys.readouterr().err

    table = ["--path", pets / "pets.csv"]
    assert "model.pt does not exist; give the folder of a run that has ended" in told("--run", tmp_path, *table)
    broken = tmp_path / "broken.pt"
    broken.write_bytes((run / "model.pt").read_bytes()[:-1000])
    assert f"error: cannot read {broken}" in told("--run", broken, *table)
    altered = bytearray((run / "model.pt").read_bytes())
    altered[len(altered) // 2] ^= 1
    broken.write_bytes(altered)
    assert "of the file is damaged" in told("--run", broken, *table)
    content = torch.load(run / "model.pt", weights_only=True)
    torch.save(content | {"format": 99}, tmp_path / "model.pt")
    assert "has format 99, and this release reads format 1; predict with" in told("--run", tmp_path, *table)
    torch.save({"weights": {}}, tmp_path / "model.pt")
    assert "the file is not a model of train.py" in told("--run", tmp_path, *table)
    torch.save(content | {"weights": {}}, tmp_path / "model.pt")
    assert f"that wrote the file (gaal_surgery {version('gaal_surgery')}, torch" in told("--run", tmp_path, *table)
    assert "nowhere.csv does not exist" in told("--run", run, "--path", tmp_path / "nowhere.csv")


@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("method", ["gaal_joint", *slow("concatenation")])
def test_an_exported_model_computes_the_same(pets, tmp_path, capsys, task, method):
    run = trained(pets, tmp_path / "run", task, method, "--epochs", "1")
    assert export.main(["--run", str(run)]) == 0
    assert "differ from those of the run's model by at most" in capsys.readouterr().out
    program = torch.export.load(run / "model.pt2").module()
    data = data_of(run)
    batch = next(iter(data.test_dataloader()))
    _, _, model = artifact.load(run)
    expected = next(iter(model.predictions(model(batch)).values()))
    torch.testing.assert_close(program(batch["image"][:5], batch["table"][:5]), expected[:5], rtol=1e-4, atol=1e-5)


def test_an_export_without_the_data_is_refused(pets, tmp_path, capsys):
    moved = tmp_path / "pets"
    shutil.copytree(pets, moved)
    run = trained(moved, tmp_path / "run", "classification", "gaal", "--epochs", "1")
    shutil.rmtree(moved)
    assert export.main(["--run", str(run)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not list(run.glob("*.pt2"))


def test_an_export_reads_the_data_where_they_lie_now(tmp_path, capsys):
    rng = np.random.default_rng(0)
    before, after, run = tmp_path / "before", tmp_path / "after", tmp_path / "run"
    houses = before / "houses" / "Houses Dataset"
    houses.mkdir(parents=True)
    lines = [f"{n % 5 + 1} {n % 3 + 1} {900 + 31 * n} 91901 {100000 + 5000 * n}" for n in range(40)]
    (houses / "HousesInfo.txt").write_text("\n".join(lines))
    for n in range(1, 41):
        for view in ("bathroom", "bedroom", "frontal", "kitchen"):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(houses / f"{n}_{view}.jpg")
    data = ["--dataset", "houses", "--data_root", str(before), "--image_size", "16"]
    training = ["--method", "concatenation", "--epochs", "1", "--workers", "0", "--threads", "1", "--out", str(run)]
    assert train.main([*data, *training]) == 0
    before.rename(after)
    assert export.main(["--run", str(run)]) == 2
    assert f"{before / 'houses'} does not exist" in capsys.readouterr().err
    assert export.main(["--run", str(run), "--data_root", str(after)]) == 0


def test_results_say_what_the_task_is(pets, tmp_path):
    run = trained(pets, tmp_path / "run", "regression", "gaal", "--log_target", "true")
    results = json.loads((run / "results.json").read_text())
    assert (results["task"], results["figure"]) == ("regression", "r2")
    assert set(results["test"]["fused"]) == {"r2", "rmse", "mae", "coverage"}
    predicted = pd.read_csv(io.StringIO((run / "predictions.csv").read_text()))
    assert (predicted["fused_low"] < predicted["fused"]).all()
    assert (predicted["fused"] < predicted["fused_high"]).all()
    assert predicted["target"].between(90, 450).all()
