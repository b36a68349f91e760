"""Run many operations, a bounded number of them at a time, beneath a nursery that you own."""

from __future__ import annotations

import math
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
)
from datetime import timedelta
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    Self,
    TypeAlias,
    TypeVar,
    TypeVarTuple,
    final,
    overload,
)

import trio
from outcome import Error, Value
from trio.lowlevel import enable_ki_protection

from trio_resilience._checks import (
    flag,
    integer,
    label,
    operation,
)
from trio_resilience._engine._ending import add_context, raise_failure, take_failure
from trio_resilience._engine._join import Job, check_nursery, join
from trio_resilience._engine._outbox import ENDED, Outbox
from trio_resilience._engine._permits import SharedBound
from trio_resilience._engine._plan import OnError, Plan, checked_policy, make_plan
from trio_resilience._engine._policy import Policy
from trio_resilience._engine._pool import Pool
from trio_resilience._semaphore import Semaphore, permits_of

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")
Ts = TypeVarTuple("Ts")

Source: TypeAlias = Iterable[T] | AsyncIterable[T]
Operation: TypeAlias = Callable[[], Awaitable[T]]
Outcome: TypeAlias = Value[T] | Error
Raising: TypeAlias = Literal["cancel", "continue"]
Bound: TypeAlias = int | trio.CapacityLimiter | Semaphore
Seconds: TypeAlias = float | timedelta
OnDone: TypeAlias = Callable[[int, Outcome[T]], object]


async def run_in(
    nursery: trio.Nursery | None,
    fn: Callable[[*Ts], Awaitable[T]],
    *args: *Ts,
    policy: Policy[T] | None = None,
    name: str | None = None,
) -> T:
    """Run ``fn(*args)`` as a child task of *nursery* and return its result here.

    A failure surfaces here, as the same object, and never crashes the nursery. Cancelling the
    caller, or Ctrl-C in it, cancels the child and waits until it has ended; so does the deadline
    that the caller is under.

    Args:
        nursery: where the child lives; ``None`` opens a nursery for this call.
        fn: an async function, called with *args*.
        policy: run the operation under this policy.
        name: label of the task and of the policy's events; by default the function's name.

    Raises:
        OperationsCancelledError: the nursery was cancelled, but not the caller.
        BaseExceptionGroup: the child raised something that is not an `Exception`.
        RuntimeError: the nursery's block has ended.

    Example::

        async with trio.open_nursery() as nursery:
            user = await run_in(nursery, fetch_user, 7, policy=Retry(max_attempts=5))
    """
    check_nursery(nursery)
    operation("fn", fn)
    if policy is not None:
        checked_policy(policy)
    await trio.lowlevel.checkpoint_if_cancelled()
    title = label(fn) if name is None else name
    call: Any = fn
    if policy is not None:
        call = partial(policy.call, fn, name=title)
    job: Job[T] = await join(nursery, call, *args, name=title)
    return job.result()


