"""LossLens as it is installed: its wheel in a folder of its own, called by `losslens` from an empty one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from losslens.cli.arguments import explain_rejection, flags_first, prepare_arguments
from losslens.config.training import TrainConfig
from losslens.core import commands, provenance
from losslens.core.errors import InputError
from losslens.scheduling.code_snapshot import script_in, snapshot_code
from tests.conftest import ROOT

COMMANDS = ("rollout", "train", "evaluate", "analyze", "compare", "status", "sync", "dashboard", "migrate", "slurm")
OWN_LOSS = """
from typing import Literal

from losslens.losses import Loss


class MyLoss(Loss):
    title = "Mine"
    name: Literal["mine"]
    share: float = 0.5

    def terms(self, batch):
        return -self.share * batch.logps
"""
SMALL = [
    "data.train_size=8", "data.eval_size=4", "rollouts.policy=base", "rollouts.samples_per_prompt=2",
    "rollouts.max_tokens=24",
    "evaluation.max_tokens=8", "rollouts.accept=mostly_cut", "optim.max_steps=1", "optim.batch_size=2", "logger=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    line = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


Losslens = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def losslens(site: Path, tmp_path: Path) -> Losslens:
    """Calls the wheel's `losslens` from an empty folder."""
    (tmp_path / "here").mkdir()
    script = tmp_path / "bin" / "losslens"  # as pip writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom losslens.cli.main import main\nsys.exit(main())\n")

    def call(*arguments: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, str(script), *arguments]
        options = {"cwd": tmp_path / "here", "env": environment, "capture_output": True, "text": True}
        outcome = subprocess.run(line, check=False, **options)
        assert outcome.returncode == check, f"{outcome.stdout[-2000:]}\n{outcome.stderr[-2000:]}"
        return outcome

    return call


def test_everything_that_is_no_code_is_in_the_wheel(site: Path) -> None:
    for top, there in ((ROOT / "src", site), (ROOT / "conf", site / "losslens" / "conf")):
        files = {
            file.relative_to(top)
            for file in top.rglob("*")
            if file.is_file() and not {"__pycache__", "losslens.egg-info"} & {*file.parts}
        }
        assert not {file for file in files if not (there / file).is_file()}
    [about] = site.glob("losslens-*.dist-info")
    assert "losslens = losslens.cli.main:main" in (about / "entry_points.txt").read_text()


def test_it_says_what_it_can(losslens: Losslens) -> None:
    told = losslens().stdout
    assert told == losslens("--help").stdout
    assert [line.split()[0] for line in told.splitlines() if line.startswith("  ")] == list(COMMANDS)


def test_what_is_no_command(losslens: Losslens) -> None:
    for name, hint in (
        ("trian", "losslens train?"),
        ("method=sft", "the command comes first"),
        ("xyz", "rollout, train"),
    ):
        [line] = losslens(name, check=2).stderr.splitlines()
        assert line.startswith(f"losslens: {name}: not a command; ")
        assert hint in line


def test_saying_so_takes_no_library() -> None:
    line = [sys.executable, "-X", "importtime", "-m", "losslens"]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.splitlines()}
    assert not imported & {"torch", "hydra", "omegaconf", "numpy", "pandas", "rich", "pydantic"}


def test_help_is_in_its_own_words(losslens: Losslens) -> None:
    told = losslens("train", "--help").stdout
    assert "Usage:    losslens train [-m]" in told
    assert "train.py" not in told


@pytest.mark.parametrize("name", ["status", "sync", "dashboard"])
def test_messages_begin_with_the_name_it_was_called_by(name: str, losslens: Losslens) -> None:
    [line] = losslens(name, "sweep=nothing", check=2).stderr.splitlines()
    assert line.startswith(f"losslens {name}: sweep=nothing")


