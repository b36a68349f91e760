"""The demo: fetch pages from a server that misbehaves, and from one that goes down."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from trio_resilience import run_with_limit
from trio_resilience._cli._faults import FaultPlan
from trio_resilience._cli._outage import OutageComparison, OutageReport
from trio_resilience._cli._pages import Run, make_breaker, make_policy
from trio_resilience._cli._report import comparison, headline, overloads, problems
from trio_resilience._cli._server import FaultServer
from trio_resilience._cli._terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    cancel_on_interrupt,
    complain,
    progress_bar,
    render,
    write_stdout,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType
    from rich.progress import Progress

    from trio_resilience import CircuitBreaker
    from trio_resilience._cli._pages import Setting
    from trio_resilience._cli._report import RunReport

PROBLEMS_SHOWN: Final = 5
"""The rest are in the JSON."""


@final
@attrs.frozen
class Comparison:
    """All runs, and what is wrong with them."""

    setting: Setting
    resilient: RunReport
    plain: RunReport
    outage: OutageComparison | None

    @property
    def problems(self) -> list[str]:
        """Return why the demo has failed; nothing, if it has not."""
        most = self.setting.max_concurrency
        found = problems(self.resilient, self.setting.scripted_failures, most)
        found += overloads(self.plain, most)
        return found if self.outage is None else found + self.outage.problems(most)

    def as_json(self) -> str:
        """Return everything as one JSON object."""
        document = {
            **attrs.asdict(self.setting, filter=attrs.filters.exclude("outage")),
            "scripted_failures": self.setting.scripted_failures,
            "ok": not self.problems,
            "problems": self.problems,
            "with": self.resilient.as_dict(),
            "without": self.plain.as_dict(),
            "outage": None if self.outage is None else self.outage.as_dict(),
        }
        return json.dumps(document, indent=2) + "\n"

    def as_text(self) -> str:
        """Return the tables, and the results in words."""
        scripted = len(self.setting.scripted_failures)
        expected = f" ({scripted} fail by script, whatever is done)" if scripted else ""
        parts: list[RenderableType] = [comparison(self.resilient, self.plain)]
        if self.outage is not None:
            parts += [self.outage.table, *self.outage.headlines]
        parts += [headline("with", self.resilient) + expected, headline("without", self.plain)]
        return render(*parts)


async def run_demo(setting: Setting, *, as_json: bool) -> int:
    """Run everything, print the comparison, and return the exit status."""
    done: list[Comparison] = []
    async with trio.open_nursery() as watch:
        await watch.start(cancel_on_interrupt, watch.cancel_scope)
        with progress_bar() as progress:
            done.append(await _compare(setting, progress))
        watch.cancel_scope.cancel()
    if not done:
        complain("interrupted")
        return EXIT_INTERRUPTED
    (result,) = done
    write_stdout(result.as_json() if as_json else result.as_text())
    for problem in result.problems[:PROBLEMS_SHOWN]:
        complain(problem)
    return EXIT_FAILED if result.problems else 0


async def _compare(setting: Setting, progress: Progress) -> Comparison:
    policy = make_policy(setting.max_concurrency, make_breaker())
    resilient = Run(setting, FaultServer(setting.plan), policy, _bar(progress, "with", setting))
    plain = Run(setting, FaultServer(setting.plan), None, _bar(progress, "without", setting))
    # One after the other, or each would add to the other's latencies.
    return Comparison(
        setting,
        await resilient(),
        await plain(),
        await _compare_in_outage(setting, progress) if setting.outage else None,
    )


async def _compare_in_outage(setting: Setting, progress: Progress) -> OutageComparison:
    # Side by side, since both spend their time waiting.
    runs = [
        partial(_run_in_outage, setting, make_breaker(), _bar(progress, "outage, with", setting)),
        partial(_run_in_outage, setting, None, _bar(progress, "outage, without", setting)),
    ]
    return OutageComparison(*await run_with_limit(None, runs, max_concurrency=len(runs)))


async def _run_in_outage(
    setting: Setting, breaker: CircuitBreaker | None, advance: Callable[[], object]
) -> OutageReport:
    """Fetch from a server whose only fault is that it goes down."""
    outage = setting.make_outage()
    server = FaultServer(FaultPlan("none", setting.seed), outage)
    run = Run(setting, server, make_policy(setting.max_concurrency, breaker), advance)
    report = await run()
    assert outage.began_at is not None  # half of the pages are enough for that
    return OutageReport(
        run=report,
        received=outage.received,
        began=outage.began_at - run.started_at,
        seconds=outage.seconds,
    )


def _bar(progress: Progress, name: str, setting: Setting) -> Callable[[], None]:
    """Add a bar for a run; return what moves it on by one."""
    bar = progress.add_task(name, total=setting.requests, note="")
    return partial(progress.advance, bar)
