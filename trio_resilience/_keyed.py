"""Keep one policy for each key, such as a host or a tenant, and only so many of them."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, Never, TypeVar, TypeVarTuple, cast, final

import attrs
import trio
from trio.lowlevel import disable_ki_protection, enable_ki_protection

from trio_resilience._checks import integer, label, operation, seconds, sync_callback
from trio_resilience._engine._policy import LivePolicy, Policy, open_overrides, overrides
from trio_resilience._engine._report import report
from trio_resilience._engine._run import RunState
from trio_resilience._errors import BulkheadFullError
from trio_resilience._events import Rejected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
K = TypeVar("K", bound=Hashable)
PolicyT = TypeVar("PolicyT", bound=Policy[Never])

# What becomes of a policy that is not in use when room is needed: idle ones go first, then those
# that are merely warm, and the others stay.
_IDLE: Final = 0
_WARM: Final = 1
_STAYS: Final = 2

_FEW: Final = 8
"""How many policies are looked at again for each call, in case they have become idle."""
_BELIEVED: Final = 0.1
"""Seconds for which it is believed of more than a few policies that all of them have to stay."""


@final
@attrs.frozen
class KeyedStatistics:
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


def _table(keyed: Keyed[K, PolicyT]) -> _Table[K, PolicyT]:
    return _Table(keyed.factory, keyed.max_keys, keyed.idle_after)


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
    _table: _Table[K, PolicyT] = attrs.field(
        default=attrs.Factory(_table, takes_self=True), init=False
    )

    @property
    def is_idle(self) -> bool:
        """Whether no key is in use, and every policy that is kept is idle."""
        return self._here().rank() == _IDLE

    @property
    def is_disposable(self) -> bool:
        """Whether no key is in use, and none of the policies has to stay."""
        return self._here().rank() < _STAYS

    @enable_ki_protection
    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)``, run under the policy of its key."""
        operation("fn", fn)
        table, key = self._here(), _key_of(self.key, fn, args)
        kept = table.pin(key)
        if kept is None:
            raise await self._refusal(label(fn) if name is None else name)
        run = table.run
        try:
            return await _run_under(kept.policy, fn, args, name)
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

    def _here(self) -> _Table[K, PolicyT]:
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


@final
@attrs.define(eq=False, repr=False)
class _Kept(Generic[K, PolicyT]):
    """A policy, and who uses it."""

    key: K
    policy: PolicyT
    pins: int = 0
    """Calls and holds under way, in this run."""
    rank: int = _IDLE
    """Which shelf it is on, unless it is in use."""
    since: float = -math.inf
    """When it came there; unset if nothing is forgotten for want of use."""


