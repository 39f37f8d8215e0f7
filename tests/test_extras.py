"""What `pip install losslens` without extras can do, and how the rest says what it lacks."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

from losslens.core import extras
from losslens.updates.folder import write_adapter
from losslens.updates.lora import LoraUpdate
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Modules that come with a package that is declared, by that package.
THROUGH = {"latex2sympy2_extended": "math-verify", "sympy": "math-verify", "yaml": "omegaconf"}


def distributions(requirements: list[str]) -> set[str]:
    return {name_of(requirement) for requirement in requirements}


def name_of(requirement: str) -> str:
    return requirement.split(">")[0].split("=")[0].split("<")[0].lower().replace("_", "-")


installed = cache(packages_distributions)  # it reads the list of files of every package


def distribution_of(module: str) -> str:
    return THROUGH.get(module) or name_of(installed()[module][0])


@pytest.mark.parametrize("extra", extras.MODULES)
def test_the_modules_of_an_extra_are_those_of_its_packages(extra: str) -> None:
    assert {distribution_of(module) for module in extras.MODULES[extra]} == distributions(
        PROJECT["optional-dependencies"][extra]
    )


def test_all_is_every_extra_that_is_not_for_developers() -> None:
    named = PROJECT["optional-dependencies"]["all"][0].removeprefix("losslens[").removesuffix("]").split(",")
    assert set(named) == PROJECT["optional-dependencies"].keys() - {"all", "dev", "docs"} == extras.MODULES.keys()


def test_everything_that_is_imported_is_declared() -> None:
    of_extras = {module for modules in extras.MODULES.values() for module in modules}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in {name.partition(".")[0] for name in names} - {"losslens", "hydra_plugins"}:
                if module not in sys.stdlib_module_names and module not in of_extras:
                    assert distribution_of(module) in distributions(PROJECT["dependencies"]), (file, module)


def told(folder: Path, without: tuple[str, ...], *lines: list[str]) -> list[tuple[int, str]]:
    """How command lines end, and what they print, where these extras are not installed."""
    (folder / "lines.json").write_text(json.dumps(lines))
    command = [sys.executable, ROOT / "tests" / "without_extras.py", ",".join(without), folder / "lines.json"]
    outcome = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return [tuple(json.loads(line)) for line in outcome.stdout.splitlines()]


def test_each_command_says_which_extra_it_needs(tmp_path: Path) -> None:
    server = ["rollouts.engine=openai", "rollouts.server.model=x"]
    expected = {
        ("train", "logger=none"): "losslens train needs: pip install 'losslens[train]'",
        ("rollout", *server): "losslens rollout needs: pip install 'losslens[train,server]'",
        ("evaluate", "sweep=main"): "losslens evaluate needs: pip install 'losslens[train]'",
        ("analyze", "sweep=main"): "losslens analyze needs: pip install 'losslens[train,report]'",
        ("train", "hydra/launcher=slurm", "logger=none"): "losslens train needs: pip install 'losslens[slurm]'",
        ("compare", "a", "b"): "losslens compare needs: pip install 'losslens[report]'",
        ("sync", "sweep=main"): "losslens sync needs: pip install 'losslens[wandb]'",
        ("dashboard", "sweep=main"): "losslens dashboard needs: pip install 'losslens[wandb]'",
    }
    for (status, said), line in zip(
        told(tmp_path, tuple(extras.MODULES), *map(list, expected)), expected.values(), strict=True
    ):
        assert (status, said) == (2, f"{line}\n")
    [(status, said), (done, _)] = told(
        tmp_path, tuple(extras.MODULES), ["status", "sweep=nothing"], ["migrate", "output_dir=."]
    )
    assert (status, said) == (2, "losslens status: sweep=nothing: no such sweep: outputs/nothing does not exist\n")
    assert done == 0


def test_who_has_no_wandb_may_go_without(tmp_path: Path) -> None:
    lines = [["train"], ["train", "logger=none", "evaluation.engine=openai"]]
    found = told(tmp_path, ("wandb", "server", "report", "slurm"), *lines)
    assert found[0] == (2, "losslens train needs: pip install 'losslens[wandb]', or logger=none\n")
    assert found[1] == (2, "losslens train needs: pip install 'losslens[server]'\n")


def test_the_command_compares_with_the_report_alone(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        module = {"model.layers.0.q_proj": LoraUpdate(draw.normal(size=(12, 2)), draw.normal(size=(2, 8)), 1.0)}
        write_adapter(tmp_path / name, module, {"peft_type": "LORA"})
    rest = tuple(extra for extra in extras.MODULES if extra != "report")
    [(status, said), (refused, why)] = told(tmp_path, rest, ["compare", "a", "b"], ["compare", "a", "me/theirs"])
    assert status == 0, said
    assert (tmp_path / "outputs" / "adapters" / "analysis" / "report.html").exists()
    assert (refused, why) == (2, "losslens compare needs: pip install 'losslens[train]'\n")


def test_adapters_are_compared_without_any_extra(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        module = {"model.layers.0.q_proj": LoraUpdate(draw.normal(size=(12, 2)), draw.normal(size=(2, 8)), 1.0)}
        write_adapter(tmp_path / name, module, {"peft_type": "LORA"})
    code = """
import losslens
from losslens.core.extras import MODULES
from without_extras import block
block(*MODULES)
comparison = losslens.compare(["a", "b"])
assert comparison.pairs["cosine"].notna().all()
print(comparison.matrix())
try:
    comparison.cosines()
except Exception as error:
    print(type(error).__name__, error)
"""
    (tmp_path / "code.py").write_text(f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\n{code}")
    outcome = subprocess.run([sys.executable, "code.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines()[-1] == "MissingExtraError needs: pip install 'losslens[report]'"
