"""Hand one error to several tasks: to each of them an instance of its own."""

from __future__ import annotations

import copy
import reprlib

from trio_resilience._errors import ResilienceError

# What stands in for an error that can't be copied is to name it, not to carry all that it says.
_short = reprlib.Repr()
_short.maxother = 200


def own_copy(error: Exception) -> Exception:
    """Return a new error that says the same as *error*, which is its cause.

    It has the type, the arguments and the attributes of *error*, and its own traceback and notes:
    what one task adds to its copy, no other sees. A class that can't be copied gives way to a
    `ResilienceError` with its text.
    """
    twin = _copied(error)
    if twin is None:
        twin = _rebuilt(error)
    if twin is None:
        twin = ResilienceError(_short.repr(error))
    else:
        # A class whose `__init__` makes its message of other arguments would have made it twice.
        BaseException.__setattr__(twin, "args", error.args)
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list):
        BaseException.__setattr__(twin, "__notes__", [*notes])
    # Through the base class, for an error may refuse attributes.
    BaseException.__setattr__(twin, "__cause__", error)
    return twin


def _copied(error: Exception) -> Exception | None:
    try:
        twin = copy.copy(error)
    except Exception:  # noqa: BLE001 - whatever a foreign class raises, there is another way
        return None
    return twin if _is_twin(twin, error) else None


def _rebuilt(error: Exception) -> Exception | None:
    """Make an error like *error* without its `__init__`, whose arguments may be other ones."""
    kind = type(error)
    try:
        twin = kind.__new__(kind, *error.args)
        twin.__dict__.update(error.__dict__)
    except Exception:  # noqa: BLE001 - likewise
        return None
    return twin if _is_twin(twin, error) else None


def _is_twin(twin: object, error: Exception) -> bool:
    return type(twin) is type(error) and twin is not error
