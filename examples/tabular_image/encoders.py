"""Names of encoders, checked before any data are read: encoders of the pipeline, of timm, and the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import InputError, border, reason
from .registry import unknown

if TYPE_CHECKING:
    from torch import nn

IMAGE_ENCODERS = ("small", "features", "resnet18", "resnet50")
TABLE_ENCODERS = ("mlp", "ft_transformer")
TIMM = "timm:"
_OWN = "PACKAGE.MODULE:FACTORY"


def check_image_encoder(name: str) -> None:
    """Refuses a name that no image encoder has. Only a name of timm or of the user's own module imports something.

    Raises:
        InputError: There is no such encoder, or its package or module cannot be used.
    """
    if name.startswith(TIMM):
        _check_timm(name.removeprefix(TIMM))
    elif ":" in name:
        _check_own("image", name, "channels")
    elif name not in IMAGE_ENCODERS:
        raise unknown("image encoder", name, [*IMAGE_ENCODERS, f"{TIMM}NAME", _OWN])


def check_table_encoder(name: str) -> None:
    """Refuses a name that no table encoder has.

    Raises:
        InputError: There is no such encoder, or its module cannot be used.
    """
    if ":" in name:
        _check_own("table", name, "table_width", "width")
    elif name not in TABLE_ENCODERS:
        raise unknown("table encoder", name, [*TABLE_ENCODERS, _OWN])


def own_encoder(kind: str, name: str, **arguments: Any) -> nn.Module:
    """The encoder that the user's own factory makes.

    Args:
        kind: "image" or "table".
        name: "package.module:factory", where the module is installed or in the current folder.
        **arguments: The arguments of the factory.

    Raises:
        InputError: The factory cannot be imported, fails, or makes no module.
    """
    from torch import nn

    factory = _factory(kind, name)
    with running(kind, name, "build"):
        made = factory(**arguments)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"the factory of the {kind} encoder {name} returns {type(made).__name__}; return an nn.Module instead"
        )
    return made


@contextmanager
def running(kind: str, name: str, doing: str) -> Iterator[None]:
    """Turns an exception of the user's own encoder into an `InputError` that names the last line of the module."""
    try:
        yield
    except Exception as error:
        file = sys.modules[name.partition(":")[0]].__file__
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f", line {lines[-1]} of {file}" if lines else ""
        raise InputError(
            f"cannot {doing} the {kind} encoder {name} ({type(error).__name__}: {reason(error)}{where}); "
            "correct the encoder"
        ) from error


def _check_timm(model: str) -> None:
    if find_spec("timm") is None:
        raise InputError(f"the image encoder {TIMM}{model} needs the package timm; pip install timm")
    import timm

    if not timm.is_model(model):
        hint = _nearest(model, timm.list_models()) or "timm.list_models() lists all"
        raise InputError(f"timm has no model {model!r}; {hint}")
    with border("use", f"{TIMM}{model}", "timm.list_pretrained() lists all tags"):
        timm.get_pretrained_cfg(model)  # refuses a wrong tag


def _check_own(kind: str, name: str, *arguments: str) -> None:
    try:
        signature = inspect.signature(_factory(kind, name))
    except ValueError:  # a built-in may have none
        return
    try:
        signature.bind(**dict.fromkeys(arguments))
    except TypeError as error:
        called = ", ".join(f"{argument}=" for argument in arguments)
        raise InputError(
            f"the factory of the {kind} encoder {name} is called with {called} ({reason(error)}); "
            "change the factory to accept this call"
        ) from error


def _factory(kind: str, name: str) -> Callable[..., Any]:
    place, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; a script has its own folder there
    remedy = f"name a module that is installed or lies in the current folder, as {_OWN}"
    with border(f"import the module of the {kind} encoder", name, remedy):
        module: ModuleType = importlib.import_module(place)
    if not hasattr(module, attribute):
        hint = _nearest(attribute, vars(module)) or f"define {attribute!r} in {module.__file__}"
        raise InputError(f"the {kind} encoder {name}: the module {place} has no {attribute!r}; {hint}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise InputError(
            f"the {kind} encoder {name} is {type(factory).__name__}; name a function or class that makes an nn.Module"
        )
    return factory


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else ""
