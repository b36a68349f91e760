"""The shape that all policies share, and what a test may change about them for a while."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Generic, Never, ParamSpec, TypeVar, TypeVarTuple, cast, final
from weakref import WeakKeyDictionary

import attrs

from trio_resilience._checks import label, operation
from trio_resilience._engine._run import RunState

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
F = TypeVar("F", covariant=True)
S = TypeVar("S")


class Policy(ABC, Generic[F]):
    """Something that runs an operation under a rule, and may return an *F* of its own instead.

    A policy is configured once and shared: what belongs to one call lives in that call, so one
    object serves any number of tasks, at once and one after the other. It may be created before
    `trio.run` and used in several runs.
    """

    __slots__ = ()

    @abstractmethod
    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T | F:
        """Run ``fn(*args)`` under the policy and return its result; *name* labels its events."""

    @abstractmethod
    def statistics(self) -> object:
        """Return a frozen record of the policy's state and counts; works outside a run too."""

    @property
    def is_idle(self) -> bool:
        """Whether a new policy in the place of this one would behave the same from now on.

        `Keyed` forgets such a policy first. A policy without state of its own always is.
        """
        return True

    @property
    def is_disposable(self) -> bool:
        """Whether a new policy may take the place of this one at need, at the cost of its history.

        Not if that would break a promise: while a circuit is open, permits are held or tasks wait
        in line. `Keyed` keeps such a policy, also when it runs out of room.
        """
        return True

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T | F]]:
        """Decorate an async function: every call of it runs under this policy.

        Its name, docstring and signature are kept. It works on methods too, and below or above
        ``@staticmethod`` and ``@classmethod``.
        """
        method: Any = fn
        if isinstance(fn, (staticmethod, classmethod)):
            rewrapped: Any = type(method)(self(method.__func__))
            return cast("Callable[P, Coroutine[Any, Any, T | F]]", rewrapped)
        operation("fn", fn)
        call, name = cast("Callable[..., Coroutine[Any, Any, T | F]]", self.call), label(fn)

        @functools.wraps(fn)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | F:
            return await call(functools.partial(fn, **kwargs) if kwargs else fn, *args, name=name)

        return wrapper


class LivePolicy(Policy[F]):
    """A policy that holds permits, lines or tokens: there is one of it, and no copy."""

    __slots__ = ()

    def __reduce__(self) -> Never:
        """Refuse to be copied or pickled: a copy would hold nothing of what this one does."""
        kind = type(self).__name__
        raise TypeError(f"a {kind} can't be copied or pickled: it has live state; make a new one")


@final
@attrs.frozen(eq=False, repr=False)
class Overrides:
    """What `trio_resilience.testing.test_mode` changes for the policies used inside its block."""

    max_attempts: float
    jitter: bool
    delays: bool
    states: WeakKeyDictionary[Any, Any] | None
    """State that policies keep during the block instead of their own."""

    def state_of(self, policy: object, own: S, make: Callable[[], S]) -> S:
        """Return the state that *policy* has here: its *own*, or one that starts afresh."""
        if self.states is None:
            return own
        if policy not in self.states:
            self.states[policy] = make()
        fresh: S = self.states[policy]
        return fresh


# While no `test_mode` block is open anywhere in the process, policies look no further than this.
open_overrides: set[Overrides] = set()

current_overrides: ContextVar[tuple[Overrides, ...]] = ContextVar("overrides", default=())
"""The blocks around this context, the innermost last; some of them may have ended."""


def overrides() -> Overrides | None:
    """Return what the innermost `test_mode` block around this call changes, if there is one."""
    around = reversed(current_overrides.get())
    return next((mode for mode in around if mode in open_overrides), None)


def runs_here(own: RunState[S]) -> RunState[S]:
    """Return the states that count here: a policy's *own*, or fresh ones."""
    mode = overrides() if open_overrides else None
    return own if mode is None else mode.state_of(own, own, own.anew)
