"""What holds for every test: it ends by itself within a minute, or fails."""

from __future__ import annotations

import gc
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests._watchdog import SECONDS, Watchdog

if TYPE_CHECKING:
    from collections.abc import Generator

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real stderr for the watchdog, before tests are run with theirs captured.

    And heed Ctrl-C, which a shell lets the programs ignore that it runs in the background: the
    tests press it.
    """
    config.stash[_stderr] = os.dup(2)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close it again."""
    os.close(config.stash[_stderr])


def pytest_collection_finish() -> None:
    """Spare the garbage collector the thousands of tests, or each collection takes 0.2 s."""
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Run the test under a watchdog; `@pytest.mark.watchdog(seconds)` gives it another limit."""
    marker = item.get_closest_marker("watchdog")
    dog = Watchdog(SECONDS if marker is None else marker.args[0], item.config.stash[_stderr])
    try:
        with dog.watching():
            yield
    finally:
        # Whatever came out, the Ctrl-C too (it would end the whole session), gives way to this.
        if dog.barks:
            item.add_report_section("call", "watchdog", dog.scene)
            pytest.fail(dog.verdict(), pytrace=False)
