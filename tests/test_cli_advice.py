"""`python -m trio_resilience advice` says what is odd about the pipelines of a program."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from trio_resilience._cli import main

if TYPE_CHECKING:
    from pathlib import Path

SHOP = """
from trio_resilience import Hedge, Pipeline, Retry

payments = Pipeline.standard(name="payments")
search = Pipeline(Retry(), Hedge(after=1), Retry(max_attempts=5))
retry = Retry()
"""
FINE = "shop_policies:payments: nothing is odd"


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the current directory."""
    (tmp_path / "shop_policies.py").write_text(SHOP)
    (tmp_path / "shop_empty.py").write_text("")
    (tmp_path / "shop_broken.py").write_text("1 / 0")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_a_pipeline_that_is_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    """It is said, and the exit status is that of a success."""
    assert main(["advice", "shop_policies:payments"]) == 0
    assert capfd.readouterr().out.splitlines() == [FINE]


@pytest.mark.parametrize(
    "targets", [["shop_policies"], ["shop_policies:payments", "shop_policies:search"]]
)
def test_what_is_odd_is_told_with_the_reason(
    capfd: pytest.CaptureFixture[str], targets: list[str]
) -> None:
    """Of all pipelines of a module, or of those that are named."""
    assert main(["advice", *targets]) == 1
    fine, odd = capfd.readouterr().out.splitlines()
    assert fine == FINE
    assert odd.startswith("shop_policies:search: Retry 'retry' and Hedge 'hedge' and Retry")
    assert "3 x 2 x 5 = 30 times" in odd


@pytest.mark.parametrize(
    "targets, words",
    [
        ([], "no pipeline is given"),
        (["shop_nowhere"], "can't import shop_nowhere: ModuleNotFoundError"),
        (["shop_policies:nothing"], "can't import shop_policies:nothing: AttributeError"),
        (["shop_policies:payments", "a..b"], "can't import a..b: ValueError"),
        (["shop_broken"], "can't import shop_broken: ZeroDivisionError"),
        (["shop_empty"], "shop_empty has no Pipeline at module level"),
        (["shop_policies:retry"], "shop_policies:retry is no Pipeline, but Retry("),
    ],
)
def test_what_is_no_pipeline_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], targets: list[str], words: str
) -> None:
    """Before anything is said about the others."""
    assert main(["advice", *targets]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert words in line
