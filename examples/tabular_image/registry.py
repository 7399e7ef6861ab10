"""Names, and where what they mean is: knowing a name imports nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pkgutil import resolve_name
from typing import Any, TypeVar

from .errors import InputError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Objects by name; each is imported when it is asked for.

    Args:
        kind: What the objects are, in error messages.
        package: Holds their modules.
        places: "module:object" in the package, by name.
    """

    def __init__(self, kind: str, package: str, places: Mapping[str, str]) -> None:
        self._kind = kind
        self._package = package
        self._places = places

    def __getitem__(self, name: str) -> T:
        found: T = resolve_name(f"{self._package}.{self._places[name]}")
        return found

    def __contains__(self, name: Any) -> bool:
        return name in self._places  # Mapping's own would import

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def check(self, name: str) -> None:
        """Refuses an unknown name.

        Raises:
            InputError: There is no such name; the message has the nearest one, and all.
        """
        if name not in self:
            raise unknown(self._kind, name, self)


def unknown(kind: str, name: str, names: Iterable[str]) -> InputError:
    """The error for a name that nothing of a kind has; it has the nearest name, and all."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? All: " if close else "choose one of "
    return InputError(f"there is no {kind} {name!r}; {hint}{', '.join(names)}")
