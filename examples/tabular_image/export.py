"""Export a trained model for other programs: `python examples/tabular_image/export.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tabular_image.commands import run_command


def export(run: str, out: str | None = None, onnx: bool = False, data_root: str | None = None) -> None:
    """Write the model of a run for other programs.

    Args:
        run: Folder of a run of train.py.
        out: File to write. The default is model.pt2 in the run folder, or model.onnx.
        onnx: Write ONNX in place of torch's own format. ONNX needs the packages onnx, onnxscript and onnxruntime.
        data_root: Folder where the data set lies now. The default is the folder that the run read.

    Raises:
        InputError: The model cannot be exported, its data are not at hand, or the exported model differs.
    """
    from tabular_image.exporting import write_model  # takes seconds

    write_model(Path(run), Path(out) if out else None, onnx, data_root)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(
        export,
        __file__,
        "Write the model of a run of train.py for other programs, and compare its outputs on the test rows.",
        arguments,
        example="--run runs/digits-gaal-seed0",
    )


if __name__ == "__main__":
    sys.exit(main())
