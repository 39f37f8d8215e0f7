"""Sweeps on a real single-node Slurm, started by `launch/local_slurm.sh`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

from losslens.core.files import read_json
from losslens.runs.run import Run
from losslens.scheduling import status as statuses
from losslens.scheduling.status import NOT_REQUEUED, refresh_run_statuses
from tests.conftest import ROOT, SMALL, script

pytestmark = pytest.mark.slurm

SLURM = ["hydra/launcher=slurm", "resources=cpu", "resources.cpus=1", "resources.memory_gb=2", "logger=none"]
METHODS = "method=sft,rift,dpo"
SLOW = ["method=sft", "method._target_=slow_method.SlowSft", "method.name=slow_sft", "optim.save_steps=2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which commands find a Slurm of their own."""
    folder = Path(tempfile.mkdtemp(prefix="ls-"))  # its path is short, as Unix sockets want it
    local = ROOT / "launch" / "local_slurm.sh"
    up = subprocess.run(
        [local, "up", folder], capture_output=True, text=True, env={**os.environ, "LOCAL_SLURM_CPUS": "6"}, check=False
    )
    if up.returncode == 2 and "CI" not in os.environ:
        pytest.skip(up.stderr)
    assert up.returncode == 0, up.stderr
    line = re.fullmatch(r"export SLURM_CONF=(\S+)\n", up.stdout)
    assert line is not None, up.stdout
    try:
        yield {"SLURM_CONF": line[1], "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    finally:
        subprocess.run([local, "down", folder], check=True, capture_output=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def slurm(cluster: dict[str, str], monkeymodule: pytest.MonkeyPatch) -> None:
    """This process and those it starts belong to the cluster."""
    for name, value in cluster.items():
        monkeymodule.setenv(name, value)


@pytest.fixture(scope="module")
def monkeymodule() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output folder, whose rollouts are made by the first sweep."""
    return tmp_path_factory.mktemp("slurm")


def submit(outputs: Path, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    return script("train.py", "-m", *SMALL, *SLURM, f"output_dir={outputs}", *arguments, check=check)


def here(outputs: Path, *arguments: str) -> None:
    """The same without Slurm."""
    script("train.py", *SMALL, "logger=none", f"output_dir={outputs}", *arguments)


def run_in(outputs: Path, sweep: str, pattern: str = "*-s*") -> Path:
    (folder,) = [file.parent for file in (outputs / sweep).glob(f"{pattern}/status.json")]
    return folder


def status(run: Path) -> dict[str, Any]:
    return read_json(run / "status.json")


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def wait_until(what: Callable[[], object], seconds: float = 480) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"it did not come to pass\n{_jobs_and_logs()}"
        time.sleep(0.2)


def _jobs_and_logs() -> str:
    """What Slurm knows of the jobs, and the ends of their logs."""
    line = ["scontrol", "--oneliner", "show", "jobs"]
    jobs = subprocess.run(line, capture_output=True, text=True, check=False).stdout
    logs = {line.partition("StdOut=")[2].split(" ")[0] for line in jobs.splitlines()}
    ends = [f"{log}:\n{Path(log).read_text(errors='replace')[-1500:]}" for log in sorted(logs) if Path(log).is_file()]
    return "\n".join([jobs, *ends])


def sealed(run: Path) -> Callable[[], bool]:
    """It trains, and has a whole checkpoint to go on from: its status tells of a step before that is kept."""
    return lambda: status(run)["state"] == "running" and any(run.glob("checkpoints/checkpoint-*/sealed.json"))


def ended(run: Path) -> Callable[[], bool]:
    return lambda: status(run)["state"] in ("completed", "failed")


def job(run: Path) -> str:
    return read_json(run / "slurm.json")["job"]


def slurm_says(run: Path, field: str = "JobState") -> str:
    told = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job(run)], capture_output=True, text=True, check=True
    )
    return re.search(rf"\b{field}=(\S+)", told.stdout)[1]  # type: ignore[index]


def kill(run: Path) -> None:
    """Kills the process of a run's job, as the kernel does when memory is short."""
    array, _, task = job(run).partition("_")
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if "submitit.core._submit" not in words or "srun" in words[0]:
            continue
        try:
            environment = process.environ()
        except psutil.NoSuchProcess:  # another job's, which has ended meanwhile
            continue
        ids = (
            environment.get("SLURM_ARRAY_JOB_ID", environment["SLURM_JOB_ID"]),
            environment.get("SLURM_ARRAY_TASK_ID", ""),
        )
        if ids == (array, task):
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no process of {run.name}")


def log_of(run: Path) -> str:
    return Path(read_json(run / "slurm.json")["log"]).read_text(encoding="utf-8", errors="replace")


def at_once(run: Path) -> None:
    """Spares the six seconds for which Slurm holds a job that was put back."""
    subprocess.run(["scontrol", "update", f"JobId={job(run)}", "StartTime=now"], capture_output=True, check=False)


@pytest.fixture(scope="module")
def swept(slurm: None, outputs: Path) -> Path:
    """A sweep of three, submitted twice, and waited for."""
    first = submit(outputs, METHODS)
    assert first.stdout.count("submitted as") == 4  # the rollouts before them
    ids = set(re.findall(r"submitted as (\d+)", first.stdout))
    assert len(ids) == 2, "one job for the rollouts, one array for the runs"
    assert f"status.py sweep=main output_dir={outputs} --watch\n" in first.stdout
    # Meanwhile a run that takes longer than its limit of two minutes. It waits for the same rollouts. Slurm signals up
    # to a minute before it was asked to, so that of a limit of one minute nothing may be left on a slow machine.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLOW_SECONDS", "12")
        limited = submit(outputs, *SLOW, "sweep=limit", "resources.time=2", "resources.signal_seconds=20")
        assert limited.stdout.count("submitted as") == 1
    again = submit(outputs, METHODS, "hydra.launcher.wait=true")
    assert again.stdout.count("in the queue as") == 3
    assert "submitted as" not in again.stdout
    assert again.stdout.count(": completed") == 3
    return outputs / "main"


@pytest.fixture(scope="module")
def reference(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of the slow method, trained here in one go."""
    alone = tmp_path_factory.mktemp("alone")
    here(alone, *SLOW, frozen(swept.parent))
    return adapter(run_in(alone, "main"))


def frozen(outputs: Path) -> str:
    return f"rollouts.path={next((outputs / 'rollouts').glob('arithmetic-*'))}"


def test_a_sweep_of_three(swept: Path, tmp_path: Path) -> None:
    runs = [file.parent for file in swept.glob("*-s42-*/status.json")]
    assert len(runs) == 3
    assert {status(run)["state"] for run in runs} == {"completed"}
    wait_until(lambda: {slurm_says(run) for run in runs} == {"COMPLETED"})  # the process ends a little later
    shown = script("launch/status.py", "sweep=main", f"output_dir={swept.parent}").stdout
    for run in runs:
        (row,) = [line for line in shown.splitlines() if run.name in line]
        assert "12/12" in row
        assert f"{job(run)} COMPLETED" in row
    # What a job trains is what the same command trains here.
    here(tmp_path, "method=dpo", frozen(swept.parent))
    assert adapter(run_in(swept.parent, "main", "dpo-*")) == adapter(run_in(tmp_path, "main", "dpo-*"))
    done = submit(swept.parent, METHODS)
    assert done.stdout.count("skipped: completed") == 3
    assert "Submitted" not in done.stdout


def test_killed_cancelled_and_failed_runs_say_so_and_the_same_line_finishes_them(
    swept: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = swept.parent
    monkeypatch.setenv("SLOW_SECONDS", "3")
    submit(outputs, *SLOW, "sweep=deaths", "seed=42,43,44")
    monkeypatch.setenv("FAIL", "1")
    submit(outputs, *SLOW, "sweep=deaths", "seed=45")
    monkeypatch.delenv("FAIL")
    submit(outputs, *SLOW, "sweep=deaths", "seed=46", "resources.memory_gb=0.3")
    killed, cancelled, fine, raising, large = (run_in(outputs, "deaths", f"*-s{n}-*") for n in range(42, 47))
    for run in (killed, cancelled):
        wait_until(sealed(run))
    kill(killed)
    subprocess.run(["scancel", job(cancelled)], check=True)
    wait_until(lambda: {status(run)["state"] for run in (killed, cancelled, raising, large)} == {"failed"})
    assert status(fine)["state"] != "failed"  # "completed" below, by its first submission
    log = read_json(killed / "slurm.json")["log"]
    assert status(killed)["error"] == (
        f"Slurm job {job(killed)}: killed by SIGKILL, manually or because it ran out of memory; log: {log}"
    )
    assert status(cancelled)["error"] == "cancelled (scancel)"
    assert status(cancelled)["slurm"]["log"] == read_json(cancelled / "slurm.json")["log"]
    assert status(raising)["error"] == "RuntimeError: this loss was told to fail"
    wait_until(lambda: "this loss was told to fail" in log_of(raising))
    assert status(large)["error"].startswith(f"Slurm job {job(large)}: out of memory (resources.memory_gb); log: ")
    wait_until(lambda: [slurm_says(run) for run in (killed, cancelled, raising)] == ["FAILED", "CANCELLED", "FAILED"])

    monkeypatch.setenv("SLOW_SECONDS", "0")
    again = submit(outputs, *SLOW, "sweep=deaths", "seed=42,43,44,45,46", "hydra.launcher.wait=true")
    assert again.stdout.count("submitted as") == 4
    for run in (killed, cancelled, fine, raising, large):
        assert status(run)["state"] == "completed"
        assert "error" not in status(run)
    assert adapter(killed) == reference
    assert read_json(killed / "manifest.json")["training"]["resumed_from"] > 0


def test_a_pipeline_analyses_what_it_has_trained(swept: Path) -> None:
    outputs = swept.parent
    arguments = ["method=sft", *SMALL, *SLURM[1:], f"output_dir={outputs}", "sweep=chain"]
    pipeline = subprocess.run(
        [ROOT / "launch" / "pipeline.sh", *arguments, "analyze.probe_set.problems=8", "analyze.pairs=none"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert pipeline.returncode == 0, pipeline.stderr
    assert pipeline.stdout.count("submitted as") == 2
    (analysis,) = (outputs / "chain" / "slurm").glob("analyze-*.json")
    waits = ["squeue", "--noheader", "--format=%E", f"--jobs={read_json(analysis)['job']}"]
    assert (
        f"afterany:{job(run_in(outputs, 'chain', 'sft-*')).partition('_')[0]}"
        in subprocess.run(waits, capture_output=True, text=True, check=True).stdout
    )
    # A benchmark more, and the analysis of that, are further links.
    evaluation = script(
        "evaluate.py", *SLURM[:-1], f"output_dir={outputs}", "sweep=chain", "benchmark=one_step",
        "benchmark.one_step.eval_size=20", "evaluation.max_tokens=32",
    )  # fmt: skip
    assert evaluation.stdout.count("submitted as") == 1
    wait_until((outputs / "chain" / "analysis" / "report.html").exists)
    wait_until((run_in(outputs, "chain", "sft-*") / "eval" / "one_step.parquet").exists)


def test_two_processes_share_a_run_and_stop_at_the_same_step(
    swept: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_SECONDS", "2")
    submit(swept.parent, *SLOW, "sweep=shared", "resources.sbatch={ntasks-per-node: 2}")
    run = run_in(swept.parent, "shared")
    wait_until(sealed(run))
    subprocess.run(["scancel", "--signal=USR2", job(run)], check=True)  # what Slurm sends when the time is nearly up
    wait_until(lambda: status(run)["state"] == "preempted")
    wait_until(ended(run))
    assert status(run)["state"] == "completed"
    assert int(slurm_says(run, "Restarts")) == 1
    facts = read_json(run / "manifest.json")["training"]
    assert facts["processes"] == 2
    assert facts["resumed_from"] > 0
    theirs, alone = safetensors.torch.load(adapter(run)), safetensors.torch.load(reference)
    for name, tensor in alone.items():
        assert torch.linalg.norm(theirs[name] - tensor) <= 1e-3 * torch.linalg.norm(tensor)


def test_resumes_in_a_new_attempt_after_its_time_limit(swept: Path, reference: bytes) -> None:
    run = run_in(swept.parent, "limit")
    wait_until(ended(run))
    assert status(run)["state"] == "completed"
    assert int(slurm_says(run, "Restarts")) >= 1
    assert read_json(run / "manifest.json")["training"]["resumed_from"] > 0
    assert adapter(run) == reference
    assert "Traceback" not in log_of(run)


def test_a_preempted_run_resumes_with_the_submitted_code(
    swept: Path, reference: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(
        ROOT,
        checkout,
        ignore=lambda folder, names: (
            {*names} - {"src", "conf"} - {name for name in names if Path(folder) != ROOT or name.endswith(".py")}
        ),
    )
    git = ["git", "-C", checkout, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=as submitted"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setenv("PYTHONPATH", f"{checkout / 'src'}:{ROOT / 'tests'}")
    monkeypatch.setenv("SLOW_SECONDS", "2")
    arguments = ["-m", *SMALL, *SLURM, *SLOW, f"output_dir={swept.parent}", "sweep=edited"]
    subprocess.run([sys.executable, "train.py", *arguments], cwd=checkout, check=True, capture_output=True)
    run = run_in(swept.parent, "edited")
    wait_until(sealed(run))

    for file in (checkout / "src").rglob("*.py"):
        file.write_text("raise SystemExit('not as it was submitted')\n", encoding="utf-8")
    for file in checkout.glob("*.py"):
        file.unlink()
    shutil.rmtree(checkout / "conf")
    # Takes the whole node, from a partition whose jobs come first.
    subprocess.run(["srun", "--partition=urgent", "--cpus-per-task=6", "--mem=100", "true"], check=True)
    wait_until(ended(run))
    assert status(run)["state"] == "completed"
    assert int(slurm_says(run, "Restarts")) >= 1
    assert adapter(run) == reference
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert read_json(run / "manifest.json")["code"] == {"commit": commit, "dirty_diff": ""}


def test_a_dry_run_says_what_would_be_submitted_and_writes_nothing(slurm: None, tmp_path: Path) -> None:
    said = submit(
        tmp_path, "method=sft,dpo", "resources.time=90", "resources.sbatch={nice: 5}", "hydra.launcher.dry_run=true"
    )
    assert said.stdout.count("would be submitted") == 3
    assert said.stdout.count("#!/bin/bash") == 2
    for line in (
        "#SBATCH --array=0-1%2",
        "#SBATCH --dependency=afterok:ROLLOUTS",
        "#SBATCH --time=90",
        "#SBATCH --nice=5",
    ):
        assert line in said.stdout
    assert "(3 jobs in 2 calls of sbatch)" in said.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def closed(slurm: None) -> Iterator[None]:
    """A partition that takes no jobs."""
    scontrol("create", "PartitionName=closed", "Nodes=ALL", "State=INACTIVE")
    yield
    scontrol("delete", "PartitionName=closed")


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["resources.partition=nowhere"], "partition=nowhere"),
        (["resources.partition=closed"], "partition=closed"),
        (["resources.gpus=1"], "gpus=1"),
        (["resources.memory_gb=1e6"], "memory_gb=1000000.0"),
        (["resources.time=soon"], "resources: time=soon"),
        (["resources.time=1"], "signal_seconds=120"),
        (["resources.cpus=0"], "resources.cpus"),
        (["resources.sbatch={no-such-flag: 1}"], "no-such-flag"),
        (["optim.max_steps=0"], "optim.max_steps"),
    ],
)
def test_what_slurm_or_the_configuration_refuses_ends_in_one_line(
    closed: None, tmp_path: Path, arguments: list[str], named: str
) -> None:
    refused = submit(tmp_path, "method=sft,dpo", *arguments, check=2)
    (line,) = refused.stderr.splitlines()
    assert line.startswith("train.py: ")
    assert named in line
    assert refused.stdout == ""
    assert not list(tmp_path.glob("*/*/status.json"))
    assert not list(tmp_path.glob("*/slurm"))
    queue = subprocess.run(["squeue", "--noheader", "--format=%Z %o"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in queue.stdout


def test_without_slurm_it_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    refused = submit(tmp_path, "method=sft,dpo", check=2)
    reason = "sbatch not found on this machine; submit from a machine of a Slurm cluster"
    assert refused.stderr == f"train.py: hydra/launcher=slurm: {reason}\n"


def test_several_gpus_without_slurm_end_in_one_line(tmp_path: Path) -> None:
    refused = script("train.py", "resources.gpus=4", f"output_dir={tmp_path}", check=2)
    (line,) = refused.stderr.splitlines()
    assert "torchrun --nproc_per_node=4 train.py" in line


SUBMIT_AND_KILL = r"""#!/bin/bash
[ "$1" = --test-only ] && exec {sbatch} "$@"
{sbatch} "$@" >> {log} && kill -9 $PPID
"""


def test_a_command_killed_after_sbatch_has_answered_submits_nothing_twice(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command finds its jobs in the queue by their comment: one array, and one run of each."""
    log = tmp_path / "answered"
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(SUBMIT_AND_KILL.format(sbatch=shutil.which("sbatch"), log=log), encoding="utf-8")
    wrapper.chmod(0o755)
    line = ["method=sft,rft", "sweep=cut", "data.eval_size=0", "optim.max_steps=2", frozen(swept.parent)]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        assert submit(swept.parent, *line, check=None).returncode == -signal.SIGKILL
    again = submit(swept.parent, *line, "hydra.launcher.wait=true")
    array = log.read_text(encoding="utf-8").split()[-1]
    assert f"job {array}: recovered" in again.stdout
    assert "submitted as" not in again.stdout
    runs = [file.parent for file in (swept.parent / "cut").glob("*-s42-*/status.json")]
    assert {job(run) for run in runs} == {f"{array}_0", f"{array}_1"}
    assert all(status(run)["state"] == "completed" for run in runs)
    assert all(status(run)["slurm"]["job"] == job(run) for run in runs)


def test_a_run_that_slurm_preempts_and_does_not_requeue_is_resumed_by_the_same_command(
    swept: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_SECONDS", "2")
    line = [*SLOW, "sweep=spot", "resources.partition=spot"]
    scontrol("create", "PartitionName=spot", "Nodes=ALL", "PriorityTier=1", "PreemptMode=CANCEL", "GraceTime=0")
    submit(swept.parent, *line)
    run = run_in(swept.parent, "spot")
    wait_until(sealed(run))
    scontrol("update", f"JobId={job(run)}", "Requeue=0")  # else it would put itself back into the queue
    subprocess.run(["srun", "--partition=urgent", "--cpus-per-task=6", "--mem=100", "true"], check=True)
    wait_until(lambda: slurm_says(run) == "PREEMPTED", seconds=60)
    assert (status(run)["state"], status(run)["error"]) == ("preempted", NOT_REQUEUED)
    shown = script("launch/status.py", "sweep=spot", f"output_dir={swept.parent}", check=1).stdout
    assert f"{job(run)} PREEMPTED" in shown
    assert NOT_REQUEUED.partition(",")[0] in shown
    monkeypatch.setenv("SLOW_SECONDS", "0")
    again = submit(swept.parent, *line, "hydra.launcher.wait=true")
    assert again.stdout.count("submitted as") == 1
    assert status(run)["state"] == "completed"
    assert read_json(run / "manifest.json")["training"]["resumed_from"] > 0
    assert adapter(run) == reference


def up(folder: Path) -> None:
    """Starts what does not run of the Slurm in a folder."""
    line = [ROOT / "launch" / "local_slurm.sh", "up", folder]
    outcome = subprocess.run(line, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_a_node_on_which_jobs_end_is_up(cluster: dict[str, str], slurm: None) -> None:
    """One may go on submitting while a step takes long to die, and `up` does not wait for it."""
    told = subprocess.run(
        ["sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600"], capture_output=True, text=True, check=True
    )
    number = told.stdout.strip()
    steps: list[psutil.Process] = []

    def found() -> bool:
        for process in psutil.process_iter(["cmdline"]):
            if " ".join(process.info["cmdline"] or []).startswith(f"slurmstepd: [{number}."):
                steps.append(process)
        return bool(steps)

    wait_until(found, seconds=60)
    try:
        for step in steps:
            step.suspend()  # now nothing of the job can die
        subprocess.run(["scancel", number], check=True)
        state = ["sinfo", "--noheader", "--format=%T"]
        wait_until(
            lambda: subprocess.run(state, capture_output=True, text=True, check=True).stdout == "completing\n", 60
        )
        up(Path(cluster["SLURM_CONF"]).parents[1])
    finally:
        for step in steps:
            step.resume()


SUBMIT_AND_GO_DOWN = r"""#!/bin/bash
[ "$1" = --test-only ] && exec {sbatch} "$@"
{sbatch} "$@" >> {log}
pid=$(cat {pid})
kill $pid
while kill -0 $pid 2>/dev/null; do sleep 0.1; done
echo "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)" >&2
exit 1
"""


def test_what_a_controller_that_went_down_has_accepted_is_found_when_it_is_up_again(
    cluster: dict[str, str], swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a part of the array is cancelled, which Slurm forgets, and the folder of logs of the others is deleted."""
    folder = Path(cluster["SLURM_CONF"]).parents[1]
    wrapper, log = tmp_path / "bin" / "sbatch", tmp_path / "answered"
    wrapper.parent.mkdir()
    text = SUBMIT_AND_GO_DOWN.format(sbatch=shutil.which("sbatch"), log=log, pid=folder / "run" / "slurmctld.pid")
    wrapper.write_text(text, encoding="utf-8")
    wrapper.chmod(0o755)
    line = ["method=sft,rft,dft", "sweep=held", "data.eval_size=0", "resources.sbatch={hold: true}"]
    line.append(frozen(swept.parent))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        refused = submit(swept.parent, *line, check=2)
    (said,) = refused.stderr.splitlines()
    assert said.endswith("cannot be told now: repeat the command")
    up(folder)
    again = submit(swept.parent, *line)
    array = log.read_text(encoding="utf-8").split()[-1]
    assert f"job {array}: recovered" in again.stdout
    assert "submitted as" not in again.stdout

    runs = {job(file.parent): Run(file.parent) for file in (swept.parent / "held").glob("*-s42-*/status.json")}
    assert sorted(runs) == [f"{array}_{task}" for task in range(3)]
    subprocess.run(["scancel", f"{array}_1"], check=True)
    assert {each.is_over for each in refresh_run_statuses(runs.values())} == {False}  # Slurm may only be late
    monkeypatch.setattr(statuses, "_LAG_SECONDS", 0.0)
    told = {each.job: each for each in refresh_run_statuses(runs.values())}
    assert [told[f"{array}_{task}"].state for task in range(3)] == ["queued", "failed", "queued"]
    assert "cancelled before it started (scancel)" in told[f"{array}_1"].status["error"]

    logs = swept.parent / "held" / "slurm"
    shutil.rmtree(logs)
    scontrol("release", f"{array}_0", f"{array}_2")
    wait_until(lambda: {slurm_says(runs[f"{array}_{task}"].folder) for task in (0, 2)} == {"FAILED"}, seconds=60)
    for each in refresh_run_statuses([runs[f"{array}_0"], runs[f"{array}_2"]]):
        assert each.state == "failed"
        assert each.status["error"].endswith(f"its folder of logs and code is gone: {logs}")
