"""Policies by name, from one configuration that may change while the program runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, Self, TypeAlias, TypeVar, TypeVarTuple, cast, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._checks import seconds
from trio_resilience._config import Config, LayerConfig, PipelineConfig, check_config
from trio_resilience._config_mistakes import shown_path, suggestion
from trio_resilience._config_text import read_toml
from trio_resilience._engine._block import Block
from trio_resilience._engine._join import check_nursery, leaves_of
from trio_resilience._engine._policy import LivePolicy, Policy
from trio_resilience._engine._report import report
from trio_resilience._errors import ConfigError
from trio_resilience._events import ConfigReloaded, ConfigReloadFailed
from trio_resilience._pipeline import Pipeline, PipelineStatistics
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Stamp: TypeAlias = tuple[int, ...] | None
"""What tells one version of a file from another; ``None`` if there is none."""


@final
@record
class RegistryStatistics(Record):
    """How the policies of a `Registry` stand, and how its reloads went."""

    policies: Mapping[str, PipelineStatistics]
    reloads: int
    """Those that succeeded."""
    failed_reloads: int
    last_error: ConfigError | None
    """Of the last reload, if it failed."""


@final
@attrs.define(eq=False, repr=False)
class RegisteredPolicy(LivePolicy[Never]):
    """A named pipeline of a `Registry`, whatever that is at the time of a call.

    It may decorate functions when modules are imported. A call that is under way when the
    configuration is reloaded ends under the pipeline that it began with.
    """

    name: str
    _pipeline: Pipeline[Never]

    @property
    def pipeline(self) -> Pipeline[Never]:
        """The pipeline that calls run under now; after a reload, maybe another."""
        return self._pipeline

    @property
    def is_idle(self) -> bool:
        """Whether all layers are."""
        return self._pipeline.is_idle

    @property
    def is_disposable(self) -> bool:
        """Whether all layers are."""
        return self._pipeline.is_disposable

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)``, run under the pipeline of this moment."""
        return await self._pipeline.call(fn, *args, name=name)

    def statistics(self) -> PipelineStatistics:
        """Return the statistics of each layer."""
        return self._pipeline.statistics()

    def __repr__(self) -> str:
        return f"<policy {self.name!r}: {self._pipeline!r}>"


@final
@attrs.frozen(eq=False)
class _Built:
    """What a configuration describes, made."""

    config: Config
    budgets: Mapping[str, RetryBudget]
    pipelines: Mapping[str, Pipeline[Never]]

    @classmethod
    def of(cls, config: Config, old: _Built | None) -> Self:
        """Make all of it, but for what is there already and is to be the same."""
        budgets = {name: _budget(name, given, old) for name, given in config.budgets.items()}
        pipelines = {name: _pipeline(each, budgets, old) for name, each in config.pipelines.items()}
        return cls(config, budgets, pipelines)

    def layers_of(self, name: str) -> dict[str, tuple[LayerConfig, Policy[Never]]]:
        config = self.config.pipelines.get(name)
        if config is None or config.policy is not None:
            return {}
        made = zip(config.layers, self.pipelines[name].layers, strict=True)
        return {layer.kind: (layer, policy) for layer, policy in made}

    def uses_same_budget(self, layer: LayerConfig, budgets: Mapping[str, RetryBudget]) -> bool:
        name = layer.options.get("budget")
        return not isinstance(name, str) or self.budgets.get(name) is budgets[name]


def _budget(
    name: str, given: Mapping[str, object] | RetryBudget, old: _Built | None
) -> RetryBudget:
    if isinstance(given, RetryBudget):
        return given
    if old is not None and old.config.budgets.get(name) == given:
        return old.budgets[name]
    return RetryBudget(**cast("dict[str, Any]", given))


def _pipeline(
    config: PipelineConfig, budgets: Mapping[str, RetryBudget], old: _Built | None
) -> Pipeline[Never]:
    if isinstance(config.policy, Pipeline):
        return config.policy
    before = None if old is None else old.pipelines.get(config.name)
    if config.policy is not None:
        layers = [config.policy]
    else:
        layers = [_layer(layer, config.name, budgets, old) for layer in config.layers]
    is_same = before is not None and tuple(map(id, before.layers)) == tuple(map(id, layers))
    return before if before is not None and is_same else Pipeline(*layers, name=config.name)


def _layer(
    layer: LayerConfig, name: str, budgets: Mapping[str, RetryBudget], old: _Built | None
) -> Policy[Never]:
    if old is not None:
        config, policy = old.layers_of(name).get(layer.kind, (None, None))
        if policy is not None and config == layer and old.uses_same_budget(layer, budgets):
            return policy
    return layer.make(name, budgets)


