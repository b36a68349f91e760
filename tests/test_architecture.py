"""The modules form one ordered list; each imports only from earlier ones and keeps to its layer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, final

import attrs
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = "trio_resilience"

# Every module, in the one order that imports follow. A folder's own name stands for its `__init__`.
LAYERS: dict[str, list[str]] = {
    "words": ["_lazy", "_checks", "_records", "_errors", "_events"],
    "rules": [
        "_algorithms",
        "_algorithms._backoff",
        "_algorithms._gcra",
        "_algorithms._buckets",
        "_algorithms._sketch",
        "_algorithms._distinct",
        "_algorithms._budget",
        "_algorithms._quantile",
        "_algorithms._window",
        "_algorithms._breaker",
        "_algorithms._retry_rule",
        "_classify",
    ],
    "engine": [
        "_engine",
        "_engine._traceback",
        "_engine._report",
        "_engine._waiting",
        "_engine._deadline",
        "_engine._run",
        "_engine._permits",
        "_engine._driver",
        "_engine._join",
        "_engine._race",
        "_engine._outbox",
        "_engine._source",
        "_engine._policy",
        "_engine._watched",
        "_engine._circuit",
        "_engine._guard",
        "_engine._chooser",
        "_engine._shelves",
        "_engine._copies",
        "_engine._plan",
        "_engine._pool",
        "_engine._ending",
        "_engine._block",
        "_engine._filler",
        "_engine._flusher",
    ],
    "primitives": [
        "_timeout",
        "_retry",
        "_fallback",
        "_hedge",
        "_semaphore",
        "_rate_limiter",
        "_circuit_breaker",
    ],
    "built from them": [
        "_bulkhead",
        "_concurrency",
        "_batching",
        "_keyed",
        "_advice",
        "_pipeline",
    ],
    "the application's view": [
        "_config_text",
        "_config_mistakes",
        "_config_schema",
        "_config_options",
        "_config",
        "_registry",
        "_health",
        "_health_monitor",
        "_snapshots",
        "_metrics",
        "_serving",
    ],
    "the public names": [""],
    "edges": [
        "testing._cancel_records",
        "testing._task_frames",
        "testing._listening",
        "testing._pause",
        "testing._run_watch",
        "testing._scheduling",
        "testing._cancel_run",
        "testing._cancel_everywhere",
        "testing._test_mode",
        "testing",
        "_cli._faults",
        "_cli._causes",
        "_cli._report",
        "_cli._outage",
        "_cli._saving",
        "_cli._terminal",
        "_cli._server",
        "_cli._pages",
        "_cli._urls",
        "_cli._rate",
        "_cli._advice",
        "_cli._check",
        "_cli._demo",
        "_cli._fetch",
        "_cli._top",
        "_cli._app",
        "_cli",
        "__main__",
        "svcs",
        "instrumentation",
        "instrumentation._words",
        "instrumentation._measures",
        "instrumentation.logging",
        "instrumentation.structlog",
        "instrumentation.prometheus",
        "instrumentation.opentelemetry",
    ],
}
ORDER = [f"{PACKAGE}.{name}".rstrip(".") for names in LAYERS.values() for name in names]
LAYER_OF = dict(zip(ORDER, (layer for layer, names in LAYERS.items() for _ in names), strict=True))

CORE_DEPENDENCIES = {"attr", "attrs", "outcome", "trio"}
EXTRA_DEPENDENCIES = {
    "_cli": {"cyclopts", "h11", "httpx2", "rich"},
    "_config_options": {"cattrs"},
    "svcs": {"svcs"},
    "instrumentation.structlog": {"structlog"},
    "instrumentation.prometheus": {"prometheus_client"},
    "instrumentation.opentelemetry": {"opentelemetry"},
}

# Time comes from trio's clock, randomness from a generator that the caller can seed.
FORBIDDEN_IMPORTS = {"asyncio", "time"}
FORBIDDEN_CALLS = {"datetime.now", "datetime.today", "datetime.utcnow", "date.today"}
MAY_READ_THE_WALL_CLOCK = {
    # A `Retry-After` header may hold a date, which only a calendar can turn into a delay.
    f"{PACKAGE}._retry": {"time"},
}
MAY_USE_PRIVATE_TRIO = ("testing", "simulation")


@final
@attrs.frozen
class Import:
    """A name that a module imports, as a dotted path from the top, and where."""

    target: str
    line: int
    function: str | None
    """The function that holds the statement, if it is not at module level."""

    @property
    def top(self) -> str:
        """The top-level package that it comes from."""
        return self.target.partition(".")[0]


def path_of(module: str) -> Path:
    base = ROOT / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def imports_of(module: str) -> list[Import]:
    """Return all imports of *module*, those for type checkers too."""
    package = module if path_of(module).name == "__init__.py" else module.rpartition(".")[0]
    return list(_imports(tree_of(module), package, None))


def _imports(node: ast.AST, package: str, function: str | None) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, child.lineno, function)
            case ast.ImportFrom(names=names):
                start = _source(child, package.split("."))
                for alias in names:
                    yield Import(f"{start}.{alias.name}", child.lineno, function)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield from _imports(child, package, name)
            case _:
                yield from _imports(child, package, function)


def _source(statement: ast.ImportFrom, package: list[str]) -> str:
    above = package[: len(package) + 1 - statement.level] if statement.level else []
    return ".".join([*above, *([statement.module] if statement.module else [])])


def own_imports_of(module: str) -> list[tuple[str, Import]]:
    """Return the modules of ours that *module* imports, each with the statement that does it."""
    own = [found for found in imports_of(module) if found.top == PACKAGE]
    return [(_module_of(found.target), found) for found in own]


def _module_of(target: str) -> str:
    """Return the module itself for `package.module.name` as for `package.module`."""
    return target if path_of(target).exists() else target.rpartition(".")[0]


every_module = pytest.mark.parametrize("module", ORDER)


def test_the_list_holds_exactly_the_modules_that_exist() -> None:
    """A new module gets its place in the order, and a removed one loses it."""
    files = (ROOT / PACKAGE).rglob("*.py")
    parts = [file.relative_to(ROOT).with_suffix("").parts for file in files]
    assert sorted(ORDER) == sorted(".".join(part).removesuffix(".__init__") for part in parts)


@every_module
def test_a_module_imports_only_from_earlier_ones(module: str) -> None:
    """So there are no cycles, and a reader can start at the top of the list."""
    earlier = ORDER[: ORDER.index(module)]
    late = [found for target, found in own_imports_of(module) if target not in earlier]
    assert late == []


@every_module
def test_only_the_edges_import_the_package_by_its_public_names(module: str) -> None:
    """The package's own `__init__` imports everything, so whatever imports it is an edge."""
    if LAYER_OF[module] != "edges":
        assert PACKAGE not in [target for target, _ in own_imports_of(module)]


