"""``python -m trio_resilience``: see the library at work, or put it to work on a list of URLs."""

from __future__ import annotations

import sys
from typing import Final

CLI_PACKAGES: Final = {"cyclopts", "h11", "httpx2", "rich"}

try:
    from trio_resilience._cli import main
except ModuleNotFoundError as error:
    if error.name not in CLI_PACKAGES:
        raise
    missing = error.name

    def main() -> int:
        """Say what to install."""
        print(
            'trio_resilience: the command line needs the extra: pip install "trio_resilience[cli]"'
            f" (no module named {missing})",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