@final
class Registry:
    """The policies of a program by their names; made by `load`.

    Each name has one pipeline, which all that ask for it share. A circuit, a bulkhead, a rate limit
    or a budget whose settings a reload leaves as they were is the same as before, with its state.
    One whose settings have changed is a new one, beside which the calls that are under way end
    under the old.

    Example::

        policies = Registry.load("resilience.toml", require=["payments"])


        @policies["payments"]
        async def pay(order: Order) -> Receipt: ...


        async with trio.open_nursery() as nursery, policies.open(nursery, watch=5):
            ...
    """

    def __init__(self, source: object, require: Iterable[str], name: str) -> None:
        self.name = name
        self._source = source
        self._required = tuple(require)
        self._defined: dict[str, object] = {}
        self._handles: dict[str, RegisteredPolicy] = {}
        self._looks = self._reloads = self._failed_reloads = 0
        self._last_error: ConfigError | None = None
        self._stamp = _stamp_of(source)
        self._raw = _read(source)
        self._built = _Built.of(check_config(self._raw, required=self._required), None)

    @classmethod
    def load(
        cls, source: object, *, require: Iterable[str] = (), name: str = "registry"
    ) -> Registry:
        """Return the policies that *source* describes; at module level, outside a run, too.

        Args:
            source: the path of a TOML file; or a mapping of the same shape, in which a policy may
                stand for a whole table; or an attrs object whose fields are the keys.
            require: names that must be there.
            name: label of the registry in events.

        Raises:
            ConfigError: something is wrong. Its ``.errors`` has every mistake, each with its key
                path.
            ModuleNotFoundError: cattrs is missing, which the extra ``config`` installs.
        """
        names: Any = None if isinstance(require, str) else list(require)
        if names is None or not all(isinstance(each, str) for each in names):
            raise TypeError(f"`require` must be a list of names, got {require!r}")
        return Registry(source, names, name)

    # --- the policies -----------------------------------------------------------------------------

    def __getitem__(self, name: str) -> RegisteredPolicy:
        """Return the policy of that name, which stays valid when the configuration is reloaded.

        From then on, a reload that has no such name is refused.
        """
        if name not in self._handles:
            if name not in self._built.pipelines:
                near = suggestion(str(name), self._built.pipelines)
                raise KeyError(f"no policy has the name {name!r}{near}")
            self._handles[name] = RegisteredPolicy(name, self._built.pipelines[name])
        return self._handles[name]

    @property
    def config(self) -> Config:
        """What the configuration came to, with every default filled in."""
        return self._built.config

    def __contains__(self, name: object) -> bool:
        return name in self._built.pipelines

    def __iter__(self) -> Iterator[str]:
        return iter(self._built.pipelines)

    def __len__(self) -> int:
        return len(self._built.pipelines)

    def define(self, name: str, settings: object) -> RegisteredPolicy:
        """Return the policy *name*, made as *settings* say, over the defaults, unless it is there.

        For what a module brings along itself. It stays over reloads.

        Args:
            name: of the policy.
            settings: what a table of that name would say, or a policy.

        Raises:
            ConfigError: something is wrong with them; or the name is there, with other settings.
        """
        defined = {**self._defined, name: settings}
        config = check_config(self._raw, defined=defined)
        if config.pipelines[name] != self._built.config.pipelines.get(name, config.pipelines[name]):
            path = shown_path(("policies", name))
            raise ConfigError([f"{path}: is defined already, with other settings"])
        self._defined = defined
        self._swap(config, self._raw)
        return self[name]

    # --- the configuration ------------------------------------------------------------------------

    def reload(self, source: object = None) -> tuple[str, ...]:
        """Read the configuration again, or another, and return the names whose policies changed.

        All is made before any of it is used. Calls that are under way are not disturbed.

        Raises:
            ConfigError: something is wrong; all policies are as before.
        """
        self._looks += 1
        source = self._source if source is None else source
        stamp = _stamp_of(source)
        # Also when it fails: to look at the same mistakes again is of no use.
        self._stamp = stamp if source is self._source else self._stamp
        try:
            raw = _read(source)
            changed = self._install(raw)
        except ConfigError as error:
            self._tell_failure(error)
            raise
        self._source, self._stamp = source, stamp
        return changed

    def open(
        self, nursery: trio.Nursery | None, *, watch: float | timedelta | None = None
    ) -> AbstractAsyncContextManager[Registry]:
        """Run what lives in the background, in *nursery*, for the time of an ``async with`` block.

        That is to watch the configuration's file: every *watch* seconds, it is looked at, and read
        again if it has changed. What is wrong with it then is told by a `ConfigReloadFailed`, and
        the policies stay as they are. When the block has ended, so has all of this.

        Args:
            nursery: where the task lives; ``None`` opens one for the block.
            watch: seconds, a number or a `datetime.timedelta`; ``None``: the file is not watched.

        Raises:
            ValueError: there is no file to watch.
        """
        check_nursery(nursery)
        if watch is None:
            return _Open(self, Block("Registry.open", nursery), None)
        if _path_of(self._source) is None:
            raise ValueError("`watch` must be None where the configuration comes from no file")
        every = seconds("watch", watch, finite=True, exclusive=True)
        return _Open(self, Block("Registry.open", nursery), every)

    def statistics(self) -> RegistryStatistics:
        """Return how each policy stands, and how the reloads went."""
        return RegistryStatistics(
            {name: each.statistics() for name, each in self._built.pipelines.items()},
            self._reloads,
            self._failed_reloads,
            self._last_error,
        )

    def __repr__(self) -> str:
        return f"<registry {self.name!r}: {', '.join(self._built.pipelines) or 'no policies'}>"

    # --- how it is kept up to date ----------------------------------------------------------------

    # Ctrl-C is for the program, and not to end with this task what nobody waits for.
    @enable_ki_protection
    async def _watch(self, every: float) -> None:
        while True:
            await trio.sleep(every)
            await self._look()

    async def _look(self) -> None:
        """Reload the file if it is another than at the last look."""
        source = self._source
        path = _path_of(source)
        stamp = await trio.to_thread.run_sync(_stamp_of, source, abandon_on_cancel=True)
        # There is no path if a reload has brought another kind of source.
        if path is None or stamp == self._stamp or source is not self._source:
            return
        # Noted before it is read: what changes after that is found at the next look.
        self._stamp = stamp
        self._looks = look = self._looks + 1
        try:
            raw = await trio.to_thread.run_sync(read_toml, path, abandon_on_cancel=True)
            # Meanwhile somebody may have reloaded what is newer.
            if look == self._looks:
                self._install(raw)
        except ConfigError as error:
            if look == self._looks:
                self._tell_failure(error)

    def _install(self, raw: object) -> tuple[str, ...]:
        required = dict.fromkeys([*self._required, *self._handles])
        config = check_config(raw, required=required, defined=self._defined)
        changed = self._swap(config, raw)
        self._last_error = None
        self._reloads += 1
        if trio.lowlevel.in_trio_task():
            report(ConfigReloaded, policy=self.name, operation="reload", changed=changed)
        return changed

    def _tell_failure(self, error: ConfigError) -> None:
        self._failed_reloads += 1
        self._last_error = error
        if trio.lowlevel.in_trio_task():
            report(ConfigReloadFailed, policy=self.name, operation="reload", error=error)

    @enable_ki_protection
    def _swap(self, config: Config, raw: object) -> tuple[str, ...]:
        old, new = self._built, _Built.of(config, self._built)
        names = dict.fromkeys([*old.pipelines, *new.pipelines])
        self._built, self._raw = new, raw
        for name, handle in self._handles.items():
            handle._pipeline = new.pipelines[name]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return tuple(
            name for name in names if old.pipelines.get(name) is not new.pipelines.get(name)
        )


