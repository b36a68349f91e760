"""Ask whether the services work that a program depends on, and say so in one report."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final, TypeAlias, cast, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._algorithms._breaker import CLOSED
from trio_resilience._checks import (
    NotAnOperationError,
    flag,
    operation,
    seconds,
    shown,
)
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._engine._circuit import failure_of
from trio_resilience._engine._deadline import Limit
from trio_resilience._engine._driver import awaitable
from trio_resilience._engine._report import report as tell
from trio_resilience._errors import (
    CallAbandonedError,
    CircuitOpenError,
    FailureRecord,
    OperationTimeoutError,
    ProbeFailedError,
)
from trio_resilience._events import (
    CircuitState,
    HealthChecked,
    HealthStatus,
    TimedOut,
)
from trio_resilience._records import Record, record
from trio_resilience._retry import Retry

HEALTHY: Final = HealthStatus.HEALTHY
DEGRADED: Final = HealthStatus.DEGRADED
UNHEALTHY: Final = HealthStatus.UNHEALTHY

Probe: TypeAlias = Callable[[], Awaitable[object]]


# --- what is reported ---------------------------------------------------------------------------


@final
@record
class ServiceHealth(Record):
    """What a `HealthCheck` has found."""

    status: HealthStatus
    critical: bool
    response_time: float
    """Seconds that it took, all attempts and the waits between them included."""
    attempts: int
    """How often the probe was called: not at all if the circuit refused that."""
    error: FailureRecord | None
    """What the probe raised last, or why it was not called; ``None`` if it succeeded."""
    circuit: CircuitState | None = None
    """The state in which this has left the service's circuit, if it has one."""

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON knows; the keys are always the same."""
        error = self.error
        return {
            "status": self.status.value,
            "critical": self.critical,
            "response_time": self.response_time,
            "attempts": self.attempts,
            "error": error and {"type": error.type_name, "message": error.message},
            "circuit": self.circuit and self.circuit.value,
        }


@final
@record
class HealthReport(Record):
    """How all services do that were checked together, and each of them."""

    status: HealthStatus
    services: Mapping[str, ServiceHealth]
    time: float
    """When it was complete, in seconds of trio's clock."""
    is_stale: bool = False
    """Whether it is too old to rely on, and therefore unhealthy: see `HealthMonitor`."""

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong, not even with a service that is not critical."""
        return self.status is HEALTHY

    @property
    def http_status(self) -> int:
        """200, also if it is degraded, for load balancers and orchestrators; 503 if unhealthy."""
        return 503 if self.status is UNHEALTHY else 200

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON knows; the keys are always the same.

        What probes have raised is quoted in it, which may be nothing for strangers.
        """
        return {
            "status": self.status.value,
            "is_stale": self.is_stale,
            "time": self.time,
            "services": {name: found.as_dict() for name, found in self.services.items()},
        }


def status_of_service(
    failure: FailureRecord | None, circuit: CircuitState | None, *, is_refused: bool
) -> HealthStatus:
    """Return what the outcome of a probe, and the *circuit* that refuses others, come to.

    A circuit that is half open counts as well: it refuses most calls until it has proven itself.
    """
    if failure is not None and not is_refused:
        return UNHEALTHY
    is_whole = failure is None and circuit in {None, CLOSED}
    return HEALTHY if is_whole else DEGRADED


def status_of_all(services: Mapping[str, ServiceHealth]) -> HealthStatus:
    """Return the one status of all: unhealthy only if a critical one is."""
    if any(found.critical and found.status is UNHEALTHY for found in services.values()):
        return UNHEALTHY
    is_whole = all(found.status is HEALTHY for found in services.values())
    return HEALTHY if is_whole else DEGRADED


# --- what is checked ----------------------------------------------------------------------------


