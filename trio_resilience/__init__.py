"""Keep a trio program working when what it calls is slow, flaky or overloaded.

A public name is imported from its module when it is used first, so a program pays for the parts
that it uses. The program reads the table, and type checkers the imports below it.
"""

from typing import TYPE_CHECKING

from trio_resilience._lazy import offer as _offer

_HOMES = {
    "_advice": "Advice",
    "_algorithms._backoff": "Constant Decorrelated Exponential Fibonacci Linear",
    "_algorithms._budget": "RetryBudget RetryBudgetStatistics",
    "_algorithms._quantile": "Quantile",
    "_algorithms._sketch": "LatencySnapshot",
    "_batching": "Batcher BatcherStatistics Batches batched open_batcher",
    "_bulkhead": "Bulkhead BulkheadStatistics",
    "_circuit_breaker": "CircuitBreaker CircuitBreakerStatistics",
    "_classify": "transient",
    "_concurrency": (
        "Stream map_with_limit run_in run_with_limit stream_map_with_limit stream_with_limit"
    ),
    "_engine._guard": "CircuitGuard CircuitIsolation",
    "_engine._policy": "Policy",
    "_errors": (
        "BulkheadFullError CallAbandonedError CircuitOpenError ConfigError FailureRecord "
        "OperationTimeoutError OperationsCancelledError OperationsFailedError "
        "ProbeFailedError RateLimitExceededError RejectedError ResilienceError "
        "RetriesExhaustedError"
    ),
    "_engine._report": "subscribe",
    "_events": (
        "AttemptFinished AttemptStarted BatchFlushed CallFinished CallStarted CircuitState "
        "CircuitStateChanged ConfigReloadFailed ConfigReloaded Event FallbackUsed "
        "HealthChanged HealthChecked HealthStatus HedgeStarted LoserFailed OperationFinished "
        "OperationStarted Rejected RejectionSkipped RetryGaveUp RetryScheduled TimedOut "
        "WaitFinished WaitStarted"
    ),
    "_fallback": "Fallback FallbackStatistics",
    "_health": "HealthCheck HealthReport ServiceHealth check_health",
    "_health_monitor": "HealthMonitor",
    "_hedge": "Hedge HedgeStatistics",
    "_keyed": "Keyed KeyedStatistics",
    "_metrics": "Metrics",
    "_pipeline": "Pipeline PipelineStatistics",
    "_rate_limiter": "CombinedRateLimiter RateLimiter RateLimiterStatistics",
    "_registry": "RegisteredPolicy Registry RegistryStatistics",
    "_retry": "Attempt Retry RetryResult RetryStatistics run_with_retry",
    "_semaphore": "Semaphore SemaphoreStatistics",
    "_serving": "serve_metrics",
    "_snapshots": (
        "AttemptsSnapshot BatchesSnapshot CircuitSnapshot MetricsSnapshot OutcomesSnapshot "
        "PolicySnapshot SeriesSnapshot WaitsSnapshot"
    ),
    "_timeout": "Timeout TimeoutStatistics",
}

