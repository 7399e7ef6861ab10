"""Registries of objects by name: a name can be looked up without importing its object."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from .errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """The registration of an object, in one line.

    Attributes:
        place: "module:object" in the registry's package.
    """

    place: str


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, T], Generic[T, E]):
    """Objects by name; each is imported when it is asked for.

    The first line of a module's docstring is `TITLE: SUMMARY.`, and is read without importing the module.

    Args:
        kind: What error messages call an object.
        package: The package of the objects' modules.
        entries: The registrations of the objects by name.
    """

    def __init__(self, kind: str, package: str, entries: Mapping[str, E]) -> None:
        self._kind = kind
        self._package = package
        self.entries = entries

    def __getitem__(self, name: str) -> T:
        found: T = resolve_name(f"{self._package}.{self.entries[name].place}")
        return found

    def __contains__(self, name: Any) -> bool:
        return name in self.entries  # Mapping's own would import

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def title(self, name: str) -> str:
        """The object's name in the literature, as in `OGM-GE`."""
        return self._headline(name)[0]

    def summary(self, name: str) -> str:
        """What the object is, in a few words to follow the title, without a full stop."""
        return self._headline(name)[1]

    def check(self, name: str) -> None:
        """Refuses an unknown name.

        Raises:
            InputError: There is no such name; the message has the nearest name and all names.
        """
        if name not in self:
            raise unknown(self._kind, name, self)

    def _headline(self, name: str) -> tuple[str, str]:
        module, _, _ = self.entries[name].place.partition(":")
        lines = files(self._package).joinpath(f"{module}.py").read_text(encoding="utf-8").splitlines()
        first = next((line for line in lines if line.startswith('"""')), "")
        title, _, summary = first.strip('"').partition(": ")
        return title, summary.removesuffix(".")


def unknown(kind: str, name: str, names: Iterable[str]) -> InputError:
    """The error for an unknown name of a kind, with the nearest name and all names."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? All: " if close else "choose one of "
    return InputError(f"there is no {kind} {name!r}; {hint}{', '.join(names)}")
