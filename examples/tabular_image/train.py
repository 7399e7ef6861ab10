"""Train and test an image-and-table model: `python examples/tabular_image/train.py --help`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from tabular_image.errors import InputError, reason
from tabular_image.interrupts import interrupts
from tabular_image.processes import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Imports take their time, and Ctrl-C in the midst of one is an interruption like any other. Help and mistakes
        # are answered before the slow ones.
        from tabular_image.command_line import parse

        options = parse(arguments)
        from tabular_image.run import run

        _quieten()  # after the imports, as Lightning sets its level at its own
        run(options, command=shlex.join(["python", "examples/tabular_image/train.py", *arguments]))
    except BaseException as error:
        if interrupts.received is not None:  # whatever a library made of the exception
            interrupts.ignore()
            say(interrupts.sentence(), file=sys.stderr)
            return 128 + interrupts.received
        match error:
            case InputError():
                tell = say if error.everywhere else print
                tell(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
            case BrokenPipeError():  # of `| head`; nobody reads a sentence
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            case OSError() | MemoryError():  # such as standard output on a full disk
                print(f"error: {reason(error)}; mend that and start again", file=sys.stderr)
            case _:
                raise
        return 2
    return 0


def _quieten() -> None:
    """Drops Lightning's advertising and its advice that does not apply here; warnings of substance stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",  # --workers decides
        ".*It is recommended to use .*sync_dist=True.*",  # every process validates all rows
        ".*Checkpoint directory .* exists and is not empty.*",  # that is what a resumed run looks like
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message=advice)


if __name__ == "__main__":
    interrupts.catch()
    sys.stdout.reconfigure(errors="backslashreplace")  # a class name that the terminal has no letters for
    code = main()
    interrupts.ignore()  # nothing is left to interrupt
    sys.exit(code)
