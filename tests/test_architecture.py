import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epd_ray.backbones.index import FAMILIES

ROOT = Path(__file__).parent.parent
READS_PICKLES = "epd_ray.solvers.reference"  # whose unpickler knows nothing but stand-ins
ENTRIES, MODULES_AT_THE_TOP = 28, 7

# A package, or a module beside the packages, imports only from its own line and from those above it.
ORDER_OF_LINES = """
errors
types
randomness
registry
embedded
weights
storage
telemetry
prompts
rewards
solvers
policy
stage_one
backbones
deploy
report
drawing
config
actors
rdpo
score
evaluation
runs
sweep
bench
cli
"""
ORDER = ORDER_OF_LINES.split()

RAY_ROOMS = ("telemetry.monitor", "actors", "rdpo", "score", "evaluation.suites", "runs", "sweep", "bench")  # and jobs/

# What does without Ray although its package is one of Ray's rooms, or stands above one.
PLAIN = (
    *("score.inputs", "score.names", "score.tars", "score.rows", "score.output"),
    *("evaluation.comparison", "evaluation.validation", "evaluation.statistics", "evaluation.records"),
    *("evaluation.metrics", "evaluation.ab", "evaluation.results"),
    *("runs.sample", "runs.tables", "runs.report", "runs.describe", "cli"),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted((ROOT / "epd_ray").rglob("*.py"))}
JOBS = {name_of(path): ast.parse(path.read_text()) for path in sorted((ROOT / "jobs").rglob("*.py"))}


