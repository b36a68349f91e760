"""Whatever a configuration's file holds, it comes to clear errors, soon and in bounded memory."""

from __future__ import annotations

import codecs
import os
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_resilience import ConfigError, Registry
from trio_resilience._config import MAX_NAMES, check_config
from trio_resilience._config_mistakes import MAX_MISTAKES
from trio_resilience._config_schema import LAYERS
from trio_resilience._config_text import MAX_BYTES, MAX_LINE, parse_toml, read_toml

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.watchdog(20)


def errors_of(data: bytes) -> tuple[str, ...]:
    """Return what is said of a file that holds *data*."""
    with pytest.raises(ConfigError) as caught:
        check_config(parse_toml(data, "it.toml"))
    assert caught.value.__cause__ is None
    return caught.value.errors


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"x = 1\nx = 2", "it.toml: is no TOML: "),
        (b"[policies.a]\n[policies.a]", "it.toml: is no TOML: "),
        (b"[policies.a", "it.toml: is no TOML: "),
        (b"x = \xff", "it.toml: line 1 is no UTF-8: invalid start byte"),
        (b"\n\nx = '\xc3'", "it.toml: line 3 is no UTF-8: "),
        (b"x = 1\x00", "it.toml: is no TOML: "),
        (b"x = " + b"9" * 10_000, "it.toml: is no TOML: "),
        (b"x = " + b"[" * 100_000, "it.toml: line 1 nests more than 16 tables"),
        (b"\nx = " + b"{a=" * 100_000, "it.toml: line 2 nests more than 16 tables"),
        (b"a" + b".a" * 300_000 + b" = 1", "it.toml: line 1 nests more than 16 tables"),
        (b"a" + b' . "a"' * 100_000 + b" = 1", "it.toml: line 1 nests more than 16 tables"),
        (b"[a" + b".a" * 300_000 + b"]", "it.toml: line 1 nests more than 16 tables"),
        (b"x = {a" + b".a" * 300_000 + b" = 1}", "it.toml: line 1 nests more than 16 tables"),
        (b'x = "' + b"\\" * 500_001, "it.toml: is no TOML: "),
        (b'x = """' + b'\\"""' * 200_000, "it.toml: is no TOML: "),
        (b"x = '''" + b"''a" * 200_000, "it.toml: is no TOML: "),
        (b'"\n' * 400_000, "it.toml: is no TOML: "),
        (b"[defaults]\ntimeout = nan", "defaults.timeout: `seconds` must be >= 0, got nan"),
        (b"[defaults]\ntimeout = 2020-01-01", "defaults.timeout: `seconds` must be seconds or a"),
        (b"[defaults]\nretry.max_attempts = 1e400", "defaults.retry.max_attempts: `max_attempts`"),
        (b"[defaults]\ntimeout = 0x" + b"f" * 10_000, "it.toml: is no TOML: an integer of 'time"),
        (b"policies.a.bulkhead = 9223372036854775808", "it.toml: is no TOML: an integer of 'bulk"),
        (b"policies.a.layers = [[-9223372036854775809]]", "it.toml: is no TOML: an integer of 'l"),
        (b"policies.0xf = 0b" + b"1" * 900_000, "it.toml: is no TOML: an integer of '0xf' has "),
        (b'"' + b"x" * 900_000 + b'" = 0o' + b"7" * 99, "it.toml: is no TOML: an integer of 'xx"),
        (b"[defaults]\ntimeout = '" + b"9" * 500_000 + b"s'", "defaults.timeout: `seconds` must"),
        (b"[[policies]]", "policies: must be a table, got [{}]"),
        (b"[policies]\n" + b'"' + b"a" * 900_000 + b'" = 1', "policies.'aaaaaaa"),
    ],
    ids=range(28),
)
def test_one_clear_line(data: bytes, expected: str) -> None:
    """Of bounded length, without a traceback of the parser's."""
    (line,) = errors_of(data)
    assert line.startswith(expected)
    assert len(line) < 3 * MAX_LINE
    assert "\n" not in line


def test_dots_in_texts_comments_and_numbers_are_no_tables() -> None:
    """A line of them is in nobody's way."""
    dots = "." * 40 + "[{" * 40
    text = f"""
        # {dots}
        x = ["{dots}", '{dots}', \"""{dots}" \\\""" {dots}\""", '''{dots}' {dots}''']
        y = [{"1.5, " * 40}]
    """
    assert parse_toml(text.encode(), "it.toml")["y"] == [1.5] * 40


def test_the_largest_integers_are_no_mistake() -> None:
    """Those that fit in 64 bits."""
    found = parse_toml(b"x = [9223372036854775807, -9223372036854775808]", "it.toml")
    assert found["x"] == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("data", [b"", b"\n", b"# nothing", b"\xef\xbb\xbf", b"[policies]\r\n"])
