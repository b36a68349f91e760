"""`python -m trio_resilience check` shows what a configuration comes to, or what is wrong in it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from trio_resilience._cli import main
from trio_resilience._cli._check import SAMPLE
from trio_resilience._config_options import structure
from trio_resilience._config_schema import LAYERS

if TYPE_CHECKING:
    from pathlib import Path

Capture = pytest.CaptureFixture[str]

TEXT = """
budgets.backend = {}
[policies.payments]
retry = { budget = "backend", backoff = { base_delay = "100ms" } }
[policies."search [x]"]
layers = ["bulkhead", "retry", "hedge"]
hedge = { after = { quantile = 0.95 } }
breaker = false
"""


BACKOFF = (
    'backoff = {kind = "exponential", base_delay = 0.1, multiplier = 2, max_delay = 30,'
    ' jitter = "full"}'
)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "it.toml"


def test_it_shows_every_option_of_every_layer(capfd: Capture, path: Path) -> None:
    """As the file would have it; those that are not given, too."""
    path.write_text(TEXT)
    assert main(["check", str(path)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = [line.lstrip("│├└─ ") for line in out.splitlines()]
    start, middle = lines.index("payments"), lines.index("search [x]")
    assert lines[: start + 1] == [
        str(path),
        "budget backend",
        "ratio = 0.1",
        "max_tokens = 10",
        "payments",
    ]
    kinds = [line for line in lines[start:middle] if line in LAYERS]
    assert kinds == ["timeout", "retry", "breaker", "bulkhead", "attempt_timeout"]
    for line in (
        "seconds = 30",
        "max_attempts = 3",
        BACKOFF,
        "total_timeout = inf",
        'budget = "backend"',
        "failure_rate = false",
        "enforce = true",
    ):
        assert line in lines[start:middle]
    assert "after = {quantile = 0.95, min_samples = 100, initial = inf}" in lines[middle:]


def test_it_gives_advice_on_each_pipeline(capfd: Capture, path: Path) -> None:
    """What is odd is no mistake."""
    path.write_text(TEXT)
    assert main(["check", str(path)]) == 0
    advice = [line for line in capfd.readouterr().out.splitlines() if "advice: " in line]
    assert len(advice) == 2
    assert "Bulkhead 'search [x].bulkhead' is around Retry" in "".join(advice)


def test_every_mistake_is_a_line_on_stderr(capfd: Capture, path: Path) -> None:
    """Nothing is printed on stdout, and the status is that of a wrong command."""
    path.write_text("[policies.a]\nretry.max_attempts = 0\ntimeut = 3\nbulkhead = 'x'")
    assert main(["check", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "trio_resilience: policies.a.retry.max_attempts: `max_attempts` must be >= 1, got 0",
        "trio_resilience: policies.a.timeut: is no known key; did you mean `timeout`?",
        "trio_resilience: policies.a.bulkhead: `max_concurrency` must be an int, got 'x'",
    ]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\xff", "is no UTF-8"),
        (b"[", "is no TOML"),
        (b"#" * 10**7, "at most"),
        (b"x = 1\nx = 2", "is no TOML"),
        (b"\0", "is no TOML"),
        (b"x = " + b"[" * 10**6, "nests more than"),
        (b"policies.a.bulkhead = 0x" + b"f" * 900_000, "more than 64 bits"),
    ],
    ids=range(7),
)
def test_a_file_that_is_none_of_that_is_one_line(
    capfd: Capture, path: Path, data: bytes, words: str
) -> None:
    path.write_bytes(data)
    assert main(["check", str(path)]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert f"trio_resilience: {path}" in line
    assert words in line
    assert out == ""


def test_six_mistakes_are_six_lines(capfd: Capture, path: Path) -> None:
    """Of six kinds, each with its key path."""
    path.write_text("""
        [defaults]
        retry = { max_attempts = 0 }
        [policies.payments]
        timeout = "abc"
        breakr = {}
        rate_limit = "0/s"
        [policies.search]
        breaker = { failure_rate = nan }
        layers = ["retry", "retri"]
    """)
    assert main(["check", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        "defaults.retry.max_attempts",
        "policies.payments.timeout",
        "policies.payments.breakr",
        "policies.payments.rate_limit",
        "policies.search.breaker.failure_rate",
        "policies.search.layers.1",
    ]


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "nothing"])
def test_what_is_no_file_is_one_line(capfd: Capture, path: Path, kind: str) -> None:
    """Nobody waits for who may write to a pipe."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    assert main(["check", str(path)]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"trio_resilience: {path}: can't be read: ")
    assert out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, not any bytes are a name")
def test_names_can_t_command_the_terminal(capfd: Capture, path: Path) -> None:
    """What is not to be printed is escaped, in the file's own name, too."""
    odd = path.with_name(os.fsdecode(b"\xff\x1b.toml"))
    odd.write_text('policies."\\u001b[31m\\n" = {}')
    assert main(["check", str(odd)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].endswith(r"/\udcff\x1b.toml")
    assert lines[1] == r"└── \x1b[31m\n"


def test_a_file_has_to_be_named(capfd: Capture) -> None:
    assert main(["check"]) == 2
    assert "check" in capfd.readouterr().err.lower()


def test_without_cattrs_it_says_what_to_install(
    capfd: Capture, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("policies.a.timeout = 3")
    structure.cache_clear()
    monkeypatch.setitem(sys.modules, "cattrs", None)
    assert main(["check", str(path)]) == 2
    structure.cache_clear()
    (line,) = capfd.readouterr().err.splitlines()
    assert "pip install 'trio_resilience[config]'" in line


def test_the_sample_that_ships_with_the_package_is_in_order(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is odd about what it describes."""
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", str(SAMPLE)]) == 0
    out = capfd.readouterr().out
    for name in ("payments", "search", "mail", "demo", "budget backend"):
        assert name in out
    assert "advice" not in out
