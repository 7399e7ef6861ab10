"""A trained model as one function of a picture and a row of the table, for other programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .artifact import load
from .command_line import as_written
from .errors import InputError, border
from .files import replacing
from .methods.base import Method
from .run import build_data, read_samples

_ONNX = ("onnx", "onnxscript", "onnxruntime")
_CLOSE = 1e-4  # relative to the largest output


class Fused(nn.Module):
    """A method as a function of a picture and a row of the table."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        """Outputs (B, C) of the method's prediction."""
        return next(iter(self.method.predictions(self.method({"image": image, "table": table})).values()))


def write_model(run: Path, out: Path | None, onnx: bool, data_root: str | None) -> None:
    """Writes the fused model of a run, and compares its outputs with those of the run's model on the test rows.

    The model takes pictures, float (B, channels, S, S) normalised or (B, features, 1, 1) standardised, and encoded
    rows of the table, float (B, D), for any B of at least 2. It returns what the prediction is made of, (B, C): the
    logits of classes or labels, or mean and log-variance of a standardised number.

    Args:
        run: The run folder.
        out: The file; None is model.pt2 in the run folder, or model.onnx.
        onnx: Write ONNX in place of torch's own format.
        data_root: The folder where the data set lies; None is the folder that the run read.

    Raises:
        InputError: The model cannot be exported, its data are not at hand, or the exported model differs.
    """
    lacking = [name for name in _ONNX if find_spec(name) is None] if onnx else []
    if lacking:
        raise InputError(f"--onnx true needs {', '.join(_ONNX)}; pip install {' '.join(lacking)}")
    _, recipe, method = load(run)
    options = as_written(["--config", str(run / "config.yaml")])
    options = replace(options, data_root=data_root or options.data_root)
    data = build_data(options, read_samples(options))
    if recipe.task != data.task or recipe.channels != data.channels:
        raise InputError(f"the data are not those that the run in {run} was trained on; give their --data_root")
    batches = [(batch["image"], batch["table"]) for batch in data.test_dataloader() if len(batch["row"]) > 1]
    model = Fused(method)
    path = out or run / f"model.{'onnx' if onnx else 'pt2'}"
    with border("export the model to", path, "choose another method or another --out"), replacing(path) as temporary:
        exported = _written(model, batches[0], temporary, onnx)
        with torch.inference_mode():
            pairs = [(exported(*batch), model(*batch)) for batch in batches]
        difference = max((theirs - ours).abs().max().item() for theirs, ours in pairs)
        if not difference <= _CLOSE * max(1.0, *(ours.abs().max().item() for _, ours in pairs)):
            raise ValueError(f"its outputs for the test rows differ by {difference:.2g}")
    rows = sum(len(table) for _, table in batches)
    print(f"{path}: outputs for {rows} test rows differ from those of the run's model by at most {difference:.1g}")


def _written(model: Fused, example: tuple[Tensor, Tensor], path: Path, onnx: bool) -> Callable[..., Tensor]:
    """Writes the model; returns what the file computes."""
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not onnx:
            torch.export.save(torch.export.export(model, example, dynamic_shapes=shapes), path)
            return torch.export.load(path).module()
        torch.onnx.export(model, example, path, dynamo=True, external_data=False, dynamic_shapes=shapes, verbose=False)
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(image: Tensor, table: Tensor) -> Tensor:
        given = dict(zip(names, (image.numpy(), table.numpy()), strict=False))
        return torch.from_numpy(session.run(None, given)[0])

    return run