@overload
async def run_with_limit(
    nursery: trio.Nursery | None,
    ops: Source[Operation[T]],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[T] | None = None,
    on_error: Raising = "cancel",
    on_done: OnDone[T] | None = None,
) -> list[T]: ...
@overload
async def run_with_limit(
    nursery: trio.Nursery | None,
    ops: Source[Operation[T]],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[T] | None = None,
    on_error: Literal["collect"],
    on_done: OnDone[T] | None = None,
) -> list[Outcome[T]]: ...
async def run_with_limit(
    nursery: trio.Nursery | None,
    ops: Source[Operation[T]],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[T] | None = None,
    on_error: OnError = "cancel",
    on_done: OnDone[T] | None = None,
) -> list[T] | list[Outcome[T]]:
    """Run every operation, *max_concurrency* at a time, and return their results in order.

    When this returns or raises, everything it started has ended. A failing operation never
    crashes *nursery*: it surfaces here. Cancelling the caller, or Ctrl-C in it, cancels the
    operations and waits for them, wherever *nursery* lies; so does the caller's deadline, as it
    is when the call begins.

    Args:
        nursery: where the work lives: a supervising task is started in it, and the operations run
            beneath that; ``None`` opens a nursery for this call.
        ops: zero-argument async callables: an iterable or async iterable, pulled lazily, in
            order, at most *max_concurrency* ahead of what has finished, in the caller's context.
            A generator is closed when the call ends.
        max_concurrency: how many run at once; or a `trio.CapacityLimiter` or `Semaphore`, to share
            one bound between calls: a permit of it is taken before an operation is pulled.
        queue_size: refuse more than ``max_concurrency + queue_size`` of sized *ops* at the door.
        timeout: seconds that each operation may take, its policy and all its attempts included,
            its wait for a permit not. Expiry is its failure, an `OperationTimeoutError`.
        batch_size: run this many, wait until all of them have finished, then the next batch.
        delay_between_batches: seconds between the end of a batch and the start of the next.
        policy: what each operation runs under. A retry keeps its slot while it backs off.
        on_error: ``"cancel"``: the first failure cancels the rest; ``"continue"``: all run; both
            raise one group of all failures in the end. ``"collect"``: all run, and the list is of
            `outcome.Value` and `outcome.Error`.
        on_done: called as ``on_done(index, outcome)`` when an operation is done, in the order in
            which they finish, in the caller's context. If it raises, the job ends with that error.

    Raises:
        OperationsFailedError: an exception group of what the operations raised; each leaf has a
            note such as ``operation 3``, and ``.outcomes`` has what did succeed.
        OperationsCancelledError: the nursery was cancelled, but not the caller.
        BulkheadFullError: there are more operations than *queue_size* allows.
        BaseExceptionGroup: an operation raised something that is not an `Exception`.
        TypeError: something that is not an async callable was given as an operation.
        RuntimeError: the nursery's block has ended; or this call waits for a permit of a limiter
            of which the operation that made the call holds one.

    Each operation runs in its own copy of the caller's context, in a task that it shares with
    others, one after the other: one that leaves a `trio.Lock` held hands it to the next.

    Example::

        async with trio.open_nursery() as nursery:
            users = await run_with_limit(
                nursery, [partial(fetch_user, id) for id in ids], max_concurrency=5
            )
    """
    check_nursery(nursery)
    plan = make_plan(
        "run_with_limit", None, ops, _shared(max_concurrency), queue_size, timeout,
        batch_size, delay_between_batches, policy, on_error, on_done,
    )  # fmt: skip
    return await _run(nursery, plan, ops)


@overload
async def map_with_limit(
    nursery: trio.Nursery | None,
    fn: Callable[[T], Awaitable[R]],
    items: Source[T],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[R] | None = None,
    on_error: Raising = "cancel",
    on_done: OnDone[R] | None = None,
    key: Callable[[T], Hashable] | None = None,
    max_per_key: int | None = None,
    lookahead: int = 1000,
) -> list[R]: ...
@overload
async def map_with_limit(
    nursery: trio.Nursery | None,
    fn: Callable[[T], Awaitable[R]],
    items: Source[T],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[R] | None = None,
    on_error: Literal["collect"],
    on_done: OnDone[R] | None = None,
    key: Callable[[T], Hashable] | None = None,
    max_per_key: int | None = None,
    lookahead: int = 1000,
) -> list[Outcome[R]]: ...
async def map_with_limit(
    nursery: trio.Nursery | None,
    fn: Callable[[T], Awaitable[R]],
    items: Source[T],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[R] | None = None,
    on_error: OnError = "cancel",
    on_done: OnDone[R] | None = None,
    key: Callable[[T], Hashable] | None = None,
    max_per_key: int | None = None,
    lookahead: int = 1000,
) -> list[R] | list[Outcome[R]]:
    """Run ``fn(item)`` for every item, *max_concurrency* at a time; return the results in order.

    All is as in `run_with_limit`, but for the note on a failed leaf, which shows the item too:
    ``operation 3: 'https://…'``. And further:

    Args:
        key: a plain function of the item. At most *max_per_key* of those with the same key run at
            once; an item whose key is busy is set aside, and keeps no worker from those behind it.
            It is called once for each item, when that is pulled, in the caller's context; if it
            raises, that counts as the iterable raising.
        max_per_key: how many with the same key run at once.
        lookahead: set aside so many at the most; then the next item waits for one of them.

    Example::

        async with trio.open_nursery() as nursery:
            pages = await map_with_limit(nursery, fetch, urls, max_concurrency=5, timeout=30)
    """
    check_nursery(nursery)
    plan = make_plan(
        "map_with_limit", fn, items, _shared(max_concurrency), queue_size, timeout,
        batch_size, delay_between_batches, policy, on_error, on_done, key, max_per_key, lookahead,
    )  # fmt: skip
    return await _run(nursery, plan, items)


