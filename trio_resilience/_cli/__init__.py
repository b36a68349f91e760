"""The command line, behind the extra ``cli``: `main` runs it."""

from trio_resilience._cli._app import main as main
