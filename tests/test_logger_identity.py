"""Identity of runs on W&B: id, name, group and tags, independent of the environment and of long names."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb

from losslens.tracking.artifacts import log
from losslens.tracking.identity import fit_name
from losslens.tracking.session import RunInfo, session
from tests.test_logger import OFFLINE, about, records

pytestmark = pytest.mark.fast

# All that W&B would take for the identity of a run, some of it nothing that it would accept.
ENVIRONMENT = {
    "WANDB_RUN_ID": "abc",
    "WANDB_RESUME": "must",
    "WANDB_RESUME_FROM": "abc?_step=3",
    "WANDB_FORK_FROM": "abc?_step=3",
    "WANDB_NAME": "theirs",
    "WANDB_RUN_NAME": "theirs",
    "WANDB_NOTES": "theirs",
    "WANDB_RUN_GROUP": "theirs",
    "WANDB_JOB_TYPE": "theirs",
    "WANDB_TAGS": "theirs," + "x" * 65,
    "WANDB_SWEEP_ID": "theirs",
    "WANDB_SWEEP_PARAM_PATH": "/nowhere/sweep.yaml",
    "WANDB_CONFIG_PATHS": "/nowhere/config.yaml",
    "WANDB_LAUNCH": "true",
    "WANDB_CONFIG": '{"rate": 7}',
    "WANDB_PROJECT": "a/b",
    "WANDB_MODE": "shared",
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    """A W&B that has not read the environment yet, and that other tests do not find as it was left."""
    wandb.teardown()
    yield
    wandb.teardown()


ALONE = (["WANDB_RUN_ID"], ["WANDB_SWEEP_ID"], ["WANDB_RESUME", "WANDB_RUN_ID"], ["WANDB_TAGS"], ["WANDB_FORK_FROM"])


@pytest.mark.slow
@pytest.mark.parametrize("variables", [*ALONE, list(ENVIRONMENT)], ids=lambda names: "+".join(names)[:30])
def test_the_environment_does_not_affect_the_identity(
    variables: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in variables:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        with session(OFFLINE, tmp_path, folder, about(folder.name, rate=0.5)) as told:
            told.log(1, {"x": 1.0})
    seen = []
    for folder in folders:
        [run] = [record.run for record in records(folder) if record.HasField("run")]
        seen.append(run.run_id)
        assert (run.display_name, run.run_group, run.job_type) == (folder.name, "sweep", "train")
        assert (run.project, run.sweep_id, run.notes, list(run.tags)) == ("losslens", "", "", ["sft", "r8"])
        assert {i.key: i.value_json for i in run.config.update if i.key == "rate"} == {"rate": "0.5"}
    assert len({*seen, "abc"}) == 3


@pytest.mark.slow
def test_long_names_are_logged(tmp_path: Path) -> None:
    """What is longer than W&B takes is cut, and what differs only behind the cut stays two."""
    names = ["m" * 150 + end for end in "ab"]
    artifacts = []
    for name in names:
        folder = tmp_path / name[-1]
        folder.mkdir()
        with session(OFFLINE, tmp_path, folder, RunInfo(name, "train", name, [name, "r8"], {"run": name})) as told:
            log(told, "adapter", name, folder, [])
        found = records(folder)
        [run] = [record.run for record in found if record.HasField("run")]
        assert len(run.display_name) == len(run.run_group) == 128
        assert len(run.tags[0]) == 64
        [artifact] = [r.request.log_artifact.artifact.name for r in found if r.request.HasField("log_artifact")] or [
            r.artifact.name for r in found if r.HasField("artifact")
        ]
        assert len(artifact) == 128
        artifacts.append((run.display_name, run.run_group, run.tags[0], artifact))
    for one, other in zip(*artifacts, strict=True):
        assert one != other


def test_short_names_are_unchanged() -> None:
    assert fit_name("x" * 64, 64) == "x" * 64
    assert len(fit_name("x" * 65, 64)) == 64
