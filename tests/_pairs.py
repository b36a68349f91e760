"""Parametrize a test by pairs of options: few bugs need three at once, but the cases multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations, product
from typing import Any, TypeAlias, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])
Value: TypeAlias = tuple[str, tuple[Any, ...]]
"""One line of a parametrization: its id, and what it passes to the test."""


def in_pairs(test: Test) -> Test:
    """Let every value of each parametrization below meet every value of each other one.

    Where all combinations would be the product of all the numbers of values, this is about the
    product of the largest two.
    """
    marks: list[pytest.Mark] = vars(test)["pytestmark"]
    varied = [mark for mark in marks if mark.name == "parametrize"]
    vars(test)["pytestmark"] = [mark for mark in marks if mark not in varied]
    cases = pairwise([list(_values(mark)) for mark in varied])
    combined = pytest.mark.parametrize(
        ",".join(mark.args[0] for mark in varied),
        [list(chain.from_iterable(arguments for _, arguments in case)) for case in cases],
        ids=["-".join(name for name, _ in case) for case in cases],
    )
    parametrized: Test = combined(test)
    return parametrized


def pairwise(values: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return few combinations, in which any two values of different sequences meet."""
    places = list(product(*(range(len(each)) for each in values)))
    missing = set(chain.from_iterable(map(_pairs, places)))
    chosen = list[tuple[int, ...]]()
    while missing:
        best = max(places, key=lambda place: len(_pairs(place) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return [tuple(each[i] for each, i in zip(values, place, strict=True)) for place in chosen]


def _pairs(place: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(place), 2))


def _values(mark: pytest.Mark) -> Iterator[Value]:
    names, values = mark.args
    is_single = "," not in names
    ids = mark.kwargs.get("ids") or list(map(str, values))
    for name, value in zip(ids, values, strict=True):
        yield name, (value,) if is_single else tuple(value)
