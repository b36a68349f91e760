"""The demo: fetch pages from a server that misbehaves, and from one that goes down."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Never, Self, final

import attrs
import trio
from rich.text import Text

from trio_resilience import CircuitBreaker, Hedge, run_with_limit
from trio_resilience._cli._check import mistakes_told
from trio_resilience._cli._faults import FaultPlan
from trio_resilience._cli._outage import OutageComparison, OutageReport
from trio_resilience._cli._pages import Run, make_breaker, make_policy, with_patience
from trio_resilience._cli._report import comparison, headline, overloads, problems
from trio_resilience._cli._server import FaultServer
from trio_resilience._cli._terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    UsageError,
    cancel_on_interrupt,
    complain,
    progress_bar,
    render,
    write_stdout,
)
from trio_resilience._config_mistakes import short, shown_path
from trio_resilience._config_text import read_toml
from trio_resilience._registry import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from pathlib import Path

    from rich.console import RenderableType
    from rich.progress import Progress

    from trio_resilience import Policy
    from trio_resilience._cli._pages import Setting
    from trio_resilience._cli._report import RunReport

PROBLEMS_SHOWN: Final = 5
"""The rest are in the JSON."""
DEFAULT_POLICY: Final = "demo"
"""What a configuration's policy is called that the demo runs under unless it is told."""


@final
@attrs.frozen
class Choice:
    """The policy of a configuration that pages are fetched under, in the place of the demo's."""

    path: Path
    name: str
    _raw: Mapping[str, object]
    """What the file said when it was read: the same for all runs."""
    _layers: Mapping[str, Policy[Never]]
    """By their kinds, the outermost first."""

    @classmethod
    def of(cls, path: Path, name: str | None) -> Self:
        """Choose the policy *name* of the file at *path*: by default "demo", or the only one."""
        with mistakes_told():
            raw = read_toml(path)
            registry = Registry.load(raw)
        chosen = _chosen(list(registry), name, path)
        kinds = [layer.kind for layer in registry.config.pipelines[chosen].layers]
        layers = dict(zip(kinds, registry[chosen].pipeline.layers, strict=True))
        return cls(path, chosen, raw, layers)

    @property
    def shown(self) -> str:
        """The name, as the file has it."""
        return shown_path((self.name,))

    @property
    def has_breaker(self) -> bool:
        """Whether there is a circuit that can open."""
        return "breaker" in self._layers

    @property
    def legs(self) -> int:
        """How many requests for a page may be in progress at once."""
        hedge = self._layers.get("hedge")
        return 1 + hedge.max_hedges if isinstance(hedge, Hedge) else 1

    def as_dict(self) -> dict[str, Any]:
        """Return what was chosen as what JSON can hold."""
        return {"config": str(self.path), "name": self.name, "layers": list(self._layers)}

    def as_text(self) -> Text:
        """Return what was chosen as a line."""
        return Text(f"policy {self.shown} of {self.path}: {', '.join(self._layers)}")

    @asynccontextmanager
    async def open(self, *, guarded: bool) -> AsyncGenerator[Policy[Never]]:
        """Open a registry of its own, so that no run sees the circuits or the limits of another.

        If the run is not to be *guarded*, the policy is without its circuit breaker.
        """
        async with Registry.load(self._raw).open(None) as registry:
            policy = registry[self.name]
            layers = policy.pipeline.layers
            others = [layer for layer in layers if not isinstance(layer, CircuitBreaker)]
            yield with_patience(policy) if guarded else with_patience(*others)


def _chosen(names: list[str], wanted: str | None, path: Path) -> str:
    default = names[0] if len(names) == 1 else DEFAULT_POLICY
    name = default if wanted is None else wanted
    if name in names:
        return name
    if not names:
        raise UsageError(f"{path}: has no policies")
    known = ", ".join(shown_path((each,)) for each in names)
    if wanted is None:
        raise UsageError(f"{path}: choose one of its policies with --policy: {known}")
    raise UsageError(f"{path}: no policy has the name {short(wanted)}; there are {known}")


