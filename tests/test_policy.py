"""The shape that policies share: `call`, the decorator, `statistics`, and one's own."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any, Never, TypeVar, TypeVarTuple, final

import attrs
import pytest
import trio

from tests.operations import Steps, returns
from tests.test_checks import ASYNC
from tests.test_retry import Script, always, errors, exactly
from trio_resilience import Fallback, Policy, Retry, Timeout, run_in, run_with_limit, subscribe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

POLICIES: dict[str, Callable[[], Any]] = {
    "retry": Retry,
    "retry with limits": lambda: Retry(attempt_timeout=5, total_timeout=9),
    "timeout": lambda: Timeout(5),
}

every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)

# Decorated at import time, when nothing runs yet.
retry = exactly(max_attempts=3)


@retry
async def fetch(url: str, /, *, size: int = 10, name: str = "", fn: str = "") -> str:
    """Fetch it."""
    await trio.lowlevel.checkpoint()
    return f"{url} {size} {name} {fn}"


@attrs.define(eq=False)
class Client:
    """Methods of all kinds, each of which fails once per object or class."""

    script: Script = attrs.field(factory=lambda: Script(list(errors(1))))

    @retry
    async def get(self, url: str) -> tuple[Client, str, Any]:
        """Get it."""
        return self, url, await self.script()

    @classmethod
    @retry
    async def below_class(cls, script: Script) -> tuple[type[Client], Any]:
        return cls, await script()

    @retry
    @classmethod
    async def above_class(cls, script: Script) -> tuple[type[Client], Any]:
        return cls, await script()

    @staticmethod
    @retry
    async def below_static(script: Script) -> Any:
        return await script()

    @retry
    @staticmethod
    async def above_static(script: Script) -> Any:
        return await script()


class Special(Client):
    """Overrides a decorated method and calls it."""

    @retry
    async def get(self, url: str) -> tuple[Client, str, Any]:
        client, found, result = await super().get(url)
        return client, found.upper(), result


# --- the decorator ------------------------------------------------------------------------------


@every_policy
def test_a_decorated_function_is_still_itself(make: Any) -> None:
    """Its name, module, docstring, signature, attributes, and that it is async."""

    async def load(url: str, *, size: int = 10) -> bytes:
        """Load it."""
        return url.encode()[:size]

    load.owner = "me"  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]
    decorated: Any = make()(load)
    assert inspect.iscoroutinefunction(decorated)
    assert inspect.signature(decorated) == inspect.signature(load)
    assert decorated.__wrapped__ is load
    assert decorated.owner == "me"
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(decorated, name) == getattr(load, name)


async def test_arguments_pass_through_whatever_their_names() -> None:
    """Also those that `call` itself has."""
    assert await fetch("url") == "url 10  "
    assert await fetch("url", size=3, name="n", fn="f") == "url 3 n f"
    with pytest.raises(TypeError, match="unexpected keyword argument 'length'"):
        await fetch("url", length=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("kind", [Client, Special])
async def test_methods(autojump_clock: MockClock, kind: type[Client]) -> None:
    """`self` is the object; a subclass may call the decorated method of its parent."""
    client = kind()
    _, url, result = await client.get("url")
    assert (url.lower(), result, client.script.calls) == ("url", "ok", 2)
    assert (await client.get("url"))[0] is client


@pytest.mark.parametrize("kind", [Client, Special])
@pytest.mark.parametrize("name", ["below_class", "above_class"])
@pytest.mark.parametrize("by_object", [True, False])
async def test_classmethods(
    autojump_clock: MockClock, kind: type[Client], name: str, by_object: bool
) -> None:
    """Above or below `@classmethod`, on a class or its objects: `cls` is the right class."""
    script = Script(list(errors(1)))
    assert await getattr(kind() if by_object else kind, name)(script) == (kind, "ok")
    assert script.calls == 2


@pytest.mark.parametrize("name", ["below_static", "above_static"])
@pytest.mark.parametrize("by_object", [True, False])
async def test_staticmethods(autojump_clock: MockClock, name: str, by_object: bool) -> None:
    """Above or below `@staticmethod`."""
    script = Script(list(errors(1)))
    assert await getattr(Special() if by_object else Client, name)(script) == "ok"
    assert script.calls == 2


async def test_functions_share_the_policy_but_not_its_calls(autojump_clock: MockClock) -> None:
    """One object may decorate any number of functions: statistics add up, attempts do not."""
    policy = exactly(max_attempts=2)
    scripts = [Script(list(errors(1))) for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for script in scripts:
            nursery.start_soon(policy(script.__call__))
    assert [script.calls for script in scripts] == [2, 2, 2]
    assert (policy.statistics().calls, policy.statistics().attempts) == (3, 6)


async def test_decorators_stack(autojump_clock: MockClock) -> None:
    """A retry of a timeout: each attempt has its own limit."""
    began = list[float]()

    @exactly()
    @Timeout(2)
    async def op() -> str:
        began.append(trio.current_time())
        if len(began) < 3:
            await trio.sleep_forever()
        return "ok"

    assert await op() == "ok"
    assert began == [0, 3, 7]


# --- what is an operation -----------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("fn", ASYNC.values(), ids=ASYNC)
async def test_every_disguise_of_an_async_function(make: Any, fn: Any) -> None:
    """It is awaited inside the policy, called or decorated."""
    policy = make()
    assert await policy.call(fn) == 1
    assert await policy(fn)() == 1
    assert policy.statistics().calls == 2


@every_policy
async def test_a_known_sync_function_is_refused_before_it_runs(make: Any) -> None:
    """Called or decorated; by its call it would have blocked, or done half of the work."""
    called, policy = list[int](), make()

    def sync() -> int:
        called.append(1)
        return 3

    with pytest.raises(TypeError, match=r"must be an async function.*sync"):
        policy(sync)
    with pytest.raises(TypeError, match="must be an async function"):
        await policy.call(sync)
    assert called == []


@every_policy
@pytest.mark.parametrize("fn", [5, None, "fn", [returns]], ids=repr)
async def test_what_cannot_be_called_is_refused(make: Any, fn: Any) -> None:
    """With a TypeError that says what it must be; nothing is counted as a failure."""
    policy = make()
    with pytest.raises(TypeError, match="must be an async function, got"):
        await policy.call(fn)
    with pytest.raises(TypeError, match="must be an async function, got"):
        policy(fn)


@every_policy
async def test_a_coroutine_object_is_closed_and_the_fix_shown(make: Any) -> None:
    """No "never awaited" warning follows."""
    coros: list[Any] = [returns(1), returns(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=r"functools\.partial\(returns, "):
            await make().call(coros[0])
        with pytest.raises(TypeError, match=r"functools\.partial\(returns, "):
            make()(coros[1])
    assert [coro.cr_frame for coro in coros] == [None, None]


@pytest.mark.parametrize("options", [{}, {"attempt_timeout": 5}], ids=["plain", "timed"])
async def test_what_returns_no_awaitable_is_never_retried_or_counted(
    autojump_clock: MockClock, options: dict[str, Any]
) -> None:
    """A lambda that returns 3: a bare TypeError when it is called, whatever *on* says."""
    called, told = list[int](), list[object]()
    policy = exactly(on=(Exception, always), on_retry=told.append, **options)
    fn: Any = lambda: called.append(1)  # noqa: E731
    with subscribe(told.append), pytest.raises(TypeError, match="can't be awaited") as caught:
        await policy.call(fn)
    assert (called, trio.current_time()) == ([1], 0)
    assert not hasattr(caught.value, "__notes__")
    assert policy.statistics().given_up == 0
    assert "RetryScheduled" not in {type(event).__name__ for event in told}
    assert "RetryGaveUp" not in {type(event).__name__ for event in told}


async def test_a_type_error_of_the_operation_is_its_own(autojump_clock: MockClock) -> None:
    """Wrong arguments, or a mistake inside, are no reason to say that it is not async."""

    async def op(number: int) -> None:
        raise TypeError(f"inside {number}")

    for args, message in (((1,), "inside 1"), ((), "missing 1 required positional argument")):
        called: Any = exactly(max_attempts=2, on=TypeError).call
        with pytest.raises(TypeError, match=message) as caught:
            await called(op, *args)
        assert caught.value.__notes__[0].startswith("retry: gave up after 2 attempts")


# --- a policy of one's own ----------------------------------------------------------------------


@final
class Twice(Policy[Never]):
    """Run everything two times, and return the second result."""

    def __init__(self) -> None:
        self.calls = 0
        self.last_name: str | None = None

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        self.calls += 1
        self.last_name = name
        await fn(*args)
        return await fn(*args)

    def statistics(self) -> int:
        return self.calls


async def test_users_write_their_own(autojump_clock: MockClock) -> None:
    """With `call` and `statistics` it is a decorator, and goes wherever a policy goes."""
    script, twice = Script(), Twice()
    assert await twice(script.__call__)() == "ok"
    assert await run_in(None, script, policy=twice, name="mine") == "ok"
    assert twice.last_name == "mine"
    assert await run_with_limit(None, [script], policy=twice) == ["ok"]
    assert (script.calls, twice.statistics()) == (6, 3)
    assert await exactly().call(functools.partial(twice.call, Script(list(errors(2))))) == "ok"


def test_half_a_policy_cannot_be_made() -> None:
    """Both methods are needed."""

    class Half(Policy[Never]):
        def statistics(self) -> None:
            return None

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]


@every_policy
async def test_a_policy_adds_no_trip_through_the_scheduler(make: Any) -> None:
    """An operation of one checkpoint takes one step of its task, as it does by itself."""
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    await make().call(trio.lowlevel.checkpoint)
    assert steps.count == 1
    await make().call(returns, 1)
    trio.lowlevel.remove_instrument(steps)
    assert steps.count == 1


@every_policy
def test_policies_are_compared_by_identity(make: Any) -> None:
    """Two with the same options are two: each has counts of its own."""
    policy = make()
    assert policy != make()
    assert policy == policy  # noqa: PLR0124
    assert len({policy, make(), policy}) == 2
    assert isinstance(policy, Policy)


@every_policy
async def test_statistics_are_a_frozen_record(make: Any) -> None:
    """A picture of the moment: it does not change with the next call."""
    policy = make()
    before = policy.statistics()
    await policy.call(returns, 1)
    assert before.calls == 0
    assert policy.statistics().calls == 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        before.calls = 5


@pytest.mark.parametrize("policy", [Timeout(5), Fallback(value=None)], ids=["timeout", "fallback"])
async def test_a_policy_without_state_is_idle_even_during_a_call(policy: Any) -> None:
    """A new one in its place would behave the same, so that `Keyed` may forget it at any time."""

    async def look() -> bool:
        await trio.lowlevel.checkpoint()
        return bool(policy.is_idle)

    assert policy.is_idle
    assert await policy.call(look) is True
