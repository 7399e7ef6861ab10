"""Command lines that explain themselves: a page of help, all about one option, and a sentence for each mistake."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, get_loader

from .errors import InputError, border, reason
from .wording import REQUIRED, Option, did_you_mean, nearest, options_of

_NARROWEST = 50  # columns that help is wrapped to, at least
_FOLDERS = ("examples", "benchmarks")  # of the repository, where scripts lie
_OWN = ("help", "config", "print_config")


class CommandLine:
    """The options of a command, its help, and what is wrong with what somebody wrote.

    An option may be written with hyphens in place of underscores.

    Args:
        script: Its file.
        description: What the script does.
        examples: Command lines, without the script.
        first: The option that is written as its value alone.
        short: Further names of options, by the name.
    """

    def __init__(
        self,
        script: str,
        description: str,
        examples: Sequence[str],
        *,
        first: str | None = None,
        short: Mapping[str, str] | None = None,
    ) -> None:
        self._script = Path(script).resolve()
        self._description = description
        self._examples = examples
        self._first = first
        self._short = short or {}
        # A mistake is a sentence, and a mistyped option is refused, never taken for a longer one.
        self.parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
        self.options: dict[str, Option] = {}
        self.groups: dict[str, list[str]] = {}
        """What the help shows under a heading: names of options, and text."""
        self.topics: dict[str, Callable[[], str]] = {}
        """What `--help NAME` tells where NAME is no option, or besides."""

    def add(self, source: Callable[..., Any], prefix: str = "", skip: Iterable[str] = ()) -> None:
        """Adds the options of a function, or of a dataclass under `--PREFIX.`."""
        if is_dataclass(source):
            self.parser.add_class_arguments(source, prefix or None, skip=set(skip))
        else:
            self.parser.add_function_arguments(source, skip=set(skip))
        self.options |= {option.name: option for option in options_of(source, prefix and f"{prefix}.", skip)}

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """The values of the options.

        Raises:
            InputError: A mistake in them.
            SystemExit: Help was asked for, and printed.
        """
        arguments = self.spelled(arguments)
        if "--help" in arguments:
            topic = arguments[arguments.index("--help") + 1 :][:1]
            print(self.help(topic[0]) if topic else self.overview())
            raise SystemExit(0)
        try:
            return self.parser.parse_args(arguments)
        except argparse.ArgumentError as error:
            raise InputError(self._mistake(arguments) or f"{reason(error)}; see --help") from error

    def parse_file(self, file: str, remedy: str) -> Namespace:
        """The values of the options in a YAML file.

        Raises:
            InputError: The file cannot be read, or a mistake in it; the sentence ends with the remedy.
        """
        with border("use the options in", file, remedy):
            try:
                return self.parser.parse_args(["--config", file])
            except argparse.ArgumentError as error:
                raise ValueError(self._mistake_in(file) or reason(error)) from error

    def spelled(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with the names that the parser knows."""
        words = list(arguments)
        for place, word in enumerate(words if self._first else []):
            before = words[place - 1] if place else ""
            if not word.startswith("-") and (not before.startswith("--") or "=" in before):
                words[place] = f"--{self._first}={word}"
                break
        return [word for given in words for word in self._spell(given)]

    def _spell(self, word: str) -> list[str]:
        if word == "-h":
            return ["--help"]
        name, equals, value = word.partition("=")
        known = name.removeprefix("--").replace("-", "_")
        known = self._short.get(known, known)
        if not name.startswith("--") or (known.removesuffix("+") not in self.options and known not in _OWN):
            return [word]
        return ["--help", value] if known == "help" and equals else [f"--{known}{equals}{value}"]

    def overview(self) -> str:
        """The whole help, a line or two an option."""
        required = [
            f"{name.upper()} " if name == self._first else f"--{name} {name.upper()} "
            for name, option in self.options.items()
            if option.default is REQUIRED
        ]
        parts = [
            f"usage: {self._script.name} {''.join(required)}[--OPTION VALUE ...]",
            "\n".join(filled(part) for part in re.split(r"\n(?=\n|- )", self._description.strip())),
            "\n".join(["Examples:", *(self._example(example) for example in self._examples)]),
        ]
        groups = self.groups or {"Options": list(self.options)}
        shown = [self._label(name) for names in groups.values() for name in names if name in self.options]
        indent = 3 + max(map(len, shown))
        for heading, entries in groups.items():
            lines = [
                filled(self.options[entry].line, f"  {self._label(entry)}".ljust(indent), " " * indent)
                if entry in self.options
                else filled(entry, " " * indent, " " * indent)
                for entry in entries
            ]
            parts.append("\n".join([f"{heading}:", *lines]))
        return "\n\n".join(parts)

    def help(self, topic: str) -> str:
        """All about an option, or about what else has a name.

        Raises:
            InputError: Nothing has it.
        """
        [spelled] = self._spell(f"--{topic.lstrip('-')}")
        name = spelled.removeprefix("--")
        told = [self.paragraph(name)] if name in self.options else []
        told += [self.topics[name]()] if name in self.topics else []
        told = told or [self.paragraph(option) for option in self.options if option.startswith(f"{name}.")]
        if told:
            return "\n\n".join(told)
        hint = did_you_mean(nearest(name, [*self.options, *self.topics]), lambda close: f"--help {close}")
        raise InputError(
            f"--help says nothing about {topic!r}{hint or ';'} {self._script.name} --help lists the options"
        )

    def paragraph(self, name: str) -> str:
        """An option, what it takes, and its docstring."""
        option = self.options[name]
        head = filled(f"{self._label(name)}: {'; '.join([option.takes, *option.without])}")
        return f"{head}\n{filled(option.text, '    ', '    ')}"

    def _label(self, name: str) -> str:
        return name.upper() if name == self._first else f"--{name}"

    def _example(self, example: str) -> str:
        example = re.sub(r"(--\S+) (?!-)", "\\1\0", example)  # an option and its value stay together
        parts = self._script.parts
        root = max((place for place, part in enumerate(parts) if part in _FOLDERS), default=-1)
        whole = f"python {'/'.join(parts[root:])} {example}".rstrip()
        return filled(whole, "  ", "      ", room=2).replace("\0", " ").replace("\n", " \\\n")

    def _mistake(self, arguments: Sequence[str]) -> str | None:
        """What is wrong with a command line."""
        given = list(_pairs(arguments))
        for name, value in given:
            if name is None:
                return f"{value!r} belongs to no option; options are --NAME VALUE, or --NAME '[a, b]'; see --help"
            told = self._wrong(name.removesuffix("+"), value, "--")
            if told:
                return told
        names = {name for name, _ in given}
        for name, option in self.options.items():
            if option.default is REQUIRED and name not in names:
                return f"{self._label(name)} is missing: {option.line}; see --help"
        return None

    def _mistake_in(self, file: str) -> str | None:
        """What is wrong with a YAML file."""
        try:
            content = get_loader("yaml")(Path(file).read_text(encoding="utf-8"))
        except Exception:  # what is wrong with such a file is told by whoever tried first
            return None
        if not isinstance(content, Mapping):
            return None
        for name, value in self._flat(content):
            told = self._wrong(name, value, "")
            if told:
                return told
        return None

    def _flat(self, content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in content.items():
            if isinstance(value, Mapping):
                yield from self._flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    def _wrong(self, name: str, value: Any, dashes: str) -> str | None:
        """What is wrong with an option and its value, if anything; no value is None on the command line."""
        prefixes = {known.rpartition(".")[0] for known in self.options} - {""}
        if name in _OWN:
            return None if name != "config" or value is not None else "--config is followed by a file; see --help"
        if name in prefixes:
            return f"{dashes}{name} is no option by itself; its options are {dashes}{name}.OPTION; see --help {name}"
        if name not in self.options:
            close = self._short.get(name)
            hint = did_you_mean([close] if close else nearest(name, [*self.options, *_OWN]), lambda near: dashes + near)
            return f"there is no option {dashes}{name}{hint or ';'} --help lists the options"
        option = self.options[name]
        if dashes and value is None:
            return f"{dashes}{name} is followed by no value; it takes {option.takes}; see --help {name}"
        if _accepts(option.kind, value):
            return None
        hint = did_you_mean(nearest(str(value), option.choices))
        written = self._label(name) if dashes else name
        return f"{written} takes {option.takes}, not {value!r}{f'{hint} See' if hint else '; see'} --help {name}"


def run_command(
    function: Callable[..., None],
    script: str,
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    example: str,
    source: type[Any] | None = None,
    kept: str = "nothing was written",
    **more: Any,
) -> int:
    """Calls a function with the options of a command line, and tells in one sentence what stops it.

    Args:
        function: Its parameters are the options, and its docstring is their help.
        script: The file of the command.
        description: What the command does.
        arguments: The command line; None is that of the process.
        example: A command line, without the script.
        source: A dataclass that the function takes, and whose fields are the options in place of its parameters.
        kept: What an interruption leaves.
        more: Of `CommandLine`.

    Returns:
        The exit code.
    """
    line = CommandLine(script, description or "", [example], **more)
    line.add(source or function)
    try:
        values = line.parser.instantiate(line.parse(sys.argv[1:] if arguments is None else arguments))
        function(source(**values)) if source else function(**values)
    except BrokenPipeError:  # of `| head`; nobody reads a sentence
        sys.stderr.close()
    except InputError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except OSError as error:  # such as standard output on a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{reason(error)}; mend that and start again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


def _accepts(kind: Any, value: Any) -> bool:
    """Whether a value, or its text on a command line, is one of a type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        parser.parse_args([f"--value={value}"]) if isinstance(value, str) else parser.parse_object({"value": value})
    except argparse.ArgumentError:
        return False
    return True


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str | None, str | None]]:
    """Names and values; a value that follows no name has None for one, a name that no value follows likewise."""
    words = list(arguments)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            yield None, name + equals + value
        elif equals:
            yield name[2:], value
        else:
            yield name[2:], words.pop(0) if words and not words[0].startswith("--") else None


def _width() -> int:
    return max(_NARROWEST, shutil.get_terminal_size().columns)


def filled(text: str, first: str = "", rest: str = "", room: int = 0) -> str:
    """Wraps text to the terminal, or to the columns of the environment.

    Args:
        text: The text; a line break at its start stays.
        first: What the first line begins with.
        rest: What every other line begins with.
        room: Columns to leave at the end of a line.
    """
    lead = "\n" if text.startswith("\n") else ""
    return lead + textwrap.fill(
        " ".join(text.split()),
        _width() - room,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
