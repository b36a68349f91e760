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


def test_the_last_state_can_be_read_outside_a_run() -> None:
    """Statistics work before, between and after runs."""
    state = RunState[list[str]](list[str])
    assert state.last() is None
    made = trio.run(_get, state)
    assert state.last() is made


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
