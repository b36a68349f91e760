"""Test your own code against what this package promises: cancel it everywhere."""

from __future__ import annotations

from ._cancel_everywhere import cancel_everywhere
from ._cancel_records import (
    CancelEverywhereError,
    CancelPoint,
    CancelReport,
    Finding,
    Scenario,
)
from ._pause import pause
from ._test_mode import test_mode

__all__ = [
    "CancelEverywhereError",
    "CancelPoint",
    "CancelReport",
    "Finding",
    "Scenario",
    "cancel_everywhere",
    "pause",
    "test_mode",
]
