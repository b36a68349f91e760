"""Keep one policy for each key, such as a host or a tenant, and only so many of them."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Never, TypeVar, TypeVarTuple, cast, final

import attrs
import trio
from trio.lowlevel import disable_ki_protection, enable_ki_protection

from trio_resilience._checks import integer, label, operation, seconds, sync_callback
from trio_resilience._engine._policy import LivePolicy, Policy, open_overrides, overrides
from trio_resilience._engine._report import open_subscriptions, report
from trio_resilience._engine._shelves import IDLE, STAYS, Shelves
from trio_resilience._engine._watched import Watched, plain, watched
from trio_resilience._errors import BulkheadFullError
from trio_resilience._events import Rejected
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
K = TypeVar("K", bound=Hashable)
PolicyT = TypeVar("PolicyT", bound=Policy[Never])


@final
@record
class KeyedStatistics(Record):
    """How many policies a `Keyed` keeps."""

    keys: int
    """All that are kept, those in use included."""
    in_use: int
    """Those with a call or a ``hold`` under way."""
    evicted: int
    """How many were forgotten so far, for want of room or of use."""


def _factory(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, Policy):
        raise TypeError(
            f"`factory` must be a function that returns a policy for a key, got {value!r}:"
            " pass `lambda key: ...`"
        )
    sync_callback("factory", value)


def _key(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    sync_callback("key", value)


def _max_keys(value: int) -> int:
    return integer("max_keys", value, minimum=1)


def _idle_after(value: float | timedelta) -> float:
    return seconds("idle_after", value)


def _table(keyed: Keyed[K, PolicyT]) -> Shelves[K, PolicyT]:
    return Shelves(keyed.factory, keyed.max_keys, keyed.idle_after)


@final
@attrs.frozen(eq=False, repr=False)
class Keyed(LivePolicy[Never], Generic[K, PolicyT]):
    """Run each call under the policy of its key: a limit per host, a circuit per tenant.

    Waiting on one key never delays another. The policies are made when they are first needed, and
    are bounded in number: for a new key beyond *max_keys*, the least recently used policy goes
    whose loss changes nothing (`Policy.is_idle`); if there is none, the least recently used that
    loses no more than its history (`Policy.is_disposable`). One never goes while a call or a
    `hold` of its key is under way, or while it must stay, as an open circuit must. Keys that are
    in use come on top of *max_keys* if need be, until their calls end.

    Args:
        factory: returns the policy for a key, a new one each time.
        key: returns the key of a call, which must be hashable; it is given the arguments that the
            operation gets, those that a `functools.partial` binds included.
        max_keys: how many policies are kept; choose more than there are calls at a time.
        idle_after: seconds after its last use when an idle policy is forgotten, a number or a
            `datetime.timedelta`. It goes at a later call, or up to twice as late if it was not
            idle yet when it was looked at.
        name: label of the policy in events and errors.

    Raises:
        BulkheadFullError: *max_keys* policies that are not in use all have to stay, and the key is
            a new one; nothing was run. With many keys, that all have to stay is believed for a
            tenth of a second before they are all looked at again.

    Example::

        hosts = Keyed(lambda host: Semaphore(2), key=lambda url: urlsplit(url).hostname)

        page = await hosts.call(fetch, url)


        @hosts
        async def load(url: str) -> bytes: ...


        async with hosts.hold("example.org") as limiter, limiter:
            ...
    """

    factory: Callable[[K], PolicyT] = attrs.field(validator=_factory)
    key: Callable[..., K] = attrs.field(kw_only=True, validator=_key)
    max_keys: int = attrs.field(default=1024, kw_only=True, converter=_max_keys)
    idle_after: float = attrs.field(default=math.inf, kw_only=True, converter=_idle_after)
    name: str = attrs.field(default="keyed", kw_only=True)
    _table: Shelves[K, PolicyT] = attrs.field(
        default=attrs.Factory(_table, takes_self=True), init=False
    )

    @property
    def is_idle(self) -> bool:
        """Whether no key is in use, and every policy that is kept is idle."""
        return self._here().rank() == IDLE

    @property
    def is_disposable(self) -> bool:
        """Whether no key is in use, and none of the policies has to stay."""
        return self._here().rank() < STAYS

    @enable_ki_protection
    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)``, run under the policy of its key."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        operation("fn", fn)
        table, key = self._here(), _key_of(self.key, fn, args)
        kept = table.pin(key)
        if kept is None:
            raise await self._refusal(label(fn) if name is None else name)
        run = table.run
        try:
            return await _run_under(kept.policy, fn, args, plain(name))
        finally:
            table.unpin(kept, run)

    def hold(self, key: K) -> AbstractAsyncContextManager[PolicyT, None]:
        """Use the policy of *key* in a block of code, during which it is not forgotten.

        It is not entered: ``async with keyed.hold(host) as limiter, limiter:`` does that, too.
        """
        return _Hold(key, self._here, self._refusal)

    def statistics(self) -> KeyedStatistics:
        """Return how many policies are kept, and how many of them are in use."""
        table = self._here()
        return KeyedStatistics(table.keys, table.in_use, table.evicted)

    def _here(self) -> Shelves[K, PolicyT]:
        mode = overrides() if open_overrides else None
        return self._table if mode is None else mode.state_of(self, self._table, self._table.anew)

    async def _refusal(self, operation: str) -> BulkheadFullError:
        await trio.lowlevel.checkpoint()
        report(Rejected, policy=self.name, operation=operation, retry_after=None)
        error = BulkheadFullError(self.name, self.max_keys, self.max_keys + 1)
        error.add_note("it counts keys: the policies of all that it keeps have to stay")
        return error

    def __repr__(self) -> str:
        now = self.statistics()
        return f"Keyed(name={self.name!r}: {now.keys} of {self.max_keys} keys, {now.in_use} in use)"


@disable_ki_protection
def _key_of(key: Callable[..., K], fn: Callable[..., object], args: tuple[object, ...]) -> K:
    return _bound(key, fn)(*args)


def _bound(key: Callable[..., K], fn: Callable[..., object]) -> Callable[..., K]:
    """Bind to *key* what *fn*, if it is a partial, and those within it bind to the function."""
    if isinstance(fn, partial):
        bound = cast("partial[object]", fn)
        return partial(_bound(key, bound.func), *bound.args, **bound.keywords)
    return key


@disable_ki_protection
async def _run_under(
    policy: Policy[Never], fn: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts], name: str | None
) -> T:
    return await policy.call(fn, *args, name=name)


@final
@attrs.define(eq=False, repr=False)
class _Hold(Generic[K, PolicyT]):
    """A policy in use for the time of one ``async with`` block; see `Keyed.hold`."""

    _key: K
    _find_table: Callable[[], Shelves[K, PolicyT]]
    _refusal: Callable[[str], Awaitable[BulkheadFullError]]
    _unpin: Callable[[], None] | None = attrs.field(default=None, init=False)
    _is_used: bool = attrs.field(default=False, init=False)

    @enable_ki_protection
    async def __aenter__(self) -> PolicyT:
        if self._is_used:
            raise RuntimeError("a hold serves one block: call `hold()` anew for the next")
        self._is_used = True
        await trio.lowlevel.checkpoint_if_cancelled()
        table = self._find_table()
        kept = table.pin(self._key)
        if kept is None:
            raise await self._refusal("acquire")
        self._unpin = partial(table.unpin, kept, table.run)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return kept.policy

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unpin, self._unpin = self._unpin, None
        assert unpin is not None
        unpin()
