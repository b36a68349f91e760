"""``python -m trio_resilience``: see the library at work, or put it to work on a list of URLs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

CLI_PACKAGES: Final = {"cyclopts", "h11", "httpx2", "rich"}

try:
    from trio_resilience._cli import main
except ModuleNotFoundError as _error:
    _missing = (_error.name or "").partition(".")[0]
    if _missing not in CLI_PACKAGES:
        raise

    def main(arguments: Sequence[str] | None = None) -> int:  # noqa: ARG001 - the other one's
        """Say what to install."""
        sys.stderr.write(
            'trio_resilience: the command line needs the extra: pip install "trio_resilience[cli]"'
            f" (no module named {_missing})\n"
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
