"""README.md does what it says: its examples run, and print what is shown below them.

All examples share one namespace, as they would in one session. An example may be a whole program
that calls `trio.run`, or a few lines with `await`. They run on the virtual clock, so none of them
takes time. A `text` or `output` block that follows an example, with nothing but words between, is
what it prints.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import tomllib
from functools import partial
from pathlib import Path

import pytest
import trio
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser
from trio.testing import MockClock

README = Path(__file__).parent.parent / "README.md"


def evaluate_example(example: Example) -> None:
    """Run it, and keep what it prints for the block that shows it."""
    # The line numbers in a traceback are README.md's own.
    source = "\n" * (example.line + example.parsed.line_offset) + example.parsed
    code = compile(source, example.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pending = eval(code, example.namespace)  # noqa: S307 - it is our own README
        if inspect.iscoroutine(pending):
            trio.run(_await, pending)
    example.namespace["__printed__"] = printed.getvalue()


async def _await(pending: object) -> None:
    assert inspect.isawaitable(pending)
    await pending


def evaluate_output(example: Example) -> None:
    """Compare it with what the example above it printed, if that is what it shows."""
    fences = re.findall(r"^```(\w+)", example.document.text[: example.region.start], re.MULTILINE)
    if fences and fences[-1] == "python":
        assert example.parsed.rstrip() == example.namespace["__printed__"].rstrip()


def examples() -> list[Example]:
    """Return the examples of README.md in their order."""
    python = CodeBlockParser("python", evaluate_example)
    outputs = [CodeBlockParser(language, evaluate_output) for language in ("text", "output")]
    document = Document.parse(str(README), python, *outputs)
    document.namespace["__name__"] = "__main__"
    return list(document)


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every `trio.run` in an example jump over the time that it would sleep."""
    clock = MockClock(autojump_threshold=0)
    monkeypatch.setattr(trio, "run", partial(trio.run, clock=clock))


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"line {example.line}")
def test_the_example_does_what_the_readme_says(example: Example) -> None:
    """It runs without a warning, and prints what is shown."""
    example.evaluate()


def test_every_extra_is_named() -> None:
    """With what it is for; and no other."""
    project = tomllib.loads(README.with_name("pyproject.toml").read_text())["project"]
    section = README.read_text().split("### Extras")[1].split("\n#")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(project["optional-dependencies"])


def test_every_link_within_leads_to_a_section() -> None:
    text = README.read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert links
    assert set(links) <= anchors
