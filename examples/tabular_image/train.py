"""Train and test an image-and-table classifier: `python examples/tabular_image/train.py --help`."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from tabular_image.command_line import parse
from tabular_image.errors import ImageError, InputError
from tabular_image.processes import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    _quieten()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        from tabular_image.run import run  # takes seconds; help and mistakes are answered by now

        run(options)
    except InputError as error:
        tell = print if isinstance(error, ImageError) else say
        tell(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _quieten() -> None:
    """Drops Lightning's advertising and its advice that does not apply here; warnings of substance stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",  # --workers decides
        ".*Checkpoint directory .* exists and is not empty.*",  # that is what a resumed run looks like
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message=advice)


if __name__ == "__main__":
    sys.exit(main())
