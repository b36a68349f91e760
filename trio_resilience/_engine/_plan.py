"""How a call is to run its operations, checked before anything runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Hashable, Iterable
from typing import Any, Literal, TypeAlias, cast, final

import attrs
import trio

from trio_resilience._checks import integer, one_of, operation, operations, seconds, sync_callback
from trio_resilience._engine._permits import LimiterPermits, SharedBound
from trio_resilience._engine._policy import Policy
from trio_resilience._engine._report import report
from trio_resilience._engine._source import size_of
from trio_resilience._errors import BulkheadFullError
from trio_resilience._events import Rejected

OnError: TypeAlias = Literal["cancel", "continue", "collect"]


@final
@attrs.frozen(eq=False, kw_only=True, repr=False)
class Plan:
    """How a pool is to run its operations; every field is checked already."""

    kind: str
    """The public function's name, for events and messages."""
    prefix: tuple[Callable[..., Any], ...]
    """An operation is called as ``prefix[0](*prefix[1:], item)``, or as ``item()``."""
    max_concurrency: int | SharedBound
    timeout: float
    batch_size: int | None
    delay_between_batches: float
    on_error: OnError
    on_done: Callable[[int, Any], object] | None
    key: Callable[[Any], Hashable] | None = None
    max_per_key: int = 1
    lookahead: int = 1
    is_map: bool = False
    """Whether an item is an argument of a function that all share, rather than an operation."""


def make_plan(
    kind: str,
    fn: Callable[[Any], Awaitable[Any]] | None,
    items: object,
    max_concurrency: object,
    queue_size: object,
    timeout: object,
    batch_size: object,
    delay_between_batches: object,
    policy: object,
    on_error: OnError,
    on_done: Callable[[int, Any], object] | None,
    key: Callable[[Any], Hashable] | None = None,
    max_per_key: object = None,
    lookahead: object = 1,
) -> Plan:
    """Check what the four functions have in common, before anything runs."""
    if fn is not None:
        operation("fn", fn)
    _check_source("ops" if fn is None else "items", items, are_operations=fn is None)
    prefix: tuple[Callable[..., Any], ...] = () if fn is None else (fn,)
    if policy is not None:
        prefix = (checked_policy(policy).call, *prefix)
    if on_done is not None:
        sync_callback("on_done", on_done)
    plan = Plan(
        kind=kind,
        prefix=prefix,
        max_concurrency=_checked_bound(max_concurrency),
        timeout=seconds("timeout", timeout),
        batch_size=None if batch_size is None else integer("batch_size", batch_size, minimum=1),
        delay_between_batches=seconds("delay_between_batches", delay_between_batches, finite=True),
        on_error=one_of("on_error", on_error, ("cancel", "continue", "collect")),
        on_done=on_done,
        key=key,
        max_per_key=_checked_max_per_key(key, max_per_key),
        lookahead=integer("lookahead", lookahead, minimum=1),
        is_map=fn is not None,
    )
    if plan.delay_between_batches > 0 and batch_size is None:
        raise ValueError("`delay_between_batches` needs a `batch_size`")
    if queue_size is not None:
        _check_room(plan, items, integer("queue_size", queue_size, minimum=0))
    return plan


def _checked_bound(max_concurrency: object) -> int | SharedBound:
    if isinstance(max_concurrency, SharedBound):
        return max_concurrency
    if isinstance(max_concurrency, trio.CapacityLimiter):
        limiter = max_concurrency
        return SharedBound(limiter, lambda: LimiterPermits(limiter), lambda: limiter.total_tokens)
    if isinstance(max_concurrency, Policy):
        raise TypeError(
            "`max_concurrency` must be an int, a trio.CapacityLimiter or a Semaphore, got"
            f" {max_concurrency!r}: pass that as `policy`"
        )
    return integer("max_concurrency", max_concurrency, minimum=1)


def _checked_max_per_key(key: object, max_per_key: object) -> int:
    if key is None:
        if max_per_key is not None:
            raise ValueError("`max_per_key` needs a `key`")
        return 1
    sync_callback("key", key)
    if max_per_key is None:
        raise ValueError("`key` needs a `max_per_key`")
    return integer("max_per_key", max_per_key, minimum=1)


def checked_policy(policy: object) -> Policy[object]:
    if not isinstance(policy, Policy):
        raise TypeError(f"`policy` must be a policy such as Retry(), got {policy!r}")
    return cast("Policy[object]", policy)


def _check_source(name: str, items: object, *, are_operations: bool) -> None:
    if inspect.iscoroutine(items):
        items.close()
    if not isinstance(items, (Iterable, AsyncIterable)):
        raise TypeError(f"`{name}` must be an iterable or async iterable, got {items!r}")
    if are_operations and isinstance(items, (list, tuple)):
        operations(name, cast("Collection[object]", items))


def _check_room(plan: Plan, items: object, queue_size: int) -> None:
    bound = plan.max_concurrency
    capacity = queue_size + (bound if isinstance(bound, int) else bound.total())
    size = size_of(items)
    if capacity < size < math.inf:
        if trio.lowlevel.in_trio_task():  # a stream may be made elsewhere, where there is no clock
            report(Rejected, policy=plan.kind, operation=plan.kind, retry_after=None)
        raise BulkheadFullError(plan.kind, capacity, size)
