"""What belongs to a run ends with it."""

from __future__ import annotations

import threading

import pytest
import trio

from trio_resilience._engine._run import RunState


async def _get(state: RunState[list[str]]) -> list[str]:
    return state.get()


def test_every_run_has_a_state_of_its_own() -> None:
    """A second run starts afresh, and within a run the state stays the same."""
    state = RunState[list[str]](list[str])

    async def use() -> None:
        assert state.get() == []
        state.get().append("used")
        assert state.get() == ["used"]

    trio.run(use)
    trio.run(use)


def test_a_run_that_crashed_is_over() -> None:
    """Even one that ended by SystemExit leaves nothing to the next."""
    state = RunState[list[str]](list[str])

    async def crash() -> None:
        state.get().append("held")
        raise SystemExit

    with pytest.raises(SystemExit):
        trio.run(crash)
    assert trio.run(_get, state) == []


def test_the_state_of_a_live_run_can_be_read_from_anywhere() -> None:
    """Statistics work before, between and after runs, and from other threads."""
    state = RunState[list[str]](list[str])
    assert state.peek() is None

    async def use() -> None:
        assert state.peek() is state.here() is None
        made = state.get()
        assert state.peek() is state.here() is made
        assert await trio.to_thread.run_sync(state.peek) is made
        assert await trio.to_thread.run_sync(state.here) is None

    trio.run(use)
    assert state.peek() is None
    assert state.here() is None


def test_it_is_not_available_outside_a_run() -> None:
    """There is no run to belong to."""
    with pytest.raises(RuntimeError):
        RunState[list[str]](list[str]).get()


def test_two_live_runs_at_once_are_refused() -> None:
    """The second thread is told so; the first goes on undisturbed, and later runs may use it."""
    state = RunState[list[str]](list[str])
    refusals: list[str] = []

    def second() -> None:
        with pytest.raises(RuntimeError, match="two runs of trio at once") as caught:
            trio.run(_get, state)
        refusals.append(str(caught.value))

    async def first() -> None:
        state.get().append("mine")
        thread = threading.Thread(target=second)
        thread.start()
        await trio.to_thread.run_sync(thread.join)
        assert state.get() == ["mine"]

    trio.run(first)
    assert len(refusals) == 1
    assert trio.run(_get, state) == []
