"""Frozen records, such as statistics and events: equal if their fields are, shown by their fields.

What attrs would write for each class is here once for all of them. There are many such classes, and
to compile it for each would take a large part of the time that the package takes to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, dataclass_transform

import attrs

T = TypeVar("T")


class Record:
    """The base of every record; `record` makes its subclasses."""

    __slots__ = ()

    def _fields(self) -> dict[str, Any]:
        cls: Any = type(self)
        return {field.name: getattr(self, field.name) for field in attrs.fields(cls)}

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self._fields().items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash((type(self), *self._fields().values()))

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        """Copy and pickle by the fields."""
        return partial(type(self), **self._fields()), ()


@dataclass_transform(frozen_default=True, field_specifiers=(attrs.field,))
def record(cls: type[T]) -> type[T]:
    """Make *cls*, which derives from `Record`, a frozen attrs class."""
    return attrs.frozen(eq=False, repr=False, getstate_setstate=False)(cls)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(attrs.field,))
def keyword_record(cls: type[T]) -> type[T]:
    """Make *cls*, which derives from `Record`, a frozen attrs class with keyword-only fields."""
    return attrs.frozen(eq=False, repr=False, getstate_setstate=False, kw_only=True)(cls)