@overload
def stream_with_limit(
    nursery: trio.Nursery | None,
    ops: Source[Operation[T]],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[T] | None = None,
    on_error: Raising = "cancel",
    ordered: bool = False,
    buffer: int = 0,
) -> Stream[int, T]: ...
@overload
def stream_with_limit(
    nursery: trio.Nursery | None,
    ops: Source[Operation[T]],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[T] | None = None,
    on_error: Literal["collect"],
    ordered: bool = False,
    buffer: int = 0,
) -> Stream[int, Outcome[T]]: ...
def stream_with_limit(
    nursery: trio.Nursery | None,
    ops: Source[Operation[T]],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[T] | None = None,
    on_error: OnError = "cancel",
    ordered: bool = False,
    buffer: int = 0,
) -> Stream[int, T] | Stream[int, Outcome[T]]:
    """Run operations, *max_concurrency* at a time, and yield ``(index, result)`` as they finish.

    Memory is constant, but for failures that wait for the end: at most ``max_concurrency +
    buffer`` operations are running or waiting to be consumed, so a slow consumer slows them down,
    and an endless iterable is welcome. Leaving the block early cancels the rest and waits for it.

    All is as in `run_with_limit`, and further:

    Args:
        ordered: yield in the order of *ops*; then a slow operation at the head holds back new ones.
        buffer: how many results may wait for the consumer beyond *max_concurrency*.

    Raises:
        OperationsFailedError: from the iterator, after all results that had finished; or at the
            end of the block, if that was left before. An error of the block's body wins over it.
        OperationsCancelledError: from the iterator: the nursery was cancelled, but not the caller.

    Example::

        async with stream_with_limit(nursery, ops, max_concurrency=5) as results:
            async for index, result in results:
                print(index, result)
    """
    check_nursery(nursery)
    plan = make_plan(
        "stream_with_limit", None, ops, _shared(max_concurrency), queue_size, timeout,
        batch_size, delay_between_batches, policy, on_error, None,
    )  # fmt: skip
    return Stream(nursery, plan, ops, ordered=ordered, buffer=buffer)


@overload
def stream_map_with_limit(
    nursery: trio.Nursery | None,
    fn: Callable[[T], Awaitable[R]],
    items: Source[T],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[R] | None = None,
    on_error: Raising = "cancel",
    key: Callable[[T], Hashable] | None = None,
    max_per_key: int | None = None,
    lookahead: int = 1000,
    ordered: bool = False,
    buffer: int = 0,
) -> Stream[T, R]: ...
@overload
def stream_map_with_limit(
    nursery: trio.Nursery | None,
    fn: Callable[[T], Awaitable[R]],
    items: Source[T],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[R] | None = None,
    on_error: Literal["collect"],
    key: Callable[[T], Hashable] | None = None,
    max_per_key: int | None = None,
    lookahead: int = 1000,
    ordered: bool = False,
    buffer: int = 0,
) -> Stream[T, Outcome[R]]: ...
def stream_map_with_limit(
    nursery: trio.Nursery | None,
    fn: Callable[[T], Awaitable[R]],
    items: Source[T],
    *,
    max_concurrency: Bound = 10,
    queue_size: int | None = None,
    timeout: Seconds = math.inf,
    batch_size: int | None = None,
    delay_between_batches: Seconds = 0.0,
    policy: Policy[R] | None = None,
    on_error: OnError = "cancel",
    key: Callable[[T], Hashable] | None = None,
    max_per_key: int | None = None,
    lookahead: int = 1000,
    ordered: bool = False,
    buffer: int = 0,
) -> Stream[T, R] | Stream[T, Outcome[R]]:
    """Run ``fn(item)`` for every item and yield ``(item, result)`` as they finish.

    All is as in `stream_with_limit`, but for the item in the place of the index; *key*,
    *max_per_key* and *lookahead* are as in `map_with_limit`. If the results are *ordered*, what is
    set aside counts as running, so there are never more of both than ``max_concurrency + buffer``.

    Example::

        async with stream_map_with_limit(nursery, fetch, urls, max_concurrency=5) as pages:
            async for url, page in pages:
                print(url, len(page))
    """
    check_nursery(nursery)
    plan = make_plan(
        "stream_map_with_limit", fn, items, _shared(max_concurrency), queue_size, timeout,
        batch_size, delay_between_batches, policy, on_error, None, key, max_per_key, lookahead,
    )  # fmt: skip
    return Stream(nursery, plan, items, ordered=ordered, buffer=buffer)