def _probe(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    operation("probe", value)


def _critical(value: bool) -> bool:  # noqa: FBT001 - a converter is given the value
    return flag("critical", value)


def _timeout(value: float | timedelta) -> float:
    return seconds("timeout", value, finite=True, exclusive=True)


def _optional(kind: type[object]) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"`{attribute.name}` must be a {kind.__name__} or None, got {shown(value)}"
            )

    return check


@final
@attrs.frozen(eq=False)
class HealthCheck:
    """How to find out whether a service works, and how much depends on it.

    Args:
        probe: an async function without arguments. The service fails if it raises an `Exception`,
            or returns ``False``; any other result, ``None`` too, says that it works.
        critical: whether the program is of no use without the service: then all is unhealthy if it
            fails, and otherwise only degraded.
        timeout: seconds, or a `datetime.timedelta`, for all attempts together. A probe that hangs
            is cancelled then. (One that shields itself from that is waited for.)
        retry: try again under this policy before the service counts as failed.
        breaker: the circuit breaker that calls of the service go through. The check is one of
            them, all its attempts together: it is judged as any other, it is the probe of an open
            circuit when that is due, and it may be refused. Then the probe is not called, and the
            service is degraded, as it is while the circuit refuses the calls of others. A circuit
            that only watches changes nothing.

    Example::

        HealthCheck(ping, timeout=2, retry=Retry(max_attempts=2), breaker=payments)
    """

    probe: Probe = attrs.field(validator=_probe, repr=shown)
    critical: bool = attrs.field(default=True, kw_only=True, converter=_critical)
    timeout: float = attrs.field(default=5.0, kw_only=True, converter=_timeout)
    retry: Retry | None = attrs.field(default=None, kw_only=True, validator=_optional(Retry))
    breaker: CircuitBreaker | None = attrs.field(
        default=None, kw_only=True, validator=_optional(CircuitBreaker)
    )


def checked_services(checks: object) -> Mapping[str, HealthCheck]:
    """Return a copy of *checks*, which nobody changes, if it has a check for each name."""
    if not isinstance(checks, Mapping):
        raise TypeError(f"`checks` must be a mapping of names to health checks, got {checks!r}")
    given = dict(cast("Mapping[str, HealthCheck]", checks))
    for service, check in cast("dict[object, object]", given).items():
        if not isinstance(service, str):
            raise TypeError(f"`checks` must have names for keys, got {service!r}")
        if not isinstance(check, HealthCheck):
            raise TypeError(
                f"`checks[{service!r}]` must be a HealthCheck, got {shown(check)}: write"
                " HealthCheck(probe)"
            )
    return MappingProxyType(given)


async def check_health(checks: Mapping[str, HealthCheck], *, name: str = "health") -> HealthReport:
    """Check all services side by side, and report on each of them; a checkpoint.

    It takes no longer than the longest of the timeouts. A probe that fails, or hangs, is reported,
    and takes nothing from the others. Each runs in a task of its own, and all have ended when this
    returns or raises.

    All together are unhealthy if a critical service is, and degraded if any other is, or if any is
    degraded because its circuit refuses calls. Without services, all is healthy.

    Args:
        checks: a `HealthCheck` for each service, by the name of the service.
        name: label in events and of tasks; the operation in events is the service.

    Raises:
        BaseExceptionGroup: a probe raised something that is not an `Exception`, which has stopped
            the others.

    Example::

        report = await check_health(
            {
                "database": HealthCheck(ping_database, timeout=2),
                "cache": HealthCheck(ping_cache, critical=False),
            }
        )
        print(report.status, report.services["cache"].error)
    """
    checked = checked_services(checks)
    await trio.lowlevel.checkpoint_if_cancelled()
    return await _Round(name, checked).make()


