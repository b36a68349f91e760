"""The rules that all arguments are checked by, and their one wording."""

from __future__ import annotations

import datetime as dt
import functools
import math
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import returns
from trio_resilience import CircuitOpenError, Hedge, Retry
from trio_resilience import _checks as checks
from trio_resilience._checks import NotAnOperationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator

NAN, INF = math.nan, math.inf


def brief(value: object) -> str:
    return repr(value)[:20]


# --- numbers and words --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 5, 10**30])
def test_integers_pass(value: int) -> None:
    """Any integer that is large enough, and it comes back as an int."""
    assert checks.integer("count", value, minimum=1) == value


@pytest.mark.parametrize("value", [True, False, 1.0, 1.5, NAN, INF, "1", None, Fraction(2), [1]])
def test_what_is_no_integer_is_a_type_error(value: object) -> None:
    """A float is not rounded, and a bool is not a count."""
    with pytest.raises(TypeError, match=r"^`count` must be an int, got "):
        checks.integer("count", value, minimum=1)


@pytest.mark.parametrize("value", [0, -1, -(10**30)])
def test_a_small_integer_is_a_value_error(value: int) -> None:
    """The message has the name, the rule and the value."""
    with pytest.raises(ValueError, match=f"^`count` must be >= 1, got {value}$"):
        checks.integer("count", value, minimum=1)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.5, INF, Fraction(1, 2)], ids=brief)
def test_numbers_pass_as_floats(value: Any) -> None:
    """Whatever kind of real number was given."""
    found = checks.number("ratio", value)
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize(
    "value", [True, False, "1", None, 1j, Decimal(1), dt.timedelta(1), [1.0]], ids=brief
)
def test_what_is_no_number_is_a_type_error(value: object) -> None:
    """Strings are not parsed, and bools do not count."""
    with pytest.raises(TypeError, match=r"^`ratio` must be a number, got "):
        checks.number("ratio", value)


@pytest.mark.parametrize("value", [-1, -0.001, NAN, -INF])
def test_a_small_number_is_a_value_error(value: float) -> None:
    """NaN is as bad as a negative one."""
    with pytest.raises(ValueError, match=r"^`ratio` must be >= 0, got "):
        checks.number("ratio", value)


def test_infinity_is_refused_where_it_makes_no_sense() -> None:
    """As the value of what must be finite."""
    with pytest.raises(ValueError, match=r"^`ratio` must be finite, got inf$"):
        checks.number("ratio", INF, finite=True)


@pytest.mark.parametrize("value", [10**400, Fraction(10**400)], ids=["int", "fraction"])
def test_a_number_that_no_float_can_hold_is_a_value_error(value: Any) -> None:
    """Not the OverflowError of the conversion, which does not name the argument."""
    with pytest.raises(ValueError, match=r"^`ratio` must be "):
        checks.number("ratio", value)
    with pytest.raises(ValueError, match=r"^`pause` must be "):
        checks.seconds("pause", value)


@pytest.mark.parametrize(
    "value, expected",
    [(2, 2.0), (0.25, 0.25), (INF, INF), (dt.timedelta(milliseconds=1500), 1.5), (0, 0.0)],
    ids=brief,
)
def test_seconds_are_numbers_or_timedeltas(value: Any, expected: float) -> None:
    """Both come back as a float."""
    found = checks.seconds("pause", value)
    assert type(found) is float
    assert found == expected


@pytest.mark.parametrize("value", [True, "5", None, 1j, dt.time(1), [1]], ids=brief)
def test_what_are_no_seconds_is_a_type_error(value: object) -> None:
    """The message says what may be given."""
    with pytest.raises(TypeError, match=r"^`pause` must be seconds or a timedelta, got "):
        checks.seconds("pause", value)


@pytest.mark.parametrize("value", [-1, NAN, -INF, dt.timedelta(microseconds=-1)], ids=brief)
def test_negative_time_is_a_value_error(value: object) -> None:
    """So is a negative timedelta."""
    with pytest.raises(ValueError, match=r"^`pause` must be >= 0, got "):
        checks.seconds("pause", value)


def test_words_are_chosen_from_a_list() -> None:
    """The message shows the list."""
    assert checks.one_of("mode", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=r"^`mode` must be one of 'a', 'b', got 'c'$"):
        checks.one_of("mode", "c", ("a", "b"))


@pytest.mark.parametrize("value", [5, None, "print", returns], ids=brief)
def test_a_callback_is_a_plain_function(value: object) -> None:
    """An async one would never be awaited."""
    with pytest.raises(TypeError, match=r"^`on_it` must be a (plain )?function"):
        checks.sync_callback("on_it", value)
    checks.sync_callback("on_it", print)


def test_an_async_callback_is_found_behind_a_partial_and_an_object() -> None:
    """`functools.partial` and an async `__call__` do not hide it."""
    for value in (functools.partial(returns, 1), Caller()):
        with pytest.raises(TypeError, match=r"^`on_it` must be a plain function"):
            checks.sync_callback("on_it", value)


# --- operations ---------------------------------------------------------------------------------


class Caller:
    """Objects whose call is async, and methods of all kinds."""

    async def __call__(self) -> int:
        return 1

    async def method(self) -> int:
        return 1

    @classmethod
    async def of_class(cls) -> int:
        return 1

    @staticmethod
    async def static() -> int:
        return 1

    def sync_method(self) -> int:
        return 1


class Awaited:
    """An awaitable that is no coroutine: calling the class makes one."""

    def __await__(self) -> Generator[Any, Any, int]:
        return returns(1).__await__()


