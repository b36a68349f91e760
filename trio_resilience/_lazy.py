"""Import what a package offers when it is asked for, instead of all of it at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def offer(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a *package* (PEP 562).

    *homes* says of each module of the package which names it gives to the public,
    with spaces between them.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def get_attribute(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)  # so this is asked once
        return value

    def list_attributes() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return get_attribute, list_attributes, sorted(home_of)