def imports(tree: ast.Module, *, at_start: bool = False) -> Iterator[str]:
    """Imported modules, those inside functions too unless `at_start`; "from a import b" is a.b where that is one."""
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            base = node.module or ""
            yield from (n if (n := f"{base}.{alias.name}") in MODULES else base for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def place(module: str) -> int:
    """The line of ORDER that a module belongs to; the package itself, which hands names on, stands above them all."""
    return len(ORDER) if module == "epd_ray" else ORDER.index(module.split(".")[1])


def own_imports(module: str, *, at_start: bool = False) -> set[str]:
    return {name for name in imports(MODULES[module], at_start=at_start) if within(name, "epd_ray")}


def inside(module: str, names: tuple[str, ...]) -> bool:
    return any(within(module, f"epd_ray.{name}") for name in names)


def needs_no_ray(module: str) -> bool:
    below = module == "epd_ray" or ORDER.index(module.split(".")[1]) < ORDER.index("actors")
    return inside(module, PLAIN) or (below and not inside(module, RAY_ROOMS))


def test_imports_point_one_way() -> None:
    wrong = [f"{m} -> {i}" for m in MODULES for i in own_imports(m) if place(i) > place(m)]
    assert not wrong
    assert {m.split(".")[1] for m in MODULES if m != "epd_ray"} == set(ORDER)


def test_the_house_has_few_doors() -> None:
    entries = [path for path in (ROOT / "epd_ray").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ENTRIES, f"{len(entries)} entries in epd_ray, at most {ENTRIES} are wanted"
    assert sum(path.suffix == ".py" for path in entries) <= MODULES_AT_THE_TOP


def test_an_installed_package_has_its_data() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["epd_ray"]
    packed = {path for pattern in patterns for path in (ROOT / "epd_ray").glob(pattern)}
    there = {p for p in (ROOT / "epd_ray").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert there == {path for path in packed if path.is_file()}


@pytest.mark.parametrize("package", sorted({m for m in MODULES if (ROOT / m.replace(".", "/")).is_dir()}))
def test_every_package_says_who_lives_there(package: str) -> None:
    assert ast.get_docstring(MODULES[package]), f"{package}/__init__.py has no docstring"


def test_no_cycles() -> None:
    graph = {m: own_imports(m, at_start=True) & MODULES.keys() - {m} for m in MODULES}
    while leaves := [m for m, targets in graph.items() if not targets & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"import cycle among {sorted(graph)}"


@pytest.mark.parametrize("package", ["epd_ray.backbones", "epd_ray.rewards", "epd_ray.rdpo", "ray"])
def test_solvers_know_nothing_of(package: str) -> None:
    assert not [
        (m, i) for m in MODULES if within(m, "epd_ray.solvers") for i in imports(MODULES[m]) if within(i, package)
    ]


def test_ray_stays_in_its_rooms() -> None:
    users = {m for m, tree in MODULES.items() if any(within(i, "ray") for i in imports(tree))}
    assert not {m for m in users if not inside(m, RAY_ROOMS) or inside(m, PLAIN)}
    assert {"epd_ray.actors.pool", "epd_ray.rdpo.learner"} <= users


def test_backbone_names_stay_in_backbones() -> None:
    families = {target.partition(":")[0].rpartition(".")[2] for target in FAMILIES.targets()}
    assert {"sd", "sd3", "flux", "ddpm"} <= families
    for module in MODULES:
        if not within(module, "epd_ray.backbones"):
            targets = {f"epd_ray.backbones.{family}" for family in families} & set(imports(MODULES[module]))
            assert not targets, f"{module} imports {targets}"


WORDS_OF_OTHERS = {"epd_ray.solvers.reference_facts"}  # which reads files of another project, in that project's words


def literals(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_module_outside_backbones_names_one() -> None:
    names = {*FAMILIES.names(), *(FAMILIES.get(name).name for name in FAMILIES.names())}  # type: ignore[attr-defined]
    assert {"sd", "sdxl", "sd3", "flux", "ddpm", "FluxPipeline"} <= names
    assert literals(ast.parse("x = {'sd3': f(y == 'a')}  # flux")) == {"sd3", "a"}
    found = {
        module: names & literals(tree) for module, tree in MODULES.items() if not within(module, "epd_ray.backbones")
    }
    assert {module for module, named in found.items() if named} == WORDS_OF_OTHERS


def test_the_package_needs_neither_jobs_nor_tests() -> None:
    assert not [(m, i) for m, t in MODULES.items() for i in imports(t) if i.split(".")[0] in ("jobs", "tests")]


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def set_to(node: ast.Call, name: str, value: bool) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in node.keywords)


UNSAFE: dict[str, Callable[[ast.Call], bool]] = {
    "torch.load": lambda node: not set_to(node, "weights_only", True),
    "np.load": lambda node: any(k.arg == "allow_pickle" for k in node.keywords),
    **{
        f"{module}.{f}": lambda _: True
        for module in ("pickle", "cloudpickle", "dill", "joblib")
        for f in ("load", "loads")
    },
}


def unsafe_loads(tree: ast.Module) -> list[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(c) for c in calls if UNSAFE.get(called(c), lambda _: False)(c)]


def unpicklers(tree: ast.Module) -> list[str]:
    """Imports that could unpickle; the name of the error alone cannot."""
    harmless = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "pickle"
        and {alias.name for alias in node.names} == {"UnpicklingError"}
    ]  # fmt: skip
    found = [i for i in imports(tree) if i in ("pickle", "dill", "joblib")]
    return found[len(harmless) :]


def test_nothing_unpickles() -> None:
    assert unsafe_loads(ast.parse("torch.load(path); torch.load(path, weights_only=False); pickle.loads(data)")) != []
    assert unsafe_loads(ast.parse("torch.load(path, weights_only=True); np.load(path)")) == []
    found = {m: bad for m, tree in {**MODULES, **JOBS}.items() if (bad := unsafe_loads(tree))}
    assert not found
    hidden = {m for m, tree in {**MODULES, **JOBS}.items() for i in unpicklers(tree)}
    assert hidden <= {READS_PICKLES}


def test_the_reader_of_pickles_only_subclasses_the_unpickler() -> None:
    nodes = list(ast.walk(MODULES[READS_PICKLES]))
    used = {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert used == {"pickle.Unpickler", "pickle.UnpicklingError"}
    assert not [n for n in nodes if isinstance(n, ast.Call) and called(n) == "pickle.Unpickler"]
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    assert "find_class" in defined and "persistent_load" not in defined


def test_importing_the_plain_modules_imports_no_ray() -> None:
    plain = [m for m in MODULES if needs_no_ray(m) and not m.endswith("__main__")]
    assert {"epd_ray.solvers", "epd_ray.drawing.worker", "epd_ray.policy.network", "epd_ray.runs.sample"} <= set(plain)
    check = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'ray' not in sys.modules, f'{name} imports ray'\n"
    )
    done = subprocess.run([sys.executable, "-c", check, *plain], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
