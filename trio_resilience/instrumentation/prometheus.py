"""Count events for Prometheus (the package ``prometheus-client``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, final

import attrs

from trio_resilience import CircuitStateChanged, Event
from trio_resilience.instrumentation._measures import (
    BUCKETS,
    CIRCUIT_STATE,
    COUNTERS,
    DURATIONS,
    Labels,
    Quantity,
    max_operations,
    max_policies,
    measures,
)
from trio_resilience.instrumentation._words import extra, must_be

with extra("prometheus"):
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric

_PREFIX: Final = "trio_resilience_"


@final
class _Family:
    """All metrics of a listener, as one collector: they are registered together or not at all."""

    def __init__(self) -> None:
        counters = {quantity: _counter(quantity) for quantity in COUNTERS}
        histograms = {quantity: _histogram(quantity) for quantity in DURATIONS}
        self.circuit_state = Gauge(*_described(CIRCUIT_STATE, ""), registry=None)
        self._metrics: list[Counter | Histogram | Gauge] = [
            *counters.values(),
            *histograms.values(),
            self.circuit_state,
        ]
        self.add: dict[Quantity, Callable[[list[str], float], object]] = {
            **{quantity: _adder(metric) for quantity, metric in counters.items()},
            **{quantity: _observer(metric) for quantity, metric in histograms.items()},
        }

    def collect(self) -> Iterable[Metric]:
        """Return the numbers, when somebody asks for them."""
        return [family for metric in self._metrics for family in metric.collect()]

    def describe(self) -> Iterable[Metric]:
        """Return the names, for the registry."""
        return [family for metric in self._metrics for family in metric.describe()]


def _described(quantity: Quantity, suffix: str) -> tuple[str, str, tuple[str, ...]]:
    return _PREFIX + quantity.snake + suffix, quantity.meaning, quantity.labels


def _counter(quantity: Quantity) -> Counter:
    return Counter(*_described(quantity, "_total"), registry=None)


def _histogram(quantity: Quantity) -> Histogram:
    return Histogram(*_described(quantity, "_seconds"), registry=None, buckets=BUCKETS)


def _adder(counter: Counter) -> Callable[[list[str], float], object]:
    return lambda labels, amount: counter.labels(*labels).inc(amount)


def _observer(histogram: Histogram) -> Callable[[list[str], float], object]:
    return lambda labels, amount: histogram.labels(*labels).observe(amount)


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class PrometheusListener:
    """A listener for `subscribe` that counts and times what happens, for Prometheus to scrape.

    All names begin with ``trio_resilience_``. The labels are the names of the policy and of the
    operation, and mostly an outcome: succeeded, failed, refused or cancelled. However many
    operations there are, the number of series is bounded.

    One listener may serve any number of `subscribe` blocks. There can be only one per registry.

    Args:
        registry: where the metrics are registered; that of the whole process if not given.
        max_operations: how many operations have a label of their own; further ones share the label
            ``other``.
        max_policies: the same of policies.

    Raises:
        ValueError: the registry has such metrics already.

    Example::

        prometheus_client.start_http_server(9100, addr="127.0.0.1")
        with subscribe(PrometheusListener()):
            trio.run(main)
    """

    registry: CollectorRegistry = attrs.field(
        default=REGISTRY, validator=must_be(CollectorRegistry)
    )
    max_operations: int = attrs.field(default=100, converter=max_operations)
    max_policies: int = attrs.field(default=100, converter=max_policies)
    _labels: Labels = attrs.field(init=False)
    _family: _Family = attrs.field(factory=_Family, init=False)

    def __attrs_post_init__(self) -> None:
        self._labels = Labels(self.max_policies, self.max_operations)
        try:
            self.registry.register(self._family)
        except ValueError:
            raise ValueError(
                "this registry has metrics named `trio_resilience_...` already: pass the listener "
                "that they belong to to `subscribe` again, or give this one its own `registry`"
            ) from None

    def __call__(self, event: Event) -> None:
        """Add what *event* says to the metrics."""
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance]
            return
        for quantity, amount, last in measures(event):
            self._family.add[quantity](self._labels.of(event, quantity, last), amount)
        if isinstance(event, CircuitStateChanged):
            for labels, number in self._labels.circuit_states(event):
                self._family.circuit_state.labels(*labels).set(number)
