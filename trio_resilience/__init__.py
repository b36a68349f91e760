"""Keep a trio program working when what it calls is slow, flaky or overloaded."""

from trio_resilience._concurrency import (
    Stream,
    map_with_limit,
    run_in,
    run_with_limit,
    stream_map_with_limit,
    stream_with_limit,
)
