"""A test that is parametrized by pairs misses no two values, and makes few cases of them."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests._pairs import in_pairs, pairwise


@pytest.mark.parametrize(
    "values, number",
    [
        (["ab", "cd", "ef"], 4),
        (["ab", "cdef", "ghi"], 12),
        (["ab", "cd"], 4),
        (["ab", "cd", "ef", "gh"], 6),
    ],
)
def test_any_two_values_meet(values: list[str], number: int) -> None:
    """In so many cases at most, each of which is one of the product."""
    cases = pairwise(values)
    assert len(cases) <= number
    assert set(cases) <= set(product(*values))
    for (i, left), (j, right) in combinations(enumerate(values), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(left, right))


def test_marks_become_one() -> None:
    """With the names, the ids and the values that each had; other marks stay."""

    @in_pairs
    @pytest.mark.parametrize("flag", [True, False], ids=["on", "off"])
    @pytest.mark.watchdog(7)
    @pytest.mark.parametrize("low, high", [(1, 2), (3, 4)], ids=["small", "large"])
    @pytest.mark.parametrize("word", ["a", "b"])
    def test(word: str, low: int, high: int, *, flag: bool) -> None:
        raise AssertionError(word, low, high, flag)

    watchdog, mark = vars(test)["pytestmark"]
    assert (watchdog.name, watchdog.args) == ("watchdog", (7,))
    assert mark.args[0] == "word,low, high,flag"
    cases = dict(zip(mark.kwargs["ids"], mark.args[1], strict=True))
    assert len(cases) == 4
    assert cases["a-small-on"] == ["a", 1, 2, True]