@pytest.mark.parametrize("module", [name for name in ORDER if LAYER_OF[name] == "primitives"])
def test_primitives_never_import_one_another(module: str) -> None:
    """What two of them share is in the engine."""
    layers = [LAYER_OF[target] for target, _ in own_imports_of(module)]
    assert "primitives" not in layers


@every_module
def test_own_modules_are_imported_at_module_level(module: str) -> None:
    """A function-level import would hide a cycle."""
    assert [found for _, found in own_imports_of(module) if found.function is not None] == []


def extras_of(module: str) -> set[str]:
    """Return what an edge, or the folder that it is in, may import beyond the core's own."""
    below = f"{module.removeprefix(f'{PACKAGE}.')}."
    edges = [edge for edge in EXTRA_DEPENDENCIES if below.startswith(f"{edge}.")]
    return {extra for edge in edges for extra in EXTRA_DEPENDENCIES[edge]}


@every_module
def test_third_party_imports_are_declared_dependencies(module: str) -> None:
    """The core needs its three dependencies only; an extra is used by the edge that it is for."""
    known = CORE_DEPENDENCIES | extras_of(module) | {PACKAGE}
    foreign = {found.top for found in imports_of(module)} - sys.stdlib_module_names
    assert foreign <= known


@pytest.mark.parametrize("module", [name for name in ORDER if LAYER_OF[name] == "rules"])
def test_rules_are_pure(module: str) -> None:
    """Neither trio nor anything that uses it: a rule gets the time as an argument."""
    assert "trio" not in {found.top for found in imports_of(module)}
    assert {LAYER_OF[target] for target, _ in own_imports_of(module)} <= {"words", "rules"}