@final
@attrs.frozen
class Comparison:
    """All runs, and what is wrong with them."""

    setting: Setting
    choice: Choice | None
    resilient: RunReport
    plain: RunReport
    outage: OutageComparison | None

    @property
    def problems(self) -> list[str]:
        """Return why the demo has failed; nothing, if it has not."""
        one_each = self.setting.max_concurrency
        most = one_each if self.choice is None else one_each * self.choice.legs
        found = problems(self.resilient, self.setting.scripted_failures, most)
        found += overloads(self.plain, one_each)
        return found if self.outage is None else found + self.outage.problems(most)

    def as_json(self) -> str:
        """Return everything as one JSON object."""
        document = {
            **attrs.asdict(self.setting, filter=attrs.filters.exclude("outage")),
            "policy": None if self.choice is None else self.choice.as_dict(),
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
        parts: list[RenderableType] = [] if self.choice is None else [self.choice.as_text()]
        parts.append(comparison(self.resilient, self.plain))
        if self.outage is not None:
            parts += [self.outage.table, *self.outage.headlines]
        parts += [headline("with", self.resilient) + expected, headline("without", self.plain)]
        return render(*parts)


async def run_demo(setting: Setting, choice: Choice | None = None, *, as_json: bool) -> int:
    """Run everything, print the comparison, and return the exit status."""
    done: list[Comparison] = []
    async with trio.open_nursery() as watch:
        await watch.start(cancel_on_interrupt, watch.cancel_scope)
        with progress_bar() as progress:
            done.append(await _Demo(setting, choice, progress).compare())
        watch.cancel_scope.cancel()
    if not done:
        complain("interrupted")
        return EXIT_INTERRUPTED
    (result,) = done
    write_stdout(result.as_json() if as_json else result.as_text())
    for problem in result.problems[:PROBLEMS_SHOWN]:
        complain(problem)
    return EXIT_FAILED if result.problems else 0


@final
@attrs.frozen
class _Demo:
    """All runs, one after the other."""

    setting: Setting
    choice: Choice | None
    progress: Progress

    async def compare(self) -> Comparison:
        # One after the other, or each would add to the other's latencies.
        return Comparison(
            self.setting,
            self.choice,
            await self._run_guarded(),
            await Run(self.setting, FaultServer(self.setting.plan), None, self._bar("without"))(),
            await self._compare_in_outage() if self.setting.outage else None,
        )

    async def _run_guarded(self) -> RunReport:
        server = FaultServer(self.setting.plan)
        async with self._policy(guarded=True) as policy:
            return await Run(self.setting, server, policy, self._bar("with"))()

    async def _compare_in_outage(self) -> OutageComparison:
        # Side by side, since both spend their time waiting.
        runs = [
            partial(self._run_in_outage, "outage, with", guarded=True),
            partial(self._run_in_outage, "outage, without", guarded=False),
        ]
        return OutageComparison(*await run_with_limit(None, runs, max_concurrency=len(runs)))

    async def _run_in_outage(self, name: str, *, guarded: bool) -> OutageReport:
        """Fetch from a server whose only fault is that it goes down."""
        outage = self.setting.make_outage()
        server = FaultServer(FaultPlan("none", self.setting.seed), outage)
        async with self._policy(guarded=guarded) as policy:
            run = Run(self.setting, server, policy, self._bar(name))
            report = await run()
        assert outage.began_at is not None  # half of the pages are enough for that
        return OutageReport(
            run=report,
            received=outage.received,
            began=outage.began_at - run.started_at,
            seconds=outage.seconds,
        )

    def _policy(self, *, guarded: bool) -> AbstractAsyncContextManager[Policy[Never]]:
        if self.choice is not None:
            return self.choice.open(guarded=guarded)
        breaker = make_breaker() if guarded else None
        return nullcontext(make_policy(self.setting.max_concurrency, breaker))

    def _bar(self, name: str) -> Callable[[], None]:
        """Add a bar for a run; return what moves it on by one."""
        bar = self.progress.add_task(name, total=self.setting.requests, note="")
        return partial(self.progress.advance, bar)
