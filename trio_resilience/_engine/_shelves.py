"""Keep policies by key, a bounded number of them, and forget first what is missed least."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Final, Generic, Never, TypeVar, final

import attrs
import trio
from trio.lowlevel import disable_ki_protection

from trio_resilience._checks import refuse_coroutine
from trio_resilience._engine._policy import Policy
from trio_resilience._engine._run import RunState

K = TypeVar("K", bound=Hashable)
PolicyT = TypeVar("PolicyT", bound=Policy[Never])

# What becomes of a policy that is not in use when room is needed: idle ones go first, then those
# that are merely warm, and the others stay.
IDLE: Final = 0
_WARM: Final = 1
STAYS: Final = 2

_FEW: Final = 8
"""How many policies are looked at again for each call, in case they have become idle."""
_BELIEVED: Final = 0.1
"""Seconds for which it is believed of more than a few policies that all of them have to stay."""


@final
@attrs.define(eq=False, repr=False)
class Kept(Generic[K, PolicyT]):
    """A policy, and who uses it."""

    key: K
    policy: PolicyT
    pins: int = 0
    """Calls and holds under way, in this run."""
    rank: int = IDLE
    """Which shelf it is on, unless it is in use."""
    since: float = -math.inf
    """When it came there; unset if nothing is forgotten for want of use."""


@final
@attrs.define(eq=False, repr=False)
class Shelves(Generic[K, PolicyT]):
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
    _kept: dict[K, Kept[K, PolicyT]] = attrs.field(factory=dict[K, "Kept[K, PolicyT]"], init=False)
    _shelves: tuple[OrderedDict[K, Kept[K, PolicyT]], ...] = attrs.field(
        factory=lambda: (OrderedDict(), OrderedDict(), OrderedDict()), init=False
    )
    run: object = attrs.field(default=None, init=False)
    """The one that pins, times and the order of the shelves belong to."""
    _look_again_at: float = attrs.field(default=-math.inf, init=False)

    def anew(self) -> Shelves[K, PolicyT]:
        """Return one with the same options and without policies."""
        return Shelves(self.factory, self.max_keys, self.idle_after)

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
            return STAYS
        return max((_rank(kept.policy) for kept in self._kept.values()), default=IDLE)

    def pin(self, key: K) -> Kept[K, PolicyT] | None:
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

    def unpin(self, kept: Kept[K, PolicyT], run: object) -> None:
        """Take back a pin of *run*; that of a run that has died has died with it."""
        if self.runs.here() is not run:
            return
        kept.pins -= 1
        if not kept.pins:
            self._shelve(kept, IDLE)
            self._shed()

    def _find(self, key: K) -> Kept[K, PolicyT] | None:
        try:
            return self._kept.get(key)
        except TypeError as error:
            raise TypeError(f"a key must be hashable, got {key!r}") from error

    def _add(self, key: K) -> Kept[K, PolicyT] | None:
        is_full = len(self._kept) >= self.max_keys
        victim = self._dispensable() if is_full else None
        if victim is None and self._resting >= self.max_keys:
            return None
        # If the factory raises, nothing is lost for it.
        policy = _make(self.factory, key)
        if victim is not None:
            self._drop(victim)
        kept = self._kept[key] = Kept(key, policy)
        return kept

    def _begin(self, run: object) -> None:
        idle, warm, staying = ([*shelf.values()] for shelf in self._shelves)
        abandoned = [kept for kept in self._kept.values() if kept.pins]
        for shelf in self._shelves:
            shelf.clear()
        self.run, self._look_again_at = run, -math.inf
        for kept in (*staying, *warm, *idle, *abandoned):
            kept.pins = 0
            self._shelve(kept, IDLE)

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
                if rank == IDLE:
                    self._drop(kept)
                else:
                    looks -= 1
                    self._move(kept, rank)

    def _dispensable(self) -> Kept[K, PolicyT] | None:
        """Return that which is missed least, if there is any that may go."""
        return self._idle_again() or self._idle() or self._warm() or self._free_again()

    def _idle_again(self) -> Kept[K, PolicyT] | None:
        _, warm, staying = self._shelves
        for kept in islice(warm.values(), _FEW):
            if _rank(kept.policy) == IDLE:
                return kept
        for kept in [*islice(staying.values(), _FEW)]:
            rank = _rank(kept.policy)
            if rank == IDLE:
                return kept
            self._move(kept, rank)  # behind the others, which are looked at next time
        return None

    def _idle(self) -> Kept[K, PolicyT] | None:
        shelf = self._shelves[IDLE]
        while shelf:
            kept = _oldest(shelf)
            rank = _rank(kept.policy)
            if rank == IDLE:
                return kept
            self._move(kept, rank)
        return None

    def _warm(self) -> Kept[K, PolicyT] | None:
        shelf = self._shelves[_WARM]
        while shelf:
            kept = _oldest(shelf)
            if _rank(kept.policy) < STAYS:
                return kept
            self._move(kept, STAYS)
        return None

    def _free_again(self) -> Kept[K, PolicyT] | None:
        """Look at all that had to stay, but not for every call: they may be many."""
        if trio.current_time() < self._look_again_at:
            return None
        for kept in self._shelves[STAYS].values():
            if _rank(kept.policy) < STAYS:
                return kept
        self._look_again_at = trio.current_time() + _BELIEVED
        return None

    def _drop(self, kept: Kept[K, PolicyT]) -> None:
        del self._shelves[kept.rank][kept.key], self._kept[kept.key]
        self.evicted += 1

    def _move(self, kept: Kept[K, PolicyT], rank: int) -> None:
        del self._shelves[kept.rank][kept.key]
        self._shelve(kept, rank)

    def _shelve(self, kept: Kept[K, PolicyT], rank: int) -> None:
        if self.idle_after < math.inf:
            kept.since = trio.current_time()
        kept.rank = rank
        self._shelves[rank][kept.key] = kept


def _rank(policy: Policy[Never]) -> int:
    if not policy.is_disposable:
        return STAYS
    return IDLE if policy.is_idle else _WARM


def _oldest(shelf: OrderedDict[K, Kept[K, PolicyT]]) -> Kept[K, PolicyT]:
    return next(iter(shelf.values()))


@disable_ki_protection
def _make(factory: Callable[[K], PolicyT], key: K) -> PolicyT:
    refuse_coroutine("key", key)
    policy = factory(key)
    refuse_coroutine("factory", policy)
    _check_policy(policy)
    return policy


def _check_policy(value: object) -> None:
    if not isinstance(value, Policy):
        raise TypeError(f"`factory` must return a policy such as Semaphore(3), got {value!r}")