@final
@attrs.define(eq=False, repr=False)
class _Round:
    """Checks that are made side by side."""

    name: str
    checks: Mapping[str, HealthCheck]
    _found: dict[str, ServiceHealth] = attrs.field(factory=dict[str, ServiceHealth], init=False)
    _mistake: NotAnOperationError | None = attrs.field(default=None, init=False)

    # Ctrl-C at the edges of a nursery would leave it open; probes run in tasks that it may strike.
    @enable_ki_protection
    async def make(self) -> HealthReport:  # noqa: ASYNC910 - a nursery's end is a checkpoint
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            for service, check in self.checks.items():
                visit = _Visit(self.name, service, check)
                nursery.start_soon(self._make, visit, nursery, name=f"{self.name}: {service}")
        mistake, self._mistake = self._mistake, None
        if mistake is not None:
            try:
                raise mistake
            finally:
                del mistake  # whose traceback leads to this frame
        services = {service: self._found[service] for service in self.checks}
        return HealthReport(status_of_all(services), services, trio.current_time())

    async def _make(  # noqa: ASYNC910 - a task, whose end needs no checkpoint
        self, visit: _Visit, nursery: trio.Nursery
    ) -> None:
        try:
            self._found[visit.service] = await visit.make()
        except NotAnOperationError as mistake:
            self._mistake = mistake
            nursery.cancel_scope.cancel()


@final
@attrs.define(eq=False, repr=False)
class _Visit:
    """One check of one service.

    The circuit is outermost, so that it hears of a timeout, and of one verdict for all attempts.
    """

    policy: str
    service: str
    check: HealthCheck
    _attempts: int = attrs.field(default=0, init=False)

    async def make(self) -> ServiceHealth:
        began, failure, is_refused = trio.current_time(), None, False
        try:
            await self._call()
        except NotAnOperationError:
            raise
        except Exception as error:  # noqa: BLE001 - to report what a probe raises is what it is for
            failure = failure_of(error, trio.current_time())
            is_refused = _is_refusal(error)
        response_time = trio.current_time() - began
        # What a probe comes to while it is being cancelled says nothing about its service.
        await trio.lowlevel.checkpoint_if_cancelled()
        found = self._judge(failure, response_time, is_refused=is_refused)
        self._report(found)
        return found

    async def _call(self) -> None:
        breaker = self.check.breaker
        if breaker is None:
            await self._call_in_time()
        else:
            await breaker.call(self._call_in_time, name=self.service)

    async def _call_in_time(self) -> object:
        retry = self.check.retry
        with Limit(trio.current_time() + self.check.timeout, self._expire):
            if retry is None:
                return await self._attempt()
            return await retry.call(self._attempt, name=self.service)

    async def _attempt(self) -> object:
        self._attempts += 1
        result: object = await awaitable(self.check.probe)
        if result is False:
            raise ProbeFailedError(self.service)
        return result

    def _expire(self) -> OperationTimeoutError:
        timeout = self.check.timeout
        tell(TimedOut, policy=self.policy, operation=self.service, timeout=timeout)
        return OperationTimeoutError(timeout, self.service)

    def _judge(
        self, failure: FailureRecord | None, response_time: float, *, is_refused: bool
    ) -> ServiceHealth:
        breaker = self.check.breaker
        circuit = None if breaker is None else breaker.state
        refuses = circuit if breaker is not None and breaker.enforce else None
        return ServiceHealth(
            status_of_service(failure, refuses, is_refused=is_refused),
            self.check.critical,
            response_time,
            self._attempts,
            failure,
            circuit,
        )

    def _report(self, found: ServiceHealth) -> None:
        tell(
            HealthChecked,
            policy=self.policy,
            operation=self.service,
            status=found.status,
            critical=found.critical,
            attempts=found.attempts,
            duration=found.response_time,
            error=found.error,
        )


def _is_refusal(error: Exception) -> bool:
    """Tell whether a circuit has kept the probe, or all parts of it, from saying anything."""
    kinds = CircuitOpenError, CallAbandonedError
    if isinstance(error, ExceptionGroup):
        group = cast("ExceptionGroup[Exception]", error)
        return group.split(kinds)[1] is None
    return isinstance(error, kinds)
