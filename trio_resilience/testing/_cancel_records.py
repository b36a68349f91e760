"""What a cancel-everywhere test is given and what it reports: frozen records, without behaviour."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, final, get_args

import attrs

if TYPE_CHECKING:
    import trio

Target: TypeAlias = Literal["caller", "nursery"]
Instant: TypeAlias = Literal["never", "parked", "woken"]
_AsyncFunction: TypeAlias = Callable[[], Awaitable[object]]


def _one_of(*allowed: object) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise ValueError(f"`{attribute.name}` must be {choices}, got {value!r}")

    return check


def check_int(name: str, value: object, *, at_least: float = -math.inf) -> None:
    """Raise unless *value* is an int, and no bool, of at least *at_least*."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}")
    if value < at_least:
        raise ValueError(f"`{name}` must be >= {at_least}, got {value!r}")


def _a_count(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_int(attribute.name, value, at_least=0)


def _an_int(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_int(attribute.name, value)


def _function(name: str, value: object) -> None:
    if inspect.iscoroutine(value):
        value.close()  # or a "never awaited" warning would follow
        raise TypeError(
            f"`{name}` must be an async function, got a coroutine object: "
            f"write `{name}=fn`, not `{name}=fn()`"
        )
    if not callable(value):
        raise TypeError(f"`{name}` must be an async function, got {value!r}")


def _as_tuple(functions: Iterable[_AsyncFunction]) -> Sequence[_AsyncFunction]:
    return tuple(functions)


def _async_function(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    _function(attribute.name, value)


def _async_functions(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    for each in value:
        _function(attribute.name, each)


def _sync_function(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if inspect.iscoroutinefunction(value) or not callable(value):
        raise TypeError(f"`{attribute.name}` must be a sync function, got {value!r}")


def _exception_types(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not (isinstance(value, tuple) and all(map(_is_exception_type, cast("Any", value)))):
        raise TypeError(f"`{attribute.name}` must be a tuple of Exception types, got {value!r}")


def _is_exception_type(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


@final
@attrs.frozen(eq=False)
class Scenario:
    """One small play around the call under test; made anew, with fresh state, for every run.

    Make all that it uses (limiters, channels, counters) inside the function that returns it.
    """

    victim: Callable[[trio.Nursery], Awaitable[object]] = attrs.field(validator=_async_function)
    """Makes the call under test. It gets a nursery that lies *outside* its own cancel scope, to
    pass to calls that take one; that nursery stays open until the victim is done."""

    others: Sequence[_AsyncFunction] = attrs.field(
        default=(), kw_only=True, converter=_as_tuple, validator=_async_functions
    )
    """Run beside the victim. They must finish, without an error, whatever becomes of it."""

    fresh_user: _AsyncFunction | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_async_function)
    )
    """Comes when everybody is gone and must get in, for example ``async with limiter: pass``."""

    invariant: Callable[[], object] | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_sync_function)
    )
    """Called last. It raises, or returns `False`, if what must always hold does not."""

    expected: tuple[type[Exception], ...] = attrs.field(
        default=(), kw_only=True, validator=_exception_types
    )
    """The types of error that the victim may always end with (all leaves of a group, or itself)."""

    on_nursery_cancelled: tuple[type[Exception], ...] = attrs.field(
        default=(), kw_only=True, validator=_exception_types
    )
    """Those that it may end with, in addition, when only its nursery was cancelled."""


@final
@attrs.frozen
class CancelPoint:
    """The numbers of one run: whom it cancelled, and when. They are all that a replay needs."""

    target: Target = attrs.field(validator=_one_of(*get_args(Target)))
    """`"caller"`: a scope around the victim's call. `"nursery"`: the nursery it was given."""

    instant: Instant = attrs.field(validator=_one_of(*get_args(Instant)))
    """`"parked"`: just gone to sleep. `"woken"`: made runnable, not run yet. `"never"`: not at all,
    the run that shows that the scenario works when it is left alone."""

    suspension: int = attrs.field(validator=_a_count)
    """Counted from 0 over the victim's task and all tasks that work for it, in the order in which
    they stopped running. A task that was started, and has not run yet, counts as suspended."""

    seed: int = attrs.field(validator=_an_int)
    """Decides the order in which trio runs what is runnable."""


@final
@attrs.frozen
class Finding:
    """One thing that went wrong in one run; ``str()`` says what, where, and how to see it again."""

    point: CancelPoint
    problem: str
    where: str
    """Where the suspended task stood when the cancellation came."""
    replayable: bool
    """`False` if this trio does not let its scheduler be seeded: a replay may differ."""

    def __str__(self) -> str:
        again = f"replay: cancel_everywhere(make_scenario, only={self.point!r})"
        if not self.replayable:
            again += "\n  (may differ: this version of trio does not let its scheduler be seeded)"
        return f"{self.problem}\n  {self.where}\n  {again}"


@final
@attrs.frozen
class CancelReport:
    """What was tried. A test may assert that it was not nothing."""

    runs: int
    cancellations: int
    """The runs in which the cancellation was sent; the others completed before their instant."""
    suspensions: int
    """The most suspensions, starts of tasks included, that any run counted."""
    replayable: bool
    """`False` if this trio does not let its scheduler be seeded, so that every run may differ."""


@final
@attrs.define(eq=False)
class CancelEverywhereError(AssertionError):
    """A scenario broke a promise; `findings` says how, `report` how much was tried until then."""

    findings: tuple[Finding, ...]
    report: CancelReport

    def __str__(self) -> str:
        count = f"{len(self.findings)} problem{'s' * (len(self.findings) != 1)}"
        head = f"{count} in {self.report.runs} runs"
        return "\n\n".join([head, *map(str, self.findings)])
