"""Turn the words of one table of options into values, and find all mistakes in it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final, cast, final

import attrs

from trio_resilience._config_mistakes import Path, short, unknown
from trio_resilience._config_schema import REQUIRED, Option, Table


@final
@attrs.frozen(eq=False)
class Nested:
    """A table in the place of a value, such as a backoff."""

    kind: str
    table: Table
    given: Mapping[str, object]

    def over(self, below: object) -> Nested:
        """Return what it is with the options of one of its kind that it does not give."""
        if isinstance(below, Nested) and below.kind == self.kind:
            return attrs.evolve(self, given={**below.given, **self.given})
        return self

    def make(self) -> object:
        """Return what the table describes."""
        require(self.table, self.given)
        return self.table.make(**self.given)


def require(table: Table, given: Mapping[str, object]) -> bool:
    """Complain of an option that is not given, and has no default."""
    for key, option in table.options.items():
        if option.default is REQUIRED and key not in given:
            raise TypeError(f"`{key}` is required")
    return True


_tables: Final[dict[type[Any], Table]] = {}
"""By the classes that are made for them."""


@cache
def structure(table: Table) -> Callable[[Mapping[str, object]], dict[str, object]]:
    """Return a function that checks each option that is given, and reports all mistakes at once."""
    # Here, since whoever has no configuration needs no cattrs.
    try:
        from cattrs import Converter, override  # noqa: PLC0415
        from cattrs.gen import make_dict_structure_fn  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a configuration needs {error.name}: pip install 'trio_resilience[config]'",
            name=error.name,
        ) from None
    cls = attrs.make_class(
        table.name, {key: attrs.field(default=None) for key in table.options}, kw_only=True
    )
    _tables[cls] = table
    hooks: Any = {key: override(struct_hook=_hook(option)) for key, option in table.options.items()}
    structurer: Any = make_dict_structure_fn
    read: Any = structurer(cls, Converter(forbid_extra_keys=True), **hooks)

    def read_all(given: Mapping[str, object]) -> dict[str, object]:
        made: Any = read(given, cls)
        return {key: getattr(made, key) for key in table.options if key in given}

    return read_all


def _hook(option: Option) -> Callable[[Any, object], object]:
    return lambda value, _: _read(option, value)


def _read(option: Option, value: object) -> object:
    if option.choices and isinstance(value, Mapping):
        return _nested(option, cast("Mapping[str, object]", value))
    if option.key == "budget" and isinstance(value, str):
        return value
    if option.choices and not option.is_time and not option.accepts(value):
        example = '{kind = "exponential", base_delay = "100ms"}'
        raise TypeError(f"`{option.key}` must be a table such as {example}, got {value!r}")
    return option.read(value)


def _nested(option: Option, given: Mapping[str, object]) -> Nested:
    kinds = list(option.choices)
    rest = dict(given)
    kind = kinds[0] if len(kinds) == 1 else rest.pop("kind", kinds[0])
    if not isinstance(kind, str) or kind not in kinds:
        words = ", ".join(map(repr, kinds))
        raise ValueError(f"`kind` must be one of {words}, got {short(kind)}")
    table = option.choices[kind]
    return Nested(kind, table, structure(table)(rest))


def told(error: BaseException, path: Path) -> Iterator[tuple[Path, str | Callable[[], str]]]:
    """Yield all mistakes that cattrs has collected, each with its path."""
    from cattrs.errors import (  # noqa: PLC0415
        AttributeValidationNote,
        ClassValidationError,
        ForbiddenExtraKeysError,
    )

    notes = [each for each in getattr(error, "__notes__", ()) if isinstance(each, str)]
    path += tuple(note.name for note in notes if isinstance(note, AttributeValidationNote))
    if isinstance(error, ClassValidationError):
        for each in error.exceptions:
            yield from told(each, path)
    elif isinstance(error, ForbiddenExtraKeysError):
        table = _tables[error.cl]
        for key in sorted(error.extra_fields):
            yield (*path, key), _misplaced(table, key)
    elif isinstance(error, (TypeError, ValueError)):
        yield path, str(error)
    else:
        raise error


def _misplaced(table: Table, key: str) -> str | Callable[[], str]:
    if key not in table.code:
        return unknown(key, table.options)
    return f"is code, which no file can give: in a program, give a {table.name} for the whole table"
