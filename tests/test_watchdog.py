"""A deadlocked test fails, whatever it hangs in, and the next one runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SUITE = """
import pytest
import trio
from trio.lowlevel import Abort, cancel_shielded_checkpoint, wait_task_rescheduled

pytestmark = pytest.mark.watchdog(0.2)


async def culprit():
    await trio.sleep_forever()


async def test_virtual_clock(autojump_clock):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(culprit)


async def test_real_clock():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(culprit)


async def test_wait_that_cannot_be_aborted(autojump_clock):
    await wait_task_rescheduled(lambda culprit: Abort.FAILED)


async def test_loop_with_checkpoints(autojump_clock):
    culprit = cancel_shielded_checkpoint
    while culprit:
        await culprit()


def test_loop_without():
    culprit = 1
    while culprit: culprit += 1


async def test_swallowed_interrupt():
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(culprit)
    except* KeyboardInterrupt:
        pass


async def test_that_ends():
    await trio.sleep(0)
"""

HANGING = re.findall(r"def (test_\w+)", SUITE)[:-1]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of its own, with the house's settings and watchdog."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "pyproject.toml").write_text((HERE.parent / "pyproject.toml").read_text())
    (tests / "conftest.py").write_text((HERE / "conftest.py").read_text())
    watchdog = (HERE / "_watchdog.py").read_text()
    usual, short = "\nGRACE_SECONDS = 5.0\n", "\nGRACE_SECONDS = 0.5\n"
    assert usual in watchdog
    (tests / "_watchdog.py").write_text(watchdog.replace(usual, short))
    (tests / "test_it.py").write_text(SUITE)
    return tmp_path


def test_tests_that_hang_fail_and_the_others_run(suite: Path) -> None:
    """Each hang is one failure that shows its culprit; the session goes on to its end."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=suite, capture_output=True, text=True, check=False)
    assert f"{len(HANGING)} failed, 1 passed" in run.stdout, run.stdout + run.stderr
    for name in HANGING:
        shown = run.stdout.split(f" {name} ___")[1].split("\n____")[0]
        assert "still running after 0.2 s" in shown
        assert "culprit" in shown.split("watchdog call")[1], shown
