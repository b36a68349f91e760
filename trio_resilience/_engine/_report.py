"""Tell listeners where and when something happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from trio_resilience._events import Event, Subscription, current_subscriptions

if TYPE_CHECKING:
    from collections.abc import Iterable


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