@final
@attrs.define(eq=False, repr=False)
class _Table(Generic[K, PolicyT]):
    """The policies of all keys.

    Those that are not in use stand on one of three shelves, by what they were when they were last
    looked at, and on each in the order in which they came there. What comes out of use goes on the
    idle shelf unseen. So to make room, each is looked at once for each time that it was used, and
    a few are looked at again, however many there are.
    """

    factory: Callable[[K], PolicyT]
    max_keys: int
    idle_after: float
    runs: RunState[object] = attrs.field(factory=lambda: RunState(object), init=False)
    """Tells one run from another."""
    evicted: int = attrs.field(default=0, init=False)
    _kept: dict[K, _Kept[K, PolicyT]] = attrs.field(
        factory=dict[K, "_Kept[K, PolicyT]"], init=False
    )
    _shelves: tuple[OrderedDict[K, _Kept[K, PolicyT]], ...] = attrs.field(
        factory=lambda: (OrderedDict(), OrderedDict(), OrderedDict()), init=False
    )
    run: object = attrs.field(default=None, init=False)
    """The one that pins, times and the order of the shelves belong to."""
    _look_again_at: float = attrs.field(default=-math.inf, init=False)

    def anew(self) -> _Table[K, PolicyT]:
        """Return one with the same options and without policies."""
        return _Table(self.factory, self.max_keys, self.idle_after)

    @property
    def keys(self) -> int:
        """How many policies there are."""
        return len(self._kept)

    @property
    def in_use(self) -> int:
        """How many of them are pinned; what a dead run has pinned is not."""
        return 0 if self.runs.peek() is None else len(self._kept) - self._resting

    @property
    def _resting(self) -> int:
        return sum(map(len, self._shelves))

    def rank(self) -> int:
        """Return what all of them are together, as one policy."""
        if self.in_use:
            return _STAYS
        return max((_rank(kept.policy) for kept in self._kept.values()), default=_IDLE)

    def pin(self, key: K) -> _Kept[K, PolicyT] | None:
        """Return what is kept for *key*, and is in use from now on; ``None`` if it is refused."""
        run = self.runs.get()
        if run is not self.run:
            self._begin(run)
        if self.idle_after < math.inf:
            self._forget()
        kept = self._find(key)
        if kept is None:
            kept = self._add(key)
        elif not kept.pins:
            del self._shelves[kept.rank][kept.key]
        if kept is not None:
            kept.pins += 1
        return kept

    def unpin(self, kept: _Kept[K, PolicyT], run: object) -> None:
        """Take back a pin of *run*; that of a run that has died has died with it."""
        if self.runs.here() is not run:
            return
        kept.pins -= 1
        if not kept.pins:
            self._shelve(kept, _IDLE)
            self._shed()

    def _find(self, key: K) -> _Kept[K, PolicyT] | None:
        try:
            return self._kept.get(key)
        except TypeError as error:
            raise TypeError(f"a key must be hashable, got {key!r}") from error

    def _add(self, key: K) -> _Kept[K, PolicyT] | None:
        is_full = len(self._kept) >= self.max_keys
        victim = self._dispensable() if is_full else None
        if victim is None and self._resting >= self.max_keys:
            return None
        # If the factory raises, nothing is lost for it.
        policy = _make(self.factory, key)
        if victim is not None:
            self._drop(victim)
        kept = self._kept[key] = _Kept(key, policy)
        return kept

    def _begin(self, run: object) -> None:
        idle, warm, staying = ([*shelf.values()] for shelf in self._shelves)
        abandoned = [kept for kept in self._kept.values() if kept.pins]
        for shelf in self._shelves:
            shelf.clear()
        self.run, self._look_again_at = run, -math.inf
        for kept in (*staying, *warm, *idle, *abandoned):
            kept.pins = 0
            self._shelve(kept, _IDLE)

    def _shed(self) -> None:
        """Drop what came on top of `max_keys`, as far as it may go."""
        while len(self._kept) > self.max_keys:
            victim = self._dispensable()
            if victim is None:
                return
            self._drop(victim)

    def _forget(self) -> None:
        """Drop what is idle and was not used for long."""
        idle_since, looks = trio.current_time() - self.idle_after, _FEW
        for shelf in self._shelves:
            while shelf and looks and (kept := _oldest(shelf)).since <= idle_since:
                rank = _rank(kept.policy)
                if rank == _IDLE:
                    self._drop(kept)
                else:
                    looks -= 1
                    self._move(kept, rank)

    def _dispensable(self) -> _Kept[K, PolicyT] | None:
        """Return that which is missed least, if there is any that may go."""
        return self._idle_again() or self._idle() or self._warm() or self._free_again()

    def _idle_again(self) -> _Kept[K, PolicyT] | None:
        _, warm, staying = self._shelves
        for kept in islice(warm.values(), _FEW):
            if _rank(kept.policy) == _IDLE:
                return kept
        for kept in [*islice(staying.values(), _FEW)]:
            rank = _rank(kept.policy)
            if rank == _IDLE:
                return kept
            self._move(kept, rank)  # behind the others, which are looked at next time
        return None

    def _idle(self) -> _Kept[K, PolicyT] | None:
        shelf = self._shelves[_IDLE]
        while shelf:
            kept = _oldest(shelf)
            rank = _rank(kept.policy)
            if rank == _IDLE:
                return kept
            self._move(kept, rank)
        return None

    def _warm(self) -> _Kept[K, PolicyT] | None:
        shelf = self._shelves[_WARM]
        while shelf:
            kept = _oldest(shelf)
            if _rank(kept.policy) < _STAYS:
                return kept
            self._move(kept, _STAYS)
        return None

    def _free_again(self) -> _Kept[K, PolicyT] | None:
        """Look at all that had to stay, but not for every call: they may be many."""
        if trio.current_time() < self._look_again_at:
            return None
        for kept in self._shelves[_STAYS].values():
            if _rank(kept.policy) < _STAYS:
                return kept
        self._look_again_at = trio.current_time() + _BELIEVED
        return None

    def _drop(self, kept: _Kept[K, PolicyT]) -> None:
        del self._shelves[kept.rank][kept.key], self._kept[kept.key]
        self.evicted += 1

    def _move(self, kept: _Kept[K, PolicyT], rank: int) -> None:
        del self._shelves[kept.rank][kept.key]
        self._shelve(kept, rank)

    def _shelve(self, kept: _Kept[K, PolicyT], rank: int) -> None:
        if self.idle_after < math.inf:
            kept.since = trio.current_time()
        kept.rank = rank
        self._shelves[rank][kept.key] = kept


def _rank(policy: Policy[Never]) -> int:
    if not policy.is_disposable:
        return _STAYS
    return _IDLE if policy.is_idle else _WARM


def _oldest(shelf: OrderedDict[K, _Kept[K, PolicyT]]) -> _Kept[K, PolicyT]:
    return next(iter(shelf.values()))


@disable_ki_protection
async def _run_under(
    policy: Policy[Never], fn: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts], name: str | None
) -> T:
    return await policy.call(fn, *args, name=name)


@disable_ki_protection
def _make(factory: Callable[[K], PolicyT], key: K) -> PolicyT:
    _refuse_coroutine("key", key)
    policy = factory(key)
    _refuse_coroutine("factory", policy)
    _check_policy(policy)
    return policy


def _check_policy(value: object) -> None:
    if not isinstance(value, Policy):
        raise TypeError(f"`factory` must return a policy such as Semaphore(3), got {value!r}")


def _refuse_coroutine(name: str, value: object) -> None:
    """Refuse what an async function in disguise has returned."""
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError(f"`{name}` must be a plain function, but it returned {value!r}")


@final
@attrs.define(eq=False, repr=False)
class _Hold(Generic[K, PolicyT]):
    """A policy in use for the time of one ``async with`` block; see `Keyed.hold`."""

    _key: K
    _find_table: Callable[[], _Table[K, PolicyT]]
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