@every_module
def test_trio_is_the_only_clock_and_the_only_loop(module: str) -> None:
    """No asyncio, and no wall clock, whose jumps would move deadlines."""
    forbidden = FORBIDDEN_IMPORTS - MAY_READ_THE_WALL_CLOCK.get(module, set())
    assert [found for found in imports_of(module) if found.top in forbidden] == []
    calls = [node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
    assert [name for name in map(ast.unparse, calls) if name.endswith(tuple(FORBIDDEN_CALLS))] == []


@every_module
def test_randomness_comes_from_a_generator(module: str) -> None:
    """Module-level functions of `random` share one generator that no caller can seed safely."""
    used = {found.target for found in imports_of(module) if found.target.startswith("random.")}
    used |= {name for name in _dotted_names(module) if name.startswith("random.")}
    assert used <= {"random.Random"}


@every_module
def test_only_test_tools_use_private_names_of_trio(module: str) -> None:
    """Trio may change them at any time."""
    if module.startswith(tuple(f"{PACKAGE}.{name}" for name in MAY_USE_PRIVATE_TRIO)):
        return
    names = {found.target for found in imports_of(module)} | set(_dotted_names(module))
    parts = [name.split(".") for name in names if name.startswith("trio.")]
    assert [path for path in parts if any(part.startswith("_") for part in path)] == []


def _dotted_names(module: str) -> Iterator[str]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_the_package_itself_holds_no_logic() -> None:
    """It re-exports the public names, and lists them: once for type checkers, once for programs."""
    docstring, *imports, homes, either = tree_of(PACKAGE).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(either, ast.If)
    assert ast.unparse(either.test) == "TYPE_CHECKING"
    assert all(isinstance(node, ast.ImportFrom) for node in [*imports, *either.body])
    assert isinstance(homes, ast.Assign)
    assert list(map(ast.unparse, either.orelse)) == [
        "__getattr__, __dir__, __all__ = _offer(__name__, _HOMES)"
    ]
    listed = {
        f"{PACKAGE}.{home}.{name}"
        for home, names in ast.literal_eval(homes.value).items()
        for name in names.split()
    }
    assert listed == set(_targets(either))


def _targets(block: ast.If) -> Iterator[str]:
    for found in _imports(block, PACKAGE, None):
        yield found.target


def test_a_name_is_imported_when_it_is_used_first() -> None:
    """And found from then on; what is no public name is none."""
    program = f"""
import sys, {PACKAGE} as package
assert "{PACKAGE}._retry" not in sys.modules and "trio" not in sys.modules
assert "Retry" in dir(package) and "__name__" in dir(package)
assert package.Retry is package.Retry is sys.modules["{PACKAGE}._retry"].Retry
assert "Retry" in vars(package) and "{PACKAGE}._hedge" not in sys.modules
assert not hasattr(package, "retry")
from {PACKAGE} import *
assert all(globals()[name] is getattr(package, name) for name in package.__all__)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, check=True)


PRINT_NEW_MODULES = f"""
import sys
import attr, attrs, outcome, trio
before = set(sys.modules)
from {PACKAGE} import *
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - sys.stdlib_module_names))
"""


def test_importing_the_package_imports_nothing_but_its_dependencies() -> None:
    """Nor does it import an edge, such as the command line."""
    command = [sys.executable, "-W", "error", "-c", PRINT_NEW_MODULES]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [PACKAGE]
    command[-1] = f"import sys\nfrom {PACKAGE} import *\nprint(*sys.modules)"
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = [name for name in run.stdout.split() if name.startswith(f"{PACKAGE}.")]
    assert [name for name in loaded if LAYER_OF[name] == "edges"] == []