@final
class Stream(Generic[K, R]):
    """Results as they finish: ``async with`` runs the operations, ``async for`` yields results.

    Made by `stream_with_limit` and `stream_map_with_limit`. One task at a time may iterate.
    """

    def __init__(
        self,
        nursery: trio.Nursery | None,
        plan: Plan,
        items: Source[Any],
        *,
        ordered: bool,
        buffer: int,
    ) -> None:
        self._nursery = nursery
        self._plan = plan
        self._items = items
        buffer = integer("buffer", buffer, minimum=0)
        bound = plan.max_concurrency
        self._outbox = Outbox(
            capacity=(
                (lambda: bound + buffer)
                if isinstance(bound, int)
                else (lambda: bound.total() + buffer)
            ),
            buffer=buffer,
            ordered=flag("ordered", ordered),
        )
        self._own_nursery: Any = None
        self._job: Job[None] | None = None
        self._pool: Pool | None = None
        self._is_open = False
        self._reason_was_given = False

    def __repr__(self) -> str:
        state = "open" if self._is_open else "not entered" if self._job is None else "closed"
        return f"<{self._plan.kind}: {state}>"

    @enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._job is not None:
            raise RuntimeError(f"a {self._plan.kind} block can be entered only once")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._pool = pool = _pool(self._plan, self._items, self._outbox)
        self._job = job = Job[None]()
        job.on_done = self._outbox.end
        nursery = self._nursery
        if nursery is None:
            self._own_nursery = trio.open_nursery()
            nursery = await self._own_nursery.__aenter__()
        job.start(nursery, pool.run, name=self._plan.kind)
        self._is_open = True
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self

    def __aiter__(self) -> AsyncIterator[tuple[K, R]]:
        if self._job is None:
            kind = self._plan.kind
            raise TypeError(
                f"{kind} needs a block of its own: `async with {kind}(...) as results:` and in it"
                " `async for ... in results:`"
            )
        return self

    async def __anext__(self) -> tuple[K, R]:
        if not self._is_open:
            raise trio.ClosedResourceError("the block of this stream has ended")
        result = await self._outbox.take()
        if result is not ENDED:
            pair: tuple[K, R] = result
            return pair
        if not self._is_open:
            raise trio.ClosedResourceError("the block of this stream has ended")
        assert self._job is not None
        assert self._pool is not None
        if not self._reason_was_given:
            self._reason_was_given = True
            raise_failure(self._job, take_failure(self._job, self._pool))
        raise StopAsyncIteration

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._job is not None
        assert self._pool is not None
        self._is_open = False
        if not self._job.is_done:
            self._job.scope.cancel()
        await self._job.wait()
        if self._own_nursery is not None:
            try:
                await self._own_nursery.__aexit__(None, None, None)
            except BaseExceptionGroup as group:
                if exc is None:
                    self._job.absorb_cancellation(group)
        if self._reason_was_given:
            return
        failure = take_failure(self._job, self._pool, left_early=True, body_error=exc)
        try:
            if exc is not None and (failure is None or isinstance(failure, Exception)):
                add_context(exc, failure)
            else:
                raise_failure(self._job, failure)
        finally:
            del failure, exc


# --- what they share ---------------------------------------------------------------------------


def _shared(bound: object) -> object:
    """Make of a semaphore what the engine knows."""
    if not isinstance(bound, Semaphore):
        return bound
    return SharedBound(bound, lambda: permits_of(bound), lambda: bound.permits)


async def _run(nursery: trio.Nursery | None, plan: Plan, items: Source[Any]) -> list[Any]:
    await trio.lowlevel.checkpoint_if_cancelled()
    pool = _pool(plan, items)
    job = await join(nursery, pool.run, name=plan.kind)
    failure = take_failure(job, pool)
    try:
        if failure is not None or not pool.is_complete:
            raise_failure(job, failure)
        return pool.results
    finally:
        del failure


def _pool(plan: Plan, items: Source[Any], outbox: Outbox | None = None) -> Pool:
    """Open the source, in the caller's task, in whose context it is pulled and callbacks run."""
    caller = trio.lowlevel.current_task().context
    if isinstance(items, Iterable):
        return Pool(plan, items, caller, outbox)
    return Pool(plan, aiter(items), caller, outbox)