def passed_on(fn: Callable[[], Awaitable[int]]) -> Callable[[], Awaitable[int]]:
    """A decorator whose wrapper is a plain function that hands the coroutine on."""

    @functools.wraps(fn)
    def wrapper() -> Awaitable[int]:
        return fn()

    return wrapper


def hidden(fn: Callable[[], Awaitable[int]]) -> Any:
    """The same, without annotations or `functools.wraps`."""

    def wrapper():  # type: ignore[no-untyped-def]  # noqa: ANN202
        return fn()

    return wrapper


ASYNC: dict[str, Any] = {
    "async def": Caller.static,
    "partial": functools.partial(returns, 1),
    "partial of partial": functools.partial(functools.partial(returns), 1),
    "lambda": lambda: returns(1),
    "object": Caller(),
    "method": Caller().method,
    "classmethod": Caller.of_class,
    "wrapped": passed_on(Caller.static),
    "hidden": hidden(Caller.static),
    "awaitable class": Awaited,
}


@pytest.mark.parametrize("fn", ASYNC.values(), ids=ASYNC)
async def test_whatever_may_return_an_awaitable_is_an_operation(fn: Any) -> None:
    """In every disguise that callers use."""
    checks.operation("fn", fn)
    checks.operations("ops", [fn, fn])
    value = fn()
    checks.check_awaitable(fn, value)
    assert await value == 1


def plain() -> int:
    return 1


def generates() -> Iterator[int]:
    yield 1


async def generates_async() -> AsyncIterator[int]:
    yield 1


SYNC: dict[str, Any] = {
    "def": plain,
    "partial": functools.partial(plain),
    "method": Caller().sync_method,
    "builtin": math.sqrt,
    "generator": generates,
    "async generator": generates_async,
    "class": dict,
    "int": 5,
    "None": None,
    "str": "fn",
    "list": [returns],
}


@pytest.mark.parametrize("fn", SYNC.values(), ids=SYNC)
def test_what_is_known_to_be_sync_is_refused(fn: Any) -> None:
    """With a TypeError that names the argument."""
    with pytest.raises(TypeError, match=r"^`fn` must be an async function, got "):
        checks.operation("fn", fn)
    with pytest.raises(TypeError, match=r"^`ops\[1\]` must be an async function, got "):
        checks.operations("ops", [returns, fn])


def test_a_sync_function_is_shown_the_way_into_a_thread() -> None:
    """The message has both fixes."""
    with pytest.raises(TypeError, match=r"async def.*functools\.partial\(trio\.to_thread"):
        checks.operation("fn", plain)


def test_a_coroutine_object_is_closed_and_the_fix_is_shown() -> None:
    """No "never awaited" warning follows; of a list, all are closed."""
    coros: list[Any] = [returns(1), returns(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=r"functools\.partial\(returns, \.\.\.\)"):
            checks.operation("fn", coros[0])
        with pytest.raises(TypeError, match=r"^`ops\[0\]`.*coroutine object"):
            checks.operations("ops", coros)
    assert [coro.cr_frame for coro in coros] == [None, None]


@pytest.mark.parametrize("fn", [lambda: 3, lambda: None], ids=["number", "None"])
def test_what_returns_no_awaitable_is_a_bare_type_error_at_the_call(fn: Any) -> None:
    """Only the call can tell."""
    checks.operation("fn", fn)
    with pytest.raises(NotAnOperationError, match=r"it returned (3|None), which can't be awaited"):
        checks.check_awaitable(fn, fn())


def test_what_cannot_be_called_is_refused_without_calling_it() -> None:
    """A coroutine object is closed there as well; a sync function passes this lesser check."""
    coro: Any = returns(1)
    with pytest.raises(NotAnOperationError, match="coroutine object"):
        checks.callable_operation("fn", coro)
    assert coro.cr_frame is None
    with pytest.raises(NotAnOperationError, match="got 5"):
        checks.callable_operation("fn", 5)
    checks.callable_operation("fn", plain)


def test_functions_are_called_by_the_name_that_users_know() -> None:
    """Behind a partial, of a class; objects by their class, of which there are not that many."""
    assert checks.label(plain) == "plain"
    assert checks.label(functools.partial(functools.partial(plain))) == "plain"
    assert checks.label(Caller().method) == "Caller.method"
    assert checks.label(trio.sleep) == "sleep"
    assert checks.label(Caller()) == checks.label(functools.partial(Caller())) == "Caller"
    error = CircuitOpenError("db")
    assert checks.label(error) == repr(error)


def test_a_cell_that_is_not_filled_yet_does_no_harm() -> None:
    """A closure over a name that is bound later is an ordinary sync function."""

    def use() -> object:
        return later

    with pytest.raises(TypeError, match="got the sync"):
        checks.operation("fn", use)
    later = 1
    assert use() == later


def test_functions_are_shown_by_their_names() -> None:
    """And not by their addresses, wherever they are in what is shown."""
    assert checks.shown((OSError, (len, 3), "a")) == "(OSError, (len, 3), 'a')"
    assert checks.shown((functools.partial(int, base=2),)) == "(int,)"
    assert checks.shown(None) == "None"
    caller = Caller()
    assert checks.shown(caller) == repr(caller)
    assert repr(Hedge(after=1, on_discard=print)).count("=transient, on_discard=print,") == 1
    retry = repr(Retry(retry_result=bool, on_retry=print))
    assert "on=transient," in retry
    assert "retry_result=bool," in retry
    assert "on_retry=print," in retry
    assert "backoff=Exponential(" in retry
