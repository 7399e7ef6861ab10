"""Options in words: what may be given for one, what its docstring says, and the names that a mistyped one resembles."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from .options import BatchSize, Finite, Fraction, Share

REQUIRED = inspect.Parameter.empty  # the default of an option that must be given
_MOST = 3  # names that a mistyped one may resemble

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    PositiveInt: "a whole number above 0",
    NonNegativeInt: "a whole number, 0 or more",
    BatchSize: "a whole number, 2 or more",
    Finite: "a number",
    PositiveFloat: "a number above 0",
    NonNegativeFloat: "a number, 0 or more",
    OpenUnitInterval: "a share between 0 and 1",
    ClosedUnitInterval: "a share from 0 to 1",
    Fraction: "a share above 0, at most 1",
    Share: "a share from 0, below 1",
}


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        name: What follows the two dashes.
        kind: The type of its value; None where it has no value.
        default: Its value where it is left out; `REQUIRED` where it must be given.
        text: Its docstring, in one line.
    """

    name: str
    kind: Any
    default: Any = REQUIRED
    text: str = ""

    @property
    def choices(self) -> list[str]:
        """The values that it may have, where they are few and have names."""
        return _choices(self.kind)

    @property
    def takes(self) -> str:
        """What may be given, in words."""
        return in_words(self.kind)

    @property
    def without(self) -> list[str]:
        """What happens where it is left out, in at most one expression; nothing where the docstring says so."""
        default = _value_in_words(self.default)
        return ["required"] if self.default is REQUIRED else [f"default {default}"] if default else []

    @property
    def line(self) -> str:
        """The first sentence of its docstring, and in brackets what it takes, where that is not any text."""
        any_text = self.kind is None or {str, Path} & set(_kinds(self.kind))
        told = [*([] if any_text else [self.takes]), *self.without]
        summary = self.text.split(". ")[0].removesuffix(".")
        return f"{summary} ({'; '.join(told)})" if told else summary


def in_words(kind: Any) -> str:
    """A type as a person would say it.

    Example:
        >>> in_words(PositiveInt | None)
        'a whole number above 0'
        >>> in_words(Literal["sgd", "adam"])
        'one of sgd, adam'
    """
    if kind is None:
        return "no value"
    if names := _choices(kind):
        return f"one of {', '.join(names)}"
    one, *others = _kinds(kind)
    if get_origin(one) in (list, tuple, Sequence):
        inside = "names" if get_args(one)[0] is str else "numbers"
        return f"{inside} as '[{'a, b' if inside == 'names' else '1, 2'}]'"
    return _WORDS.get(one, getattr(one, "__name__", str(one))) + (", or several as '[a, b]'" if others else "")


def options_of(source: Callable[..., Any], prefix: str = "", skip: Iterable[str] = ()) -> list[Option]:
    """The options of a function, its parameters, or of a dataclass, its fields; those of a nested one have its name.

    Args:
        source: The function, or the class.
        prefix: Of their names, such as "gaal.".
        skip: Parameters that are no options.
    """
    parts = reversed(source.__mro__[:-1]) if isinstance(source, type) else [source]
    texts = {name: text for part in parts for name, text in _texts(part).items()}
    kinds = get_type_hints(source)
    found: list[Option] = []
    for name, parameter in inspect.signature(source).parameters.items():
        if is_dataclass(kinds[name]):
            found += options_of(kinds[name], f"{prefix}{name}.")
        elif name not in skip:
            found.append(Option(prefix + name, kinds[name], parameter.default, texts.get(name, "")))
    return found


@cache  # a class is read from its file
def _texts(source: Callable[..., Any]) -> dict[str, str]:
    """What a docstring, or those below a class's own fields, say of each name."""
    documented = docstring_parser.parse_from_object(source).params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented}


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that a mistyped one resembles: those that it is the end of, after a dot, or else the most similar."""
    names = list(names)
    ends = [known for known in names if known.rpartition(".")[2] == name]
    return ends[:_MOST] or difflib.get_close_matches(name, names, n=1)


def did_you_mean(names: Sequence[str], form: Callable[[str], str] = repr) -> str:
    """A question to append to a sentence; empty where there is no name."""
    if not names:
        return ""
    *others, last = map(form, names)
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def _choices(kind: Any) -> list[str]:
    """The names that a type admits; the empty one, which stands for an option that was left out, is none."""
    return [value for part in _kinds(kind) if get_origin(part) is Literal for value in get_args(part) if value]


def _kinds(kind: Any) -> list[Any]:
    """The parts of a union but for None; of any other type, that type."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return [part for part in parts if part is not NoneType]


def _value_in_words(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case Path():
            return os.path.relpath(value)
        case list() | tuple():
            return ", ".join(map(_value_in_words, value))
    return "" if value is None else str(value)
