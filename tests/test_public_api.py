"""The public API is pinned in `public_api.txt`, so that every change of it is seen in a review.

After an intended change, write it anew, from the root of the repository:

    python3 -m tests.test_public_api
"""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_overloads

import pytest

import trio_resilience
import trio_resilience.testing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

PINNED = Path(__file__).with_name("public_api.txt")
MODULES = [trio_resilience, trio_resilience.testing]
ROOT = trio_resilience.__name__

METHOD_KINDS = {"classmethod", "staticmethod"}

# The special methods that make an object usable in a statement or as a decorator.
SPECIAL = [
    "__call__",
    "__enter__",
    "__exit__",
    "__aenter__",
    "__aexit__",
    "__iter__",
    "__next__",
    "__aiter__",
    "__anext__",
]


class Verbatim(str):
    """Text that `inspect.Signature` shows as it is, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def describe_all() -> str:
    """Return the whole public API, a paragraph for each name."""
    return "\n".join(line for module in MODULES for line in _module(module))


def _module(module: ModuleType) -> Iterator[str]:
    yield f"# {module.__name__}\n"
    for name in sorted(module.__all__):
        yield from _name(name, getattr(module, name))
        yield ""


def _name(name: str, value: object) -> Iterator[str]:
    if isinstance(value, type):
        # How an enumeration looks up a member has another signature in each version of Python.
        cls: type[Any] = value
        signature = "" if issubclass(cls, Enum) else _signature(cls)
        yield f"class {name}{_bases(cls)}{signature}"
        yield from _members(cls)
    elif inspect.isfunction(value):
        yield from _function(name, value, indent="")
    elif type(value).__module__ in {"collections.abc", "types", "typing"}:
        yield f"{name} = {value!r}"
    else:
        yield f"{name}: {type(value).__name__}"


def _bases(cls: type) -> str:
    names = [base.__name__ for base in cls.__bases__ if base is not object]
    return f"({', '.join(names)})" if names else ""


def _members(cls: type) -> Iterator[str]:
    for name in sorted(_fields(cls)):
        yield f"    {name}: {_fields(cls)[name]}"
    for name in _public_members(cls):
        member: object = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            yield f"    property {name}{_signature(member.fget)}"
        elif (kind := type(member).__name__) in METHOD_KINDS:
            yield from _function(name, getattr(cls, name), indent=f"    {kind} ")
        elif callable(member):
            yield from _function(name, member, indent="    ")
        else:
            yield f"    {name} = {member!r}"


def _fields(cls: type) -> dict[str, str]:
    """Return the annotated attributes of *cls*, the inherited ones too, with their types."""
    found: dict[str, str] = {}
    for base in _own_bases(cls):
        found |= {name: str(kind) for name, kind in inspect.get_annotations(base).items()}
    return {name: kind for name, kind in found.items() if not name.startswith("_")}


def _public_members(cls: type) -> list[str]:
    """Return the names of what *cls* and its bases of ours define."""
    names = {name for base in _own_bases(cls) for name in vars(base)} - set(_fields(cls))
    return sorted(name for name in names if name in SPECIAL or not name.startswith("_"))


def _own_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == ROOT]


def _function(name: str, function: Any, indent: str) -> Iterator[str]:
    kind = "async def" if inspect.iscoroutinefunction(function) else "def"
    if inspect.isgeneratorfunction(getattr(function, "__wrapped__", None)):
        kind = "@contextmanager def"
    for variant in get_overloads(function) or [function]:
        yield f"{indent}{kind} {name}{_signature(variant)}"


def _signature(function: Any) -> str:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a class that takes its arguments in C, as exceptions do
        return ""
    parameters = [_plain(parameter) for parameter in signature.parameters.values()]
    result = signature.return_annotation
    if isinstance(result, str):
        result = Verbatim(result)
    if isinstance(function, type):
        result = inspect.Signature.empty
    return str(signature.replace(parameters=parameters, return_annotation=result))


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    """Show an annotation without quotes, and a default without its address in memory."""
    if isinstance(parameter.annotation, str):
        parameter = parameter.replace(annotation=Verbatim(parameter.annotation))
    if callable(parameter.default) and parameter.default is not inspect.Parameter.empty:
        name = getattr(parameter.default, "__qualname__", repr(parameter.default))
        parameter = parameter.replace(default=Verbatim(name))
    return parameter


def documented_names() -> Iterator[tuple[str, object]]:
    """Yield every public name that can carry a docstring, `Class.member` too, and what it is."""
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type):
                yield name, value
                for member in _public_members(value):
                    yield f"{name}.{member}", inspect.getattr_static(value, member)
            elif inspect.isfunction(value):
                yield name, value


def test_the_public_api_is_the_pinned_one() -> None:
    """Nothing is added, removed or changed unnoticed."""
    how = "after an intended change: python3 -m tests.test_public_api"
    assert describe_all().splitlines() == PINNED.read_text().splitlines(), how


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_lists_every_public_name(module: ModuleType) -> None:
    """What a module re-exports is in its `__all__`, in alphabetical order, once."""
    ours = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith(f"{ROOT}.")
    }
    assert ours <= set(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("name, value", list(documented_names()))
def test_every_public_name_has_a_docstring(name: str, value: object) -> None:
    """Classes, functions, methods and properties say what they guarantee."""
    is_attribute = not callable(value) and not isinstance(value, property)
    is_special = name.rpartition(".")[2] in SPECIAL
    assert (value.__doc__ or "").strip() or is_special or is_attribute


if __name__ == "__main__":
    PINNED.write_text(describe_all())