def test_slurm_tells_what_it_can(losslens: Losslens) -> None:
    assert 'eval "$(losslens slurm up)"' in losslens("slurm").stdout
    assert losslens("slurm", "ups", check=2).stderr == "losslens slurm: ups: did you mean up?\n"
    assert losslens("slurm", "status", "/nowhere", check=1).stderr.startswith("losslens slurm: not up: ")
    assert "losslens slurm pipeline method=" in losslens("slurm", "pipeline", "--help").stdout


def test_a_loss_and_a_configuration_of_ones_own(losslens: Losslens, tmp_path: Path) -> None:
    """From an empty folder, by the wheel: outputs/ lies there, and the printed command is of the wheel too."""
    here = tmp_path / "here"
    (here / "mine.py").write_text(OWN_LOSS)
    (here / "my_conf" / "method").mkdir(parents=True)
    (here / "my_conf" / "method" / "mine.yaml").write_text("_target_: mine.MyLoss\nname: mine\nshare: 0.25\n")
    outcome = losslens("train", "method=mine", "--config-dir", "my_conf", *SMALL)
    [run] = (here / "outputs" / "main").glob("mine-*")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"].startswith("losslens train --config-dir my_conf method=mine ")
    assert manifest["options"]["share"] == 0.25
    assert manifest["code"] == {"commit": None, "dirty_diff": None}
    [line] = [line for line in outcome.stdout.splitlines() if line.startswith("Compare the weights:  ")]
    assert line.endswith("losslens analyze sweep=main")
    assert losslens("status").stdout.count("completed") == 2


def test_options_of_ones_own_are_known_to_what_explains(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("_target_: mine.MyLoss\nname: mine\nshare: 0.25\n")
    own = ["--config-dir", str(tmp_path)]
    assert "did you mean method=mine?" in explain_rejection([*own, "method=mnie"], ROOT / "conf", TrainConfig)
    assert explain_rejection([*own, "method=mine", "method.share=1"], ROOT / "conf", TrainConfig) == ""
    assert "No method/mine.yaml" in explain_rejection(["method=mine"], ROOT / "conf", TrainConfig)
    with pytest.raises(InputError, match="--config-dir nowhere: no such folder"):
        prepare_arguments(["--config-dir=nowhere", "method=sft"], "train.py", TrainConfig, ROOT / "conf")


def test_flags_stand_anywhere_in_what_hydra_reads() -> None:
    line = ["method=sft", "--cfg", "job", "seed=1", "-m", "--config-dir", "a=b", "sweep=x", "--info", "lr=matched"]
    assert flags_first(line) == [
        "--cfg", "job", "-m", "--config-dir", "a=b", "--info", "method=sft", "seed=1", "sweep=x", "lr=matched",
    ]  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as one that `losslens train` has started."""
    monkeypatch.setattr(commands._Caller, "installed", True)
    monkeypatch.setattr(commands._Caller, "subcommand", "train")


@pytest.mark.usefixtures("installed")
def test_commands_that_are_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the console script where it is the one on the path, by its path, or as a module where it has none."""
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "venv" / "bin"
    beside.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    line = commands.format_command("launch/wandb_sync.py", "main", "o")
    assert line == "venv/bin/python -m losslens sync sweep=main output_dir=o"
    (beside / "losslens").touch(mode=0o755)
    assert commands.format_command("analyze.py", "main", "outputs") == "venv/bin/losslens analyze sweep=main"
    monkeypatch.setenv("PATH", str(beside))
    assert commands.format_command("launch/status.py", "main", "outputs", "--watch") == (
        "losslens status sweep=main --watch"
    )
    monkeypatch.setattr(sys, "argv", ["losslens train", "-m", "method=sft,dpo"])
    assert provenance.command_line() == "losslens train -m method=sft,dpo"


def test_a_job_takes_along_what_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN_LOSS)
    script = ROOT / "src" / "losslens" / "cli" / "train.py"
    copy = snapshot_code(script, tmp_path / "slurm")
    assert (copy / "mine.py").read_text() == OWN_LOSS
    assert script_in(copy, script).read_bytes() == script.read_bytes()
    assert script_in(copy, ROOT / "train.py") == copy / "train.py"
