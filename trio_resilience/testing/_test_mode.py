"""Make policies quick and exact in tests of code that uses them."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from trio_resilience._checks import flag, integer
from trio_resilience._engine._policy import Overrides, current_overrides, open_overrides

if TYPE_CHECKING:
    from collections.abc import Generator


@contextmanager
def test_mode(
    *,
    max_attempts: int | None = None,
    jitter: bool = False,
    delays: bool = True,
    fresh: bool = True,
) -> Generator[None]:
    """Let the policies that are used in this block, and in tasks it starts, behave for a test.

    It changes nothing outside the block, and nothing once the block has ended; so policies that
    live at module level need no patching. Blocks may be nested: the inner one counts.

    Args:
        max_attempts: let retries make at most this many calls.
        jitter: ``False`` makes every delay exact: the longest that jitter could have drawn.
        delays: ``False`` makes every delay zero.
        fresh: give every policy state and statistics of its own for the block.

    Example::

        async def test_a_flaky_service_is_tried_again():
            with test_mode(delays=False):
                assert await load_user(7) == "Ada"
    """
    mode = Overrides(
        max_attempts=(
            math.inf if max_attempts is None else integer("max_attempts", max_attempts, minimum=1)
        ),
        jitter=flag("jitter", jitter),
        delays=flag("delays", delays),
        states=WeakKeyDictionary[Any, Any]() if flag("fresh", fresh) else None,
    )
    current_overrides.set((*current_overrides.get(), mode))
    open_overrides.add(mode)
    try:
        yield
    finally:
        open_overrides.discard(mode)
        # No token is reset: a fixture's teardown runs in another context than its setup.
        current_overrides.set(tuple(each for each in current_overrides.get() if each is not mode))


# pytest collects what is called test_*, also where it is only imported.
test_mode.__test__ = False  # type: ignore[attr-defined]
