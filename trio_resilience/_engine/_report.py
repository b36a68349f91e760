"""Say what happened, to whoever listens; build nothing and call nobody when no one does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._checks import sync_callback
from trio_resilience._events import (
    AttemptFinished,
    AttemptStarted,
    CallFinished,
    CallStarted,
    Event,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable


# --- who listens --------------------------------------------------------------------------------


@final
@attrs.define(eq=False, repr=False)
class Subscription:
    """A listener and the block that it listens for."""

    listener: Callable[[Event], object]
    outer: Subscription | None = None
    """The block around that block; it may have ended."""
    ledgers: Ledgers = attrs.field(factory=lambda: REPORTERS)
    """Where to tell what every call in the block brings with it."""
    is_open: bool = True
    has_raised: bool = False

    def tell(self, event: Event) -> None:
        """Pass the event on; a listener that raises is reported once and changes nothing."""
        try:
            self.listener(event)
        except Exception:
            if not self.has_raised:
                import logging  # noqa: PLC0415 - seldom needed, and dear to import for everybody

                self.has_raised = True
                logging.getLogger("trio_resilience").exception(
                    "listener %r raised; its further errors are not reported", self.listener
                )

    def close(self) -> None:
        self.is_open, self.ledgers = False, REPORTERS


class Ledger(Protocol):
    """Is told what most calls bring with them, of one operation under one policy.

    What else may happen is rare in comparison, and told by events only.
    """

    def call_started(self) -> None:
        """Be told of a `CallStarted`."""

    def call_succeeded(self, duration: float) -> None:
        """Be told of a `CallFinished` without an error."""

    def only_attempt_started(self) -> None:
        """Be told of a `CallStarted`, and of the `AttemptStarted` that comes at once."""

    def only_attempt_succeeded(self, duration: float) -> None:
        """Be told of the `AttemptFinished` and the `CallFinished` of a call that needs no other."""


class Ledgers(Protocol):
    """A ledger for each policy's and operation's name."""

    def __getitem__(self, where: tuple[str, str], /) -> Ledger:
        """Return the ledger, one that is new if need be."""
        ...


class Counter(ABC):
    """A listener that only counts: where it is the only one, no event is built of what it counts.

    What that saves is several times what most calls take.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def ledgers(self) -> Ledgers:
        """Where it counts what every call brings with it."""

    @abstractmethod
    def __call__(self, event: Event) -> None:
        """Count an event."""


# Every block that is open anywhere in the process. While it is empty, nobody can be listening, and
# the test for that is one look at a set: a context variable costs ten times as much.
open_subscriptions: set[Subscription] = set()


@contextmanager
def subscribe(listener: Callable[[Event], object]) -> Generator[None]:
    """Call *listener* with every event that this block causes, also in tasks it starts.

    The listener is called in the task where the event happens, at once, in order; it must be a
    plain function and return quickly. It hears nothing once the block has ended. If it raises,
    that is reported once through `logging` and changes nothing else. To listen to a whole
    program, wrap `trio.run`::

        with subscribe(print):
            trio.run(main)
    """
    sync_callback("listener", listener)
    outer = _innermost_open()
    subscription = Subscription(listener, outer)
    if outer is NOBODY and isinstance(listener, Counter):
        subscription.ledgers = listener.ledgers
    innermost.set(subscription)
    open_subscriptions.add(subscription)
    try:
        yield
    finally:
        open_subscriptions.discard(subscription)
        subscription.close()
        # No token is reset: a fixture's teardown runs in another context than its setup.
        innermost.set(_innermost_open())


def _innermost_open() -> Subscription:
    subscription = innermost.get()
    while not subscription.is_open and subscription.outer is not None:
        subscription = subscription.outer
    return subscription


def current_subscriptions() -> list[Subscription]:
    """Return who listens to what happens in this context, the outermost first; mostly nobody."""
    if not open_subscriptions:
        return []
    found: list[Subscription] = []
    subscription: Subscription | None = innermost.get()
    while subscription is not None:
        if subscription.is_open:
            found.append(subscription)
        subscription = subscription.outer
    return found[::-1]


# --- what they are told -------------------------------------------------------------------------


def report(
    kind: type[Event],
    *,
    policy: str,
    operation: str,
    also_to: Iterable[Subscription] = (),
    **fields: Any,
) -> None:
    """Build an event of this *kind* and pass it to whoever listens; to nobody, build nothing."""
    listening = [*also_to, *current_subscriptions()]
    if not listening:
        return
    event = kind(
        time=trio.current_time(),
        task=trio.lowlevel.current_task().name,
        policy=policy,
        operation=operation,
        **fields,
    )
    for subscription in listening:
        subscription.tell(event)


@final
@attrs.frozen(eq=False, repr=False)
class Reporter:
    """A ledger that tells all of it to whoever listens, as events."""

    policy: str
    operation: str

    @enable_ki_protection
    def call_started(self) -> None:
        self._report(CallStarted)

    @enable_ki_protection
    def call_succeeded(self, duration: float) -> None:
        self._report(CallFinished, duration=duration, error=None, cancelled=False)

    @enable_ki_protection
    def only_attempt_started(self) -> None:
        self._report(CallStarted)
        self._report(AttemptStarted, attempt=1)

    @enable_ki_protection
    def only_attempt_succeeded(self, duration: float) -> None:
        ending: dict[str, Any] = {"duration": duration, "error": None, "cancelled": False}
        self._report(AttemptFinished, attempt=1, **ending)
        self.call_succeeded(duration)

    def _report(self, kind: type[Event], **fields: Any) -> None:
        report(kind, policy=self.policy, operation=self.operation, **fields)


@final
class _Reporters:
    """A reporter for each policy's and operation's name."""

    def __getitem__(self, where: tuple[str, str], /) -> Reporter:
        return Reporter(*where)


REPORTERS: Ledgers = _Reporters()

NOBODY = Subscription(lambda _: None, is_open=False)
"""The end of every chain of blocks."""

innermost: ContextVar[Subscription] = ContextVar("innermost", default=NOBODY)
"""The block that a context is in; blocks around it follow from it. Some of them may have ended."""


@enable_ki_protection
def call_started(where: tuple[str, str]) -> None:
    """Tell whoever listens that a policy, of this name, is to call an operation of this name."""
    innermost.get().ledgers[where].call_started()


@enable_ki_protection
def call_succeeded(where: tuple[str, str], duration: float) -> None:
    """Tell whoever listens now that such a call has succeeded."""
    innermost.get().ledgers[where].call_succeeded(duration)


@enable_ki_protection
def call_failed(where: tuple[str, str], duration: float, error: BaseException) -> None:
    """Tell whoever listens now that it has failed, or was cancelled."""
    if not trio.lowlevel.in_trio_task():
        return  # it is closed after its run has ended, at no time
    policy, operation = where
    failure = error if isinstance(error, Exception) else None
    report(
        CallFinished,
        policy=policy,
        operation=operation,
        duration=duration,
        error=failure,
        cancelled=failure is None,
    )