@final
@attrs.define(eq=False, repr=False)
class _Open:
    """The block of `Registry.open`."""

    registry: Registry
    block: Block
    every: float | None

    @enable_ki_protection
    async def __aenter__(self) -> Registry:
        await self.block.prepare()
        await self.block.begin(self._run, lambda: None, f"registry {self.registry.name}")
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self.registry

    async def _run(self) -> None:
        if self.every is not None:
            await self.registry._watch(self.every)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        await trio.sleep_forever()

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block = self.block
        block.is_open = False
        block.job.scope.cancel()
        await block.join()  # noqa: ASYNC102 - a cancellation is passed on, and waits
        failure, block.job.error = block.job.error, None
        if failure is not None and not isinstance(failure, Exception):
            failure = BaseExceptionGroup("a listener stopped the watch", leaves_of(failure))
        try:
            block.settle(failure, exc)
        finally:
            del failure, exc


def _path_of(source: object) -> Path | None:
    path: Any = source
    return Path(path) if isinstance(source, (str, os.PathLike)) else None


def _read(source: object) -> object:
    path = _path_of(source)
    return source if path is None else read_toml(path)


def _stamp_of(source: object) -> Stamp:
    path = _path_of(source)
    if path is None:
        return None
    try:
        now = path.stat()
    except (OSError, ValueError):
        return None  # to read it will tell why
    return now.st_mtime_ns, now.st_size, now.st_ino
