"""State that belongs to one `trio.run`: permits, lines, probes and time windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, final

import attrs
import trio
from trio.lowlevel import TrioToken

S = TypeVar("S")


@final
@attrs.define(eq=False, repr=False)
class RunState(Generic[S]):
    """A state that is made anew for every run, of an object that outlives them.

    Policies live at module level and are used in several runs, one after the other. Of a run that
    has ended, trio's clock, its tasks and its waiters mean nothing any more.
    """

    make: Callable[[], S]
    token: TrioToken | None = attrs.field(default=None, init=False)
    """Of the run that has used it last; a hot path compares it, and spares itself `get`."""
    state: S = attrs.field(init=False)
    """Of that run; unset before the first."""

    def get(self) -> S:
        """Return the state of this run; refuse to serve two live runs at once."""
        token = trio.lowlevel.current_trio_token()
        if token is not self.token:
            if self.token is not None and _is_live(self.token):
                raise RuntimeError(
                    "a policy can't be used in two runs of trio at once, in two threads:"
                    " give each of them its own"
                )
            # Made first: should that fail, the next one in this run makes it.
            self.state = self.make()
            self.token = token
        return self.state

    def peek(self) -> S | None:
        """Return the state of the run that is live, if any has used it; for statistics."""
        is_live = self.token is not None and (self._is_here() or _is_live(self.token))
        return self.state if is_live else None

    def here(self) -> S | None:
        """Return the state of the run in which this is asked, if that has one."""
        return self.state if self._is_here() else None

    def anew(self) -> RunState[S]:
        """Return one that is made in the same way and has no state yet."""
        return RunState(self.make)

    def _is_here(self) -> bool:
        is_in_a_run = trio.lowlevel.in_trio_run()
        return is_in_a_run and trio.lowlevel.current_trio_token() is self.token


def _is_live(token: TrioToken) -> bool:
    try:
        token.run_sync_soon(_do_nothing)
    except (trio.RunFinishedError, OSError):  # the latter if trio itself has crashed
        return False
    return True


def _do_nothing() -> None:
    """Be run, to prove that somebody runs."""
