"""The command line is understood, or refused in one clear line; without its extra it says so."""

from __future__ import annotations

import os
import runpy
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING

import pytest
import trio

from trio_resilience._cli import _app, _terminal, main

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["demo", "--requests", "0"], "--requests. Must be > 0"),
        (["--requests", "-5"], "--requests"),
        (["--requests", "many"], "--requests"),
        (["--requests", "1.5"], "--requests"),
        (["--requests"], "--requests requires an argument"),
        (["demo", "--max-concurrency", "0"], "--max-concurrency. Must be > 0"),
        (["demo", "--faults", "some"], "--faults"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--outage", "-1"], "--outage. Must be >= 0 and finite"),
        (["demo", "--outage", "nan"], "--outage. Must be >= 0 and finite"),
        (["demo", "--outage", "inf"], "--outage. Must be >= 0 and finite"),
        (["demo", "--no-json"], "--no-json"),
        (["demo", "10"], "10"),
        (["dmeo"], "dmeo"),
        (["fetch", "--timeout", "nan"], "--timeout. Must be > 0"),
        (["fetch", "--timeout", "-1"], "--timeout"),
        (["fetch", "--max-attempts", "0"], "--max-attempts. Must be > 0"),
        (["fetch", "--max-concurrency", "1.5"], "--max-concurrency"),
        (["fetch", "--input"], "--input"),
        (["fetch", "--retries", "3"], "--retries"),
    ],
)
def test_a_command_that_is_not_understood_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert words in line
    assert line.startswith("trio_resilience: ")
    assert line.endswith(" (see python -m trio_resilience --help)")
    assert out == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--help"], ["demo", "fetch", "--requests", "--faults"]),
        (["demo", "-h"], ["--seed", "--json", "--max-concurrency", "--outage", "exit status"]),
        (["fetch", "--help"], ["--input", "--output-dir", "--timeout", "--max-attempts", "130"]),
    ],
)
def test_the_help_names_every_option(
    capfd: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert [word for word in words if word not in out] == []
    assert err == ""


def test_the_version_is_the_installed_one(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_app, "version", {"trio_resilience": "1.2.3"}.__getitem__)
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == "1.2.3\n"


def test_a_source_tree_has_no_version(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_app, "version", version)
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == "not installed\n"


def test_the_arguments_are_the_process_s_own_by_default(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["trio_resilience", "fetch"])
    assert main() == 2
    assert "nothing to fetch" in capfd.readouterr().err


def test_ctrl_c_where_nothing_waits_for_it_ends_it_quietly_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one, say. It may come up in a nursery, and so in a group."""

    async def interrupted(*_: object, **__: object) -> int:
        async with trio.open_nursery():
            raise KeyboardInterrupt

    monkeypatch.setattr(_app, "run_demo", interrupted)
    assert main(["demo"]) == 130
    assert capfd.readouterr().err == "trio_resilience: interrupted\n"


def run_as_a_module() -> None:
    sys.modules.pop("trio_resilience.__main__", None)
    runpy.run_module("trio_resilience", run_name="__main__")


def test_run_as_a_module_it_exits_with_the_status(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["trio_resilience", "fetch"])
    with pytest.raises(SystemExit) as caught:
        run_as_a_module()
    assert caught.value.code == 2
    assert "nothing to fetch" in capfd.readouterr().err


def test_imported_it_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert import_module("trio_resilience.__main__").main is main
    assert capfd.readouterr() == ("", "")


def forget_the_command_line(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in [name for name in sys.modules if name.startswith("trio_resilience._cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)


@pytest.mark.parametrize("missing", ["cyclopts", "h11", "httpx2", "rich"])
def test_without_the_extra_one_line_says_what_to_install(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    forget_the_command_line(monkeypatch, missing)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as caught:
        run_as_a_module()
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f'pip install "trio_resilience[cli]" (no module named {missing})' in line


def test_a_module_of_our_own_that_is_missing_is_a_bug_and_shows_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget_the_command_line(monkeypatch, "trio_resilience._cli._app")
    with pytest.raises(ModuleNotFoundError, match="_app"):
        run_as_a_module()


def test_a_write_that_is_cut_short_goes_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_three(descriptor: int, data: memoryview, write: Callable[..., int] = os.write) -> int:
        return write(descriptor, data[:3])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_three)
        _terminal.write_stdout("one, two, three")
    assert capfd.readouterr().out == "one, two, three"


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _terminal.render("[bold]x[/bold]") == "x\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in _terminal.render("[bold]x[/bold]")