if TYPE_CHECKING:
    from trio_resilience._advice import (
        Advice as Advice,
    )
    from trio_resilience._algorithms._backoff import (
        Constant as Constant,
        Decorrelated as Decorrelated,
        Exponential as Exponential,
        Fibonacci as Fibonacci,
        Linear as Linear,
    )
    from trio_resilience._algorithms._budget import (
        RetryBudget as RetryBudget,
        RetryBudgetStatistics as RetryBudgetStatistics,
    )
    from trio_resilience._algorithms._quantile import (
        Quantile as Quantile,
    )
    from trio_resilience._algorithms._sketch import (
        LatencySnapshot as LatencySnapshot,
    )
    from trio_resilience._batching import (
        Batcher as Batcher,
        BatcherStatistics as BatcherStatistics,
        Batches as Batches,
        batched as batched,
        open_batcher as open_batcher,
    )
    from trio_resilience._bulkhead import (
        Bulkhead as Bulkhead,
        BulkheadStatistics as BulkheadStatistics,
    )
    from trio_resilience._circuit_breaker import (
        CircuitBreaker as CircuitBreaker,
        CircuitBreakerStatistics as CircuitBreakerStatistics,
    )
    from trio_resilience._classify import (
        transient as transient,
    )
    from trio_resilience._concurrency import (
        Stream as Stream,
        map_with_limit as map_with_limit,
        run_in as run_in,
        run_with_limit as run_with_limit,
        stream_map_with_limit as stream_map_with_limit,
        stream_with_limit as stream_with_limit,
    )
    from trio_resilience._engine._guard import (
        CircuitGuard as CircuitGuard,
        CircuitIsolation as CircuitIsolation,
    )
    from trio_resilience._engine._policy import (
        Policy as Policy,
    )
    from trio_resilience._errors import (
        BulkheadFullError as BulkheadFullError,
        CallAbandonedError as CallAbandonedError,
        CircuitOpenError as CircuitOpenError,
        ConfigError as ConfigError,
        FailureRecord as FailureRecord,
        OperationTimeoutError as OperationTimeoutError,
        OperationsCancelledError as OperationsCancelledError,
        OperationsFailedError as OperationsFailedError,
        ProbeFailedError as ProbeFailedError,
        RateLimitExceededError as RateLimitExceededError,
        RejectedError as RejectedError,
        ResilienceError as ResilienceError,
        RetriesExhaustedError as RetriesExhaustedError,
    )
    from trio_resilience._engine._report import subscribe as subscribe
    from trio_resilience._events import (
        AttemptFinished as AttemptFinished,
        AttemptStarted as AttemptStarted,
        BatchFlushed as BatchFlushed,
        CallFinished as CallFinished,
        CallStarted as CallStarted,
        CircuitState as CircuitState,
        CircuitStateChanged as CircuitStateChanged,
        ConfigReloadFailed as ConfigReloadFailed,
        ConfigReloaded as ConfigReloaded,
        Event as Event,
        FallbackUsed as FallbackUsed,
        HealthChanged as HealthChanged,
        HealthChecked as HealthChecked,
        HealthStatus as HealthStatus,
        HedgeStarted as HedgeStarted,
        LoserFailed as LoserFailed,
        OperationFinished as OperationFinished,
        OperationStarted as OperationStarted,
        Rejected as Rejected,
        RejectionSkipped as RejectionSkipped,
        RetryGaveUp as RetryGaveUp,
        RetryScheduled as RetryScheduled,
        TimedOut as TimedOut,
        WaitFinished as WaitFinished,
        WaitStarted as WaitStarted,
    )
    from trio_resilience._fallback import (
        Fallback as Fallback,
        FallbackStatistics as FallbackStatistics,
    )
    from trio_resilience._health import (
        HealthCheck as HealthCheck,
        HealthReport as HealthReport,
        ServiceHealth as ServiceHealth,
        check_health as check_health,
    )
    from trio_resilience._health_monitor import (
        HealthMonitor as HealthMonitor,
    )
    from trio_resilience._hedge import (
        Hedge as Hedge,
        HedgeStatistics as HedgeStatistics,
    )
    from trio_resilience._keyed import (
        Keyed as Keyed,
        KeyedStatistics as KeyedStatistics,
    )
    from trio_resilience._metrics import (
        Metrics as Metrics,
    )
    from trio_resilience._pipeline import (
        Pipeline as Pipeline,
        PipelineStatistics as PipelineStatistics,
    )
    from trio_resilience._rate_limiter import (
        CombinedRateLimiter as CombinedRateLimiter,
        RateLimiter as RateLimiter,
        RateLimiterStatistics as RateLimiterStatistics,
    )
    from trio_resilience._registry import (
        RegisteredPolicy as RegisteredPolicy,
        Registry as Registry,
        RegistryStatistics as RegistryStatistics,
    )
    from trio_resilience._retry import (
        Attempt as Attempt,
        Retry as Retry,
        RetryResult as RetryResult,
        RetryStatistics as RetryStatistics,
        run_with_retry as run_with_retry,
    )
    from trio_resilience._semaphore import (
        Semaphore as Semaphore,
        SemaphoreStatistics as SemaphoreStatistics,
    )
    from trio_resilience._serving import (
        serve_metrics as serve_metrics,
    )
    from trio_resilience._snapshots import (
        AttemptsSnapshot as AttemptsSnapshot,
        BatchesSnapshot as BatchesSnapshot,
        CircuitSnapshot as CircuitSnapshot,
        MetricsSnapshot as MetricsSnapshot,
        OutcomesSnapshot as OutcomesSnapshot,
        PolicySnapshot as PolicySnapshot,
        SeriesSnapshot as SeriesSnapshot,
        WaitsSnapshot as WaitsSnapshot,
    )
    from trio_resilience._timeout import (
        Timeout as Timeout,
        TimeoutStatistics as TimeoutStatistics,
    )
else:
    __getattr__, __dir__, __all__ = _offer(__name__, _HOMES)
