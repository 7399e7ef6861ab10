"""A command line made of one function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from .errors import InputError, reason


def run_command(function: Callable[..., None], prog: str, description: str, arguments: Sequence[str] | None) -> int:
    """Calls a function with the options of a command line, and tells in one sentence what stops it.

    Args:
        function: Its parameters are the options, and its docstring is their help.
        prog: The name of the script.
        description: What the script does.
        arguments: The command line; None is that of the process.

    Returns:
        The exit code.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_function_arguments(function)
    options = parser.parse_args(arguments)
    try:
        function(**options)
    except BrokenPipeError:  # of `| head`; nobody reads a sentence
        sys.stderr.close()
    except InputError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except OSError as error:  # such as standard output on a full disk
        print(f"error: {reason(error)}; mend that and start again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0
