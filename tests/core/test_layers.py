"""Who may import whom: the core knows no environment and no agent, and is quick to import."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import spiking_rl

PACKAGE = Path(spiking_rl.__file__).parent
UPPER = ("agents", "envs", "scripts")
FORBIDDEN = {"core": UPPER, "envs": ("agents", "scripts"), "agents": ("scripts",), "scripts": ()}


def files_of(layer: str) -> list[Path]:
    """Return the modules of a layer; the core is what is in none of the others."""
    if layer != "core":
        return sorted((PACKAGE / layer).rglob("*.py"))
    top = [p for p in PACKAGE.iterdir() if p.name not in UPPER]
    return sorted([p for p in top if p.suffix == ".py"] + [f for p in top if p.is_dir() for f in p.rglob("*.py")])


def imported(source: str, package: str) -> Iterator[str]:
    """Yield the full name of everything that a module of ``package`` imports, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


def breaches(source: str, package: str, layer: str) -> list[str]:
    """Return the imports that a layer must not have."""
    # The bare names are other people's packages, for everybody.
    refused = [*UPPER, *(f"spiking_rl.{upper}" for upper in FORBIDDEN[layer])]
    return [name for name in imported(source, package) if any(f"{name}.".startswith(f"{r}.") for r in refused)]


def at_import(source: str, known: set[str], name: str) -> set[str]:
    """Return which of the ``known`` modules a module of that name needs before it is there itself."""
    tree = ast.parse(source)
    for node in ast.walk(tree):  # what functions import, and what only types need, comes later
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            node.body = [ast.Pass()]
    package = name if f"{name}.__init__" in known else name.rpartition(".")[0]
    parts = [found.split(".") for found in imported(ast.unparse(tree), package)]
    needed = {".".join(part[: i + 1]) for part in parts for i in range(len(part))}
    return {n for n in needed & known if not f"{name}.".startswith(f"{n}.")}  # packages around it have begun


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {path for layer in FORBIDDEN for path in files_of(layer)} - {PACKAGE / "__init__.py"}
    names = {".".join(["spiking_rl", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in files}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    known = modules.keys() | names.keys()
    graph = {name: at_import(path.read_text(), known, name) for name, path in modules.items()}
    assert "spiking_rl.neurons" in graph["spiking_rl.networks"]
    list(TopologicalSorter(graph).static_order())  # CycleError names them


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_no_layer_imports_one_above(layer: str) -> None:
    files = files_of(layer)
    assert len(files) > 1
    for path in files:
        package = ".".join(["spiking_rl", *path.relative_to(PACKAGE).parts[:-1]])
        assert breaches(path.read_text(), package, layer) == [], path.name


@pytest.mark.parametrize(
    "source",
    [
        "import spiking_rl.agents",
        "import spiking_rl.agents.dqn as d",
        "from spiking_rl.agents.dqn import SpikingDQN",
        "from spiking_rl import agents",
        "from . import agents",
        "from .agents.dqn import SpikingDQN",
        "import agents",
        "def late():\n    from spiking_rl.scripts.main import main",
        "import importlib\nimportlib.import_module('spiking_rl.envs')",
    ],
)
def test_the_check_sees_every_way_to_import(source: str) -> None:
    assert breaches(source, "spiking_rl", "core")


def test_the_check_allows_what_is_allowed() -> None:
    source = "import torch\nfrom spiking_rl.agentsx import y\nfrom .neurons import LIF\nfrom spiking_rl import LIF"
    assert breaches(source, "spiking_rl", "core") == []
    assert breaches("from spiking_rl.envs import make_single", "spiking_rl.agents", "agents") == []


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_core_imports_nothing_of_the_layers_above() -> None:
    code = "import sys, spiking_rl; print(*sys.modules, sep='\\n')"
    loaded = set(python(code).split())
    assert "spiking_rl.neurons" in loaded
    unwanted = {"gymnasium", "stable_baselines3", "matplotlib", "ale_py", "pygame", "tensorboard", "tyro", "yaml"}
    assert loaded & (unwanted | {f"spiking_rl.{upper}" for upper in UPPER}) == set()


def test_an_agent_that_only_plays_needs_no_compiler_of_torch() -> None:
    """Importing it takes longer than everything else."""
    code = """
import sys
from spiking_rl.agents import DeployedAgent, evaluate, load_agent
model = load_agent("cartpole").model
print(evaluate(model, "CartPole-v1", episodes=1).mean_return, "torch._dynamo" in sys.modules)
model.policy.optimizer
"""
    assert python(code).split() == ["500.0", "False"]


def test_every_module_of_the_core_works_without_the_layers_above() -> None:
    names = [".".join(["spiking_rl", *p.relative_to(PACKAGE).with_suffix("").parts]) for p in files_of("core")]
    names = [n.removesuffix(".__init__") for n in names if not n.endswith("__main__")]
    if importlib.util.find_spec("triton") is None:  # comes with torch for CUDA; spiking_rl.gpu does without it
        names.remove("spiking_rl.gpu_kernels")
    blocked = ["gymnasium", "stable_baselines3", *(f"spiking_rl.{upper}" for upper in UPPER)]
    # None in sys.modules makes an import fail, as if the package were not installed.
    code = f"import sys, importlib\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    python(code + f"for name in {names!r}: importlib.import_module(name)")


def test_the_core_adds_little_to_the_import_of_torch() -> None:
    # Processor time, and the best of several: other work on the machine must not decide.
    code = "import time, torch; a = time.process_time(); import spiking_rl; print(time.process_time() - a)"
    added = [float(python(code)) for _ in range(3)]
    assert min(added) <= 0.25, f"importing spiking_rl took {added} s more than torch"


def test_pruning_decides_without_knowing_what_is_trained() -> None:
    found = {name.split(".")[0] for name in imported((PACKAGE / "pruning.py").read_text(), "spiking_rl")}
    allowed = set(sys.stdlib_module_names) | {"spiking_rl"}
    assert found <= allowed
    ours = {n for n in imported((PACKAGE / "pruning.py").read_text(), "spiking_rl") if n.startswith("spiking_rl")}
    assert ours == {"spiking_rl.errors", "spiking_rl.errors.UserError"}
