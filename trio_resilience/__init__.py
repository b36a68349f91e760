"""Keep a trio program working when what it calls is slow, flaky or overloaded."""

from trio_resilience._advice import Advice
from trio_resilience._algorithms._backoff import (
    Constant,
    Decorrelated,
    Exponential,
    Fibonacci,
    Linear,
)
from trio_resilience._algorithms._budget import RetryBudget, RetryBudgetStatistics
from trio_resilience._algorithms._quantile import Quantile
from trio_resilience._batching import (
    Batcher,
    BatcherStatistics,
    Batches,
    batched,
    open_batcher,
)
from trio_resilience._bulkhead import Bulkhead, BulkheadStatistics
from trio_resilience._circuit_breaker import CircuitBreaker, CircuitBreakerStatistics
from trio_resilience._classify import transient
from trio_resilience._concurrency import (
    Stream,
    map_with_limit,
    run_in,
    run_with_limit,
    stream_map_with_limit,
    stream_with_limit,
)
from trio_resilience._engine._guard import CircuitGuard, CircuitIsolation
from trio_resilience._engine._policy import Policy
from trio_resilience._errors import (
    BulkheadFullError,
    CallAbandonedError,
    CircuitOpenError,
    ConfigError,
    FailureRecord,
    OperationsCancelledError,
    OperationsFailedError,
    OperationTimeoutError,
    RateLimitExceededError,
    RejectedError,
    ResilienceError,
    RetriesExhaustedError,
)
from trio_resilience._events import (
    AttemptFinished,
    AttemptStarted,
    BatchFlushed,
    CircuitState,
    CircuitStateChanged,
    Event,
    FallbackUsed,
    HedgeStarted,
    LoserFailed,
    OperationFinished,
    OperationStarted,
    Rejected,
    RejectionSkipped,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    WaitFinished,
    WaitStarted,
    subscribe,
)
from trio_resilience._fallback import Fallback, FallbackStatistics
from trio_resilience._hedge import Hedge, HedgeStatistics
from trio_resilience._keyed import Keyed, KeyedStatistics
from trio_resilience._pipeline import Pipeline, PipelineStatistics
from trio_resilience._rate_limiter import (
    CombinedRateLimiter,
    RateLimiter,
    RateLimiterStatistics,
)
from trio_resilience._retry import (
    Attempt,
    Retry,
    RetryResult,
    RetryStatistics,
    run_with_retry,
)
from trio_resilience._semaphore import Semaphore, SemaphoreStatistics
from trio_resilience._timeout import Timeout, TimeoutStatistics

__all__ = [
    "Advice",
    "Attempt",
    "AttemptFinished",
    "AttemptStarted",
    "BatchFlushed",
    "Batcher",
    "BatcherStatistics",
    "Batches",
    "Bulkhead",
    "BulkheadFullError",
    "BulkheadStatistics",
    "CallAbandonedError",
    "CircuitBreaker",
    "CircuitBreakerStatistics",
    "CircuitGuard",
    "CircuitIsolation",
    "CircuitOpenError",
    "CircuitState",
    "CircuitStateChanged",
    "CombinedRateLimiter",
    "ConfigError",
    "Constant",
    "Decorrelated",
    "Event",
    "Exponential",
    "FailureRecord",
    "Fallback",
    "FallbackStatistics",
    "FallbackUsed",
    "Fibonacci",
    "Hedge",
    "HedgeStarted",
    "HedgeStatistics",
    "Keyed",
    "KeyedStatistics",
    "Linear",
    "LoserFailed",
    "OperationFinished",
    "OperationStarted",
    "OperationTimeoutError",
    "OperationsCancelledError",
    "OperationsFailedError",
    "Pipeline",
    "PipelineStatistics",
    "Policy",
    "Quantile",
    "RateLimitExceededError",
    "RateLimiter",
    "RateLimiterStatistics",
    "Rejected",
    "RejectedError",
    "RejectionSkipped",
    "ResilienceError",
    "RetriesExhaustedError",
    "Retry",
    "RetryBudget",
    "RetryBudgetStatistics",
    "RetryGaveUp",
    "RetryResult",
    "RetryScheduled",
    "RetryStatistics",
    "Semaphore",
    "SemaphoreStatistics",
    "Stream",
    "TimedOut",
    "Timeout",
    "TimeoutStatistics",
    "WaitFinished",
    "WaitStarted",
    "batched",
    "map_with_limit",
    "open_batcher",
    "run_in",
    "run_with_limit",
    "run_with_retry",
    "stream_map_with_limit",
    "stream_with_limit",
    "subscribe",
    "transient",
]
