"""Understand the command line, run the command, and turn what comes of it into an exit status."""

from __future__ import annotations

import math
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import trio
from cyclopts import App, CycloptsError, Parameter

from trio_resilience._cli._advice import run_advice
from trio_resilience._cli._check import SAMPLE, run_check
from trio_resilience._cli._demo import Choice, run_demo
from trio_resilience._cli._faults import ProfileName
from trio_resilience._cli._fetch import Options, run_fetch
from trio_resilience._cli._pages import Setting
from trio_resilience._cli._rate import Rate, parse_rate
from trio_resilience._cli._terminal import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    UsageError,
    complain,
)
from trio_resilience._cli._top import run_top

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import Token

NAME: Final = "python -m trio_resilience"
OUTAGE: Final = 3.0
"""Seconds that the demo's outage takes unless it is told."""


def _version() -> str:
    try:
        return version("trio_resilience")
    except PackageNotFoundError:
        return "not installed"  # run from a source tree


app = App(
    name=NAME,
    help="Fetch many pages at a time from servers that fail now and then.",
    version=_version,
    backend="trio",
    default_parameter=Parameter(negative=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


def _positive(_type: object, value: float | None) -> None:
    if value is not None and not value > 0:  # written this way round so that NaN fails too
        raise ValueError("Must be > 0.")


def _duration(_type: object, value: float | None) -> None:
    # Written this way round so that NaN fails too.
    if value is not None and not 0 <= value < math.inf:
        raise ValueError("Must be >= 0 and finite.")


def _whole(_type: object, tokens: Sequence[Token]) -> int:
    # Left to itself, cyclopts rounds 1.5 to a number that nobody asked for.
    return int(tokens[0].value)


def _rate(_type: object, tokens: Sequence[Token]) -> Rate:
    return parse_rate(tokens[0].value)


Count = Annotated[int, Parameter(converter=_whole, validator=_positive)]
Seconds = Annotated[float, Parameter(validator=_positive)]


@app.command
@app.default
async def demo(
    *,
    requests: Count = 200,
    max_concurrency: Count = 10,
    seed: Annotated[int, Parameter(converter=_whole)] = 1,
    faults: ProfileName = "mild",
    outage: Annotated[float | None, Parameter(validator=_duration)] = None,
    config: Annotated[list[Path] | None, Parameter(consume_multiple=(0, 1))] = None,
    policy: str | None = None,
    json: bool = False,
) -> int:
    """Fetch pages from a server on this machine that misbehaves, with and without the library.

    Then fetch them from a server that goes down midway, with retries and a circuit breaker, and
    with the same retries alone.

    The exit status is 0 if every page was fetched, but for those that the script makes fail for
    ever (in harsh), and never more than max-concurrency requests were in progress at once (hedges
    apart), as the client sees it and as the server does. It is 2 if the configuration can't be
    used: then every mistake in it is told on stderr.

    Parameters
    ----------
    requests
        How many pages.
    max_concurrency
        How many at a time.
    seed
        The same seed brings the same faults.
    faults
        How badly the server behaves. Harsh has pages that fail for ever.
    outage
        For how many seconds the server goes down in the second part: 3 by default. 0 leaves that
        out, and so does, by default, a policy that has no circuit breaker.
    config
        Fetch under a policy of this TOML file, instead of the demo's own; without a name, of the
        sample that comes along. What the policy refuses comes back later, as with the demo's own.
    policy
        Which policy of the configuration: by default demo, or the only one.
    json
        Print the result as JSON.
    """
    choice = _choice(config, policy)
    setting = Setting(requests, max_concurrency, seed, faults, _outage(outage, choice))
    return await run_demo(setting, choice, as_json=json)


def _choice(configs: list[Path] | None, policy: str | None) -> Choice | None:
    if configs is None:
        if policy is not None:
            raise UsageError("--policy needs a --config")
        return None
    if len(configs) > 1:
        raise UsageError("--config is given more than once")
    return Choice.of(configs[0] if configs else SAMPLE, policy)


def _outage(given: float | None, choice: Choice | None) -> float:
    """Return the seconds of the outage, in which a circuit breaker is compared with none."""
    if choice is None or choice.has_breaker:
        return OUTAGE if given is None else given
    if given:
        raise UsageError(f"--outage needs a policy with a breaker, and {choice.shown} has none")
    return 0.0


@app.command
async def fetch(
    *urls: str,
    input: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,  # noqa: A002 - the option's name
    output_dir: Path | None = None,
    max_concurrency: Count = 10,
    timeout: Seconds = 30.0,
    max_attempts: Count = 4,
    rate: Annotated[Rate | None, Parameter(converter=_rate, n_tokens=1, accepts_keys=False)] = None,
    burst: Count | None = None,
    max_per_host: Count | None = None,
) -> int:
    """Fetch URLs, and print a line of JSON for each as soon as it is done.

    A line has the url, the status of the last response, the number of attempts, the seconds from
    the first to the end of the last, the bytes of the body, and the error, or null. What may pass
    is tried again, after as long as the server asks for.

    The exit status is 0 if every URL was fetched, 1 if any failed, 2 if the command or its input
    can't be used, 130 after Ctrl-C (which stops what is under way, and reports what is done), and
    141 if nobody reads the output any more.

    Parameters
    ----------
    urls
        The URLs, http or https.
    input
        A file with a URL on each line, or - for stdin. It is read as fast as it is worked through,
        and may be endless. Empty lines and those that begin with # are skipped.
    output_dir
        Save the bodies here, each under a name of its own, which its line gives as file.
    max_concurrency
        How many at a time.
    timeout
        Seconds for each URL, all attempts and the waits between them included, but not the waits
        for its turn under the rate.
    max_attempts
        How often each URL is tried.
    rate
        How fast requests go out, as 10/s (or just 10), 300/min or 5000/h. Every request counts,
        whatever its host: also each further attempt and each redirect. They are spaced evenly.
    burst
        How many requests may go out at once after a pause, instead of one. Needs a rate.
    max_per_host
        How many at a time of the URLs with the same host and port, as they are given; a redirect
        elsewhere does not count. To find one whose host is free, up to 1000 are read ahead.
    """
    if burst is not None and rate is None:
        raise UsageError("--burst needs a --rate")
    directory = None if output_dir is None else trio.Path(output_dir)
    options = Options(
        max_concurrency=max_concurrency,
        max_attempts=max_attempts,
        timeout=timeout,
        output_dir=directory,
        rate=rate,
        burst=burst or 1,
        max_per_host=max_per_host,
    )
    return await run_fetch(urls, input, options)


@app.command
def advice(*targets: str) -> int:
    """Tell which layers of a program's pipelines are almost surely in the wrong order, and why.

    The exit status is 0 if nothing is odd, 1 if something is, and 2 if a pipeline can't be found.

    Parameters
    ----------
    targets
        Where the pipelines are, such as shop.policies:payments; or a module, for all in it. It is
        imported, from the current directory or from what is installed.
    """
    if not targets:
        raise UsageError("no pipeline is given: name one, such as shop.policies:payments")
    return run_advice(targets)


@app.command
def check(config: Path) -> int:
    """Check a configuration, and show the pipelines that it describes, as a tree of all options.

    The exit status is 0 if nothing is wrong, and 2 otherwise: then every mistake is told on stderr,
    each on a line of its own, with its key path.

    Parameters
    ----------
    config
        A TOML file.
    """
    return run_check(config)


@app.command
async def top(
    path_or_port: Annotated[str, Parameter(allow_leading_hyphen=False)],
    /,
    *,
    interval: Seconds = 2.0,
    once: bool = False,
    json: bool = False,
) -> int:
    """Show what the policies of a running process do: state, rates, latencies, last failures.

    The process has to serve its metrics, with serve_metrics. It is only read. A row is a policy
    with all its operations; the counts are since the process began, the rates since the table
    before. Ctrl-C ends it.

    The exit status is 0, or 1 if the process is gone, or does not answer.

    Parameters
    ----------
    path_or_port
        Where: the path of a Unix socket, or a port of 127.0.0.1.
    interval
        Seconds from one table to the next.
    once
        Print one table, and end.
    json
        Print each snapshot as a line of JSON instead.
    """
    return await run_top(path_or_port, interval=interval, once=once, as_json=json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the *arguments* name (default: the process's own); return its status."""
    status = EXIT_INTERRUPTED
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
    except* KeyboardInterrupt:
        complain("interrupted")
    return status


def _run(arguments: Sequence[str]) -> int:
    try:
        status: int | None = app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        complain(f"{error} (see {NAME} --help)")
        return EXIT_USAGE
    except UsageError as error:
        for line in error.args:
            complain(line)
        return EXIT_USAGE
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    return status or 0  # the help has none