def test_a_file_that_says_nothing_describes_nothing(data: bytes) -> None:
    assert check_config(parse_toml(data, "it.toml")).pipelines == {}


def test_a_mark_of_the_encoding_is_no_part_of_the_text() -> None:
    """Editors of Windows write one; a second one is a mistake as any other."""
    text = codecs.BOM_UTF8 + b"[policies.a]\r\ntimeout = 1\r\n"
    assert list(check_config(parse_toml(text, "it.toml")).pipelines) == ["a"]
    (line,) = errors_of(codecs.BOM_UTF8 + text)
    assert line.startswith("it.toml: is no TOML: ")


def test_a_file_of_ten_megabytes_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_bytes(b"# a comment\n" * 900_000)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=f"big.toml: must have at most {MAX_BYTES} bytes"):
            read_toml(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX_BYTES


def test_a_file_may_be_as_large_as_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_bytes(b"#" * MAX_BYTES)
    assert read_toml(path) == {}


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere.toml", "No such file"),
        (".", "no regular file"),
        ("pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        ("loop", "symbolic links"),
        ("x" * 5000, "name too long"),
        ("a\0b", "null"),
        ("\ud800", "surrogates not allowed"),
    ],
    ids=range(8),
)
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, words: str) -> None:
    """Nobody waits for what a pipe may bring, or reads a device that has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for load in (read_toml, Registry.load):
        with pytest.raises(ConfigError, match=f"can't be read: .*{words}") as caught:
            load(tmp_path / name)
        assert len(caught.value.errors) == 1


def test_of_very_many_mistakes_some_are_told() -> None:
    """And how many more there are."""
    lines = b"".join(b"key%d = 1\n" % number for number in range(60_000))
    errors = errors_of(b"[policies.a]\n" + lines)
    assert len(errors) == MAX_MISTAKES + 1
    assert errors[-1] == f"... and {60_000 - MAX_MISTAKES} more"
    errors = errors_of(b"[policies.a.retry]\n" + lines)
    assert errors[-1] == f"... and {60_000 - MAX_MISTAKES} more"


@pytest.mark.parametrize("key", ["policies", "budgets"])
def test_very_many_names_are_refused(key: str) -> None:
    lines = "".join(f"name{number} = {{}}\n" for number in range(MAX_NAMES + 1))
    expected = f"{key}: must have at most {MAX_NAMES} names, got {MAX_NAMES + 1}"
    assert errors_of(f"[{key}]\n{lines}".encode()) == (expected,)


def test_very_many_layers_are_refused() -> None:
    errors = errors_of(b"[defaults]\nlayers = [" + b'"retry",' * 100_000 + b"]")
    assert len(errors) == 1


def test_very_many_names_that_are_almost_known_cost_no_more() -> None:
    """To look for the nearest takes time, so it is looked for where it is told."""
    budgets: dict[str, object] = {f"budget{number}": {} for number in range(MAX_NAMES)}
    retry = {"retry": {"budget": "budgets"}}
    policies = {f"name{number}": retry for number in range(MAX_NAMES)}
    with pytest.raises(ConfigError) as caught:
        check_config({"budgets": budgets, "policies": policies})
    assert len(caught.value.errors) == MAX_MISTAKES + 1


def test_a_value_that_is_deep_is_not_followed() -> None:
    """Also where it comes from a program."""
    deep: Any = {}
    for _ in range(100_000):
        deep = {"retry": deep, "a": [deep]}
    for raw in (
        deep,
        {"policies": deep},
        {"policies": {"a": deep}},
        {"defaults": {"timeout": deep}},
    ):
        with pytest.raises(ConfigError):
            check_config(raw)
    while deep:  # or else to forget it would take as deep a stack
        deep = deep["retry"]


TOP = ["defaults", "policies", "budgets"]
WORDS = [*TOP, "layers", *LAYERS, "backoff", "kind", "after", "budget", "rate", "per", "seconds"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([*WORDS, "10/s", "1s"]),
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=3), st.integers())
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(KEYS, inner)), max_leaves=10
)


def complaints(check: Callable[[], object]) -> tuple[str, ...]:
    """Return what is wrong, if anything."""
    try:
        check()
    except ConfigError as error:
        return error.errors
    return ()


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(TOP), st.dictionaries(KEYS, ANYTHING)))
def test_anything_is_a_configuration_or_a_config_error(raw: object) -> None:
    """And nothing else comes out."""
    assert all(line and "\n" not in line for line in complaints(lambda: check_config(raw)))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(), st.text(alphabet="[]{}.=,\"'\\#\n a1").map(str.encode)))
def test_any_bytes_are_toml_or_a_config_error(data: bytes) -> None:
    """Of one line."""
    assert len(complaints(lambda: parse_toml(data, "it.toml"))) <= 1
