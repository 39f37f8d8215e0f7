"""Planning and submission with recorded Slurm commands; needs no Slurm."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from losslens.config.parse import parse
from losslens.config.slurm import Resources
from losslens.core.errors import InputError
from losslens.core.files import read_json
from losslens.runs.run import Run
from losslens.scheduling import status
from losslens.scheduling.code_snapshot import snapshot_code
from losslens.scheduling.record import record_file
from losslens.scheduling.slurm import cluster, intent, submit
from losslens.scheduling.slurm.launch import launch
from losslens.scheduling.status import describe_exit, refresh_run_statuses
from tests.conftest import ROOT

RECORDER = r"""#!/bin/bash
if [ "$1" = --test-only ] && ! grep -q -- '--account=mine$' ; then exit 0; fi
if [ "$1" = --test-only ]; then
    echo "sbatch: error: allocation failure: Invalid account or account/partition combination specified" >&2
    exit 1
fi
cat "$1" >> "$RECORD/calls"; printf '\n--- end\n' >> "$RECORD/calls"
number=$(grep -c -- '^--- end' "$RECORD/calls")
if [ "$number" = "$REFUSE_FROM" ]; then
    echo "sbatch: error: Batch job submission failed: Too many jobs" >&2
    exit 1
fi
job=$((100 + number))
comment=$(sed -n 's/^#SBATCH --comment=//p' "$1")
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$1")
for task in $(seq 0 ${last:-0}); do
    echo "$job${last:+_$task}|$comment" >> "$RECORD/comments"
done
[ "$number" = "$KILL_AT" ] && kill -9 $PPID
echo "Submitted batch job $job"
"""
CONTROLLER = """#!/bin/bash
[ "$1 $2" = "show config" ] && printf 'ClusterName             = recorded\\nMaxArraySize            = 401\\n'
"""
QUEUE = """#!/bin/bash
[ -e "$RECORD/deaf" ] && exit 1
[[ "$*" == *--all* ]] || exit 0  # without it jobs in hidden partitions are not told
[[ "$*" == *"%i|%k"* ]] && { cat "$RECORD/comments"; exit 0; }
cat "$RECORD/queue" 2>/dev/null || true
"""
CANCEL = """#!/bin/bash
echo "$@" >> "$RECORD/cancelled"
"""


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which only write down what they are given; the folder they write to."""
    folder = tmp_path / "recorder"
    folder.mkdir()
    commands = {
        "sbatch": RECORDER,
        "scontrol": CONTROLLER,
        "squeue": QUEUE,
        "scancel": CANCEL,
        "srun": "",
        "sacct": "#!/bin/bash\nexit 1\n",  # without its first line the machine's own would run
    }
    for name, text in commands.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(status, "_LAG_SECONDS", 0.0)
    cluster._known.clear()
    yield folder
    cluster._known.clear()


@pytest.fixture(scope="session")
def composed() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", ["resources=cpu"])


@pytest.fixture
def config(composed: DictConfig, tmp_path: Path) -> Callable[..., DictConfig]:
    """Makes a job's configuration; keywords change it."""

    def make(**changes: object) -> DictConfig:
        made = composed.copy()
        with open_dict(made):
            made.merge_with({"output_dir": str(tmp_path / "outputs"), **changes})
        return made

    return make


def send(configs: list[DictConfig], **options: bool) -> None:
    launch(ROOT / "train.py", configs, **{"wait": False, "dry_run": False, **options})


def arrays(recorder: Path) -> list[str]:
    return (recorder / "calls").read_text(encoding="utf-8").split("--- end\n")[:-1]


def test_a_thousand_runs_are_four_calls(
    recorder: Path, config: Callable[..., DictConfig], tmp_path: Path, capsys
) -> None:
    configs = [config(seed=seed) for seed in range(1000)]
    send(configs)
    rollouts, *runs = arrays(recorder)
    assert "--array" not in rollouts
    assert [next(line for line in text.splitlines() if "--array" in line) for text in runs] == [
        "#SBATCH --array=0-400%256", "#SBATCH --array=0-400%256", "#SBATCH --array=0-197%198",
    ]  # fmt: skip
    assert all("#SBATCH --dependency=afterok:101\n" in text for text in runs)
    files = list((tmp_path / "outputs" / "main").glob("*/status.json"))
    assert len(files) == 1000
    jobs = {read_json(file.parent / "slurm.json")["job"] for file in files}
    assert jobs == {f"{array}_{task}" for array, size in ((102, 401), (103, 401), (104, 198)) for task in range(size)}
    assert "1001 jobs: submitted" in capsys.readouterr().out  # the rollouts among them
    # Each job is given the configuration of its own run.
    run = next((tmp_path / "outputs" / "main").glob("*-s617-*"))
    job = read_json(run / "slurm.json")["job"]
    with (run.parent / "slurm" / f"{job}_submitted.pkl").open("rb") as file:
        task = pickle.load(file).function
    assert task.config["seed"] == 617
    assert "hydra" not in task.config
    assert task.run == str(run)
    # All are in the queue now, and none is submitted again.
    (recorder / "queue").write_text("".join(f"{job}|PENDING|Priority\n" for job in jobs), encoding="utf-8")
    send(configs)
    assert len(arrays(recorder)) == 4


def test_a_rejection_half_way_is_rolled_back(recorder: Path, config, tmp_path: Path, monkeypatch) -> None:
    send([config(seed=0)])
    before = {file: file.read_bytes() for file in (tmp_path / "outputs").rglob("*.json")}
    monkeypatch.setenv("REFUSE_FROM", "5")  # the rollouts' call is the third, the first array's the fourth
    with pytest.raises(InputError, match=r"^Slurm rejects the job: Too many jobs \(resources: gpus=0 "):
        send([config(seed=seed) for seed in range(500)])
    assert sorted((recorder / "cancelled").read_text(encoding="utf-8").split()) == ["103", "104"]
    names = ("status.json", "slurm.json")
    files = {file: file.read_bytes() for file in (tmp_path / "outputs").rglob("*.json") if file.name in names}
    assert files == {file: content for file, content in before.items() if file.name in names}
    assert len(list((tmp_path / "outputs" / "main").glob("*-s*"))) == 1


def killed(configs: list[DictConfig], at: str) -> None:
    """Sends in another process, which is killed: at a call of sbatch, or at a record."""
    child = os.fork()
    if not child:
        where, _, number = at.partition(" ")
        left = int(number)

        def count(*given: object, **options: object) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*given, **options)

        try:
            if where == "sbatch":
                os.environ["KILL_AT"] = number
            else:
                write = getattr(intent, where)
                setattr(intent, where, count)
            send(configs)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize(
    ("at", "calls"),
    [
        ("sbatch 1", 1),  # the rollouts' call was answered, and nobody has heard it
        ("sbatch 2", 2),  # the runs' call
        ("write_record 1", 1),
        ("write_record 3", 2),  # one of the two runs has a record
        ("write_json 1", 0),  # before sbatch
        ("write_json 4", 2),  # at the names of the runs by their jobs
    ],
)
def test_interrupted_submissions_are_recovered(
    at: str, calls: int, recorder: Path, config, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Killed between sbatch's answer and the last record, the same command submits only what is not in the queue."""
    monkeypatch.setattr(intent, "_SBATCH_SECONDS", 0.5)
    configs = [config(seed=0), config(seed=1)]
    killed(configs, at)
    assert (len(arrays(recorder)) if calls else not (recorder / "calls").exists()) == (calls or True)
    comments = recorder / "comments"
    comments.touch()

    def wait_in_the_queue() -> None:
        jobs = [line.partition("|")[0] for line in comments.read_text().splitlines()]
        (recorder / "queue").write_text("".join(f"{job}|PENDING|None\n" for job in jobs))

    wait_in_the_queue()
    send(configs)
    assert len(arrays(recorder)) == 2
    assert ("recovered" in capsys.readouterr().out) == bool(calls)
    assert {read_json(record_file(run.folder))["job"] for run in the_runs(tmp_path)} == {"102_0", "102_1"}
    assert read_json(tmp_path / "outputs" / "main" / "slurm" / "102_runs.json").keys() == {"102_0", "102_1"}
    assert not list((tmp_path / "outputs").rglob("submission-*/"))
    for run in the_runs(tmp_path):
        pickled = run.folder.parent / "slurm" / f"{read_json(record_file(run.folder))['job']}_submitted.pkl"
        with pickled.open("rb") as file:
            assert pickle.load(file).function.run == str(run.folder)
    wait_in_the_queue()
    send(configs)
    assert len(arrays(recorder)) == 2
    assert "recovered" not in capsys.readouterr().out


def begun(text: str, job: str) -> str:
    """The output of a job's script up to where it would run its task, which is `goes on`."""
    lines = text.split("# setup")[1].splitlines()
    body = "\n".join(line for line in lines if line.startswith("[ -e "))
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": job}
    shell = ["bash", "-c", f"{body}\necho goes on"]
    outcome = subprocess.run(shell, capture_output=True, text=True, env=environment, check=False)
    assert (outcome.returncode == 0) == ("goes on" in outcome.stdout)  # what waits for it does not start either
    return outcome.stdout


def test_a_job_of_an_abandoned_submission_does_nothing(recorder: Path, config, tmp_path: Path, monkeypatch) -> None:
    """An sbatch that outlived its command and was answered after the next one had looked."""
    monkeypatch.setattr(intent, "_SBATCH_SECONDS", 0.0)
    killed([config(seed=0)], "sbatch 1")
    (late,) = arrays(recorder)
    # Until then it needs nothing more of the command that was cut off: it fetches its task itself.
    folder = tmp_path / "outputs" / "rollouts" / "slurm"
    assert "goes on" in begun(late, "101")
    assert (folder / "101_submitted.pkl").read_bytes() == next(folder.glob("submission-*/0.pkl")).read_bytes()
    (recorder / "comments").write_text("")
    send([config(seed=0)])
    _, again, _ = arrays(recorder)
    assert "another job does its work" in begun(late, "101")
    assert "goes on" in begun(again, "102")


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_without_slurm_abandons_nothing(
    call: int, recorder: Path, config, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The job may be running: its record and its run stay as they are, and the next command finds it."""
    monkeypatch.setattr(intent, "_SBATCH_SECONDS", 0.0)
    record, calls = intent.Intent.record, []

    def interrupted(*given: object) -> None:
        calls.append(1)
        if len(calls) == call:
            (recorder / "deaf").touch()
            raise KeyboardInterrupt
        record(*given)

    with monkeypatch.context() as patch:
        patch.setattr(submit.Intent, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            send([config(seed=0), config(seed=1)])
    assert "Slurm cannot be queried for the submitted jobs" in capsys.readouterr().out
    assert len(list((tmp_path / "outputs").rglob("submission-*/"))) == 1
    assert not (recorder / "cancelled").exists()
    if call == 2:
        assert [run.status["state"] for run in the_runs(tmp_path)] == ["queued", "queued"]
    (recorder / "deaf").unlink()
    jobs = [line.partition("|")[0] for line in (recorder / "comments").read_text().splitlines()]
    (recorder / "queue").write_text("".join(f"{job}|RUNNING|None\n" for job in jobs))
    send([config(seed=0), config(seed=1)])
    assert len(arrays(recorder)) == 2
    assert "recovered" in capsys.readouterr().out
    assert {read_json(record_file(run.folder))["job"] for run in the_runs(tmp_path)} == {"102_0", "102_1"}


def test_a_refusal_leaves_the_files_of_other_jobs(recorder: Path, config, tmp_path: Path, monkeypatch) -> None:
    send([config(seed=0)])
    folder = tmp_path / "outputs" / "main" / "slurm"
    before = set(folder.iterdir())
    refuses = 'if [ "$number" = "$REFUSE_FROM" ]; then\n'
    assert refuses in RECORDER
    busy = RECORDER.replace(refuses, f'{refuses}touch "{folder}"/102_0_log.out "{folder}"/102_0_result.pkl\n')
    (recorder / "sbatch").write_text(busy, encoding="utf-8")
    monkeypatch.setenv("REFUSE_FROM", "4")  # the rollouts are made anew, as their job is gone; then the run
    with pytest.raises(InputError, match="Too many jobs"):
        send([config(seed=1)])
    names = {file.name for file in set(folder.iterdir()) - before}
    assert {"102_0_log.out", "102_0_result.pkl"} <= names
    assert not [name for name in names if "submission" in name or len(name) == 36]


def test_a_comment_of_ones_own_stays(recorder: Path, config) -> None:
    send([config(seed=0, resources={"sbatch": {"comment": "project 7"}})])
    assert all(re.search(r"^#SBATCH --comment='project 7 losslens:[0-9a-f]{16}'$", text, re.M)
               for text in arrays(recorder))  # fmt: skip


def test_a_rejected_account_ends_in_one_line(recorder: Path, config, tmp_path: Path) -> None:
    # In Slurm's words. It looks at accounts only with a database, which a node for trials does not have.
    words = (
        "Slurm rejects the job: Invalid account or account/partition combination specified (resources: gpus=0 cpus=2 "
    )
    with pytest.raises(InputError) as refused:
        send([config(seed=0), config(seed=1, resources={"account": "mine"})])
    assert str(refused.value).startswith(words)
    assert str(refused.value).endswith(" account=mine)")
    assert not (recorder / "calls").exists()
    assert [file.name for file in (tmp_path / "outputs").iterdir()] == [".slurm.lock"]


def test_resources_make_arrays_of_their_own(recorder: Path, config) -> None:
    send([config(seed=0), config(seed=1, resources={"gpus": 2, "partition": "big"}), config(seed=2)])
    rollouts, small, big = arrays(recorder)
    assert "--gpus-per-node" not in rollouts + small
    for line in ("--gpus-per-node=2", "--ntasks-per-node=2", "--partition=big"):
        assert f"#SBATCH {line}\n" in big
    assert "#SBATCH --array=0-1%2" in small


def test_two_names_of_one_rate_are_one_job(recorder: Path, config, capsys) -> None:
    matched = {"name": "matched", "factor": 1.0}
    send([config(), config(lr=matched)])
    assert len(arrays(recorder)) == 2
    assert "Submitted 2 jobs" in capsys.readouterr().out


def test_a_job_that_slurm_forgot_is_marked_dead(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0), config(seed=1)])
    runs = [Run(file.parent) for file in sorted((tmp_path / "outputs" / "main").glob("*/status.json"))]
    (recorder / "queue").write_text("102_0|PENDING|Priority\n", encoding="utf-8")
    waiting, gone = sorted(refresh_run_statuses(runs), key=lambda each: each.job)
    assert waiting.state == "queued"
    assert waiting.is_live
    assert gone.state == "failed"
    assert "Slurm no longer knows its job 102_1" in gone.run.status["error"]
    # What a process told itself stands, whatever becomes of its job.
    waiting.run.set_state("running", slurm={"job": "77", "cluster": "recorded"})
    (recorder / "queue").write_text("102_0|CANCELLED|None\n77|RUNNING|None\n", encoding="utf-8")
    (run_status,) = refresh_run_statuses([waiting.run])
    assert run_status.state == "running"


def test_the_log_says_when_memory_ran_out(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0)])
    (run,) = [Run(file.parent) for file in (tmp_path / "outputs" / "main").glob("*/status.json")]
    log = Path(read_json(record_file(run.folder))["log"])
    log.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=102.0.\n", encoding="utf-8")
    (run_status,) = refresh_run_statuses([run])
    assert run_status.status["error"].startswith("out of memory (resources.memory_gb)")


def test_jobs_of_another_cluster_are_not_queried(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0)])
    (run,) = [Run(file.parent) for file in (tmp_path / "outputs" / "main").glob("*/status.json")]
    (recorder / "scontrol").write_text(CONTROLLER.replace("recorded", "elsewhere"), encoding="utf-8")
    cluster._known.clear()
    (run_status,) = refresh_run_statuses([run])
    assert run_status.state == "queued"
    assert run_status.slurm is None


@pytest.mark.parametrize(
    ("time", "minutes"),
    [(30, 30), ("30", 30), ("30:01", 31), ("4:00:00", 240), ("0:00:30", 1), ("1-0", 1440), ("1-2:30", 1590),
     ("2-03:04:05", 3065)],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(composed: DictConfig, time: object, minutes: int) -> None:
    given = OmegaConf.to_container(composed.resources)
    assert parse(Resources, {**given, "time": time, "signal_seconds": 1}).minutes == minutes


def test_describe_exit() -> None:
    assert describe_exit(143) == "killed by SIGTERM"
    assert describe_exit(3) == "its process ended with exit status 3"


def the_runs(tmp_path: Path) -> list[Run]:
    return [Run(file.parent) for file in sorted((tmp_path / "outputs" / "main").glob("*/status.json"))]


def test_a_failing_squeue_is_not_an_empty_queue(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0)])
    (recorder / "deaf").touch()
    with pytest.raises(InputError, match="the Slurm queue cannot be queried"):
        send([config(seed=0)])
    assert len(arrays(recorder)) == 2
    (run_status,) = refresh_run_statuses(the_runs(tmp_path))
    assert run_status.state == "queued"
    assert not run_status.is_over
    (recorder / "deaf").unlink()
    (recorder / "queue").write_text("102|PENDING|None\n", encoding="utf-8")
    (run_status,) = refresh_run_statuses(the_runs(tmp_path))
    assert not run_status.is_over


def test_two_commands_at_once_submit_once(recorder: Path, config, tmp_path: Path) -> None:
    (recorder / "queue").write_text("101|PENDING|None\n102|PENDING|None\n", encoding="utf-8")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send, [[config(seed=0)], [config(seed=0)]]))
    assert len(arrays(recorder)) == 2


def test_an_old_record_says_nothing_about_a_new_job(recorder: Path, config, tmp_path: Path, monkeypatch) -> None:
    send([config(seed=0)])
    (run,) = the_runs(tmp_path)
    refresh_run_statuses([run])  # its job is gone
    assert run.status["state"] == "failed"
    looked = []
    monkeypatch.setattr(
        submit, "snapshot_code", lambda *given: looked.extend(refresh_run_statuses([run])) or snapshot_code(*given)
    )
    send([config(seed=0)])
    assert [each.state for each in looked] == ["failed", "queued"]  # for the rollouts' call, and the run's


def test_jobs_are_cancelled_if_their_records_cannot_be_written(
    recorder: Path, config, tmp_path: Path, monkeypatch
) -> None:
    def full(file: Path, record: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(intent, "write_record", full)
    with pytest.raises(OSError, match="quota"):
        send([config(seed=0), config(seed=1)])
    assert (recorder / "cancelled").read_text(encoding="utf-8").split() == ["101"]
    monkeypatch.setattr(intent, "write_record", lambda file, record: "rollouts" in str(file) or full(file, record))
    with pytest.raises(OSError, match="quota"):
        send([config(seed=0), config(seed=1)])
    assert (recorder / "cancelled").read_text(encoding="utf-8").split() == ["101", "102", "103"]
    assert not the_runs(tmp_path)


def test_a_run_cancelled_after_a_requeue_is_failed(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0)])
    (run,) = the_runs(tmp_path)
    run.set_state("preempted", slurm={"job": "102", "cluster": "recorded"}, step=4, max_steps=9)
    (recorder / "queue").write_text("102|PENDING|BeginTime\n", encoding="utf-8")
    assert refresh_run_statuses([run])[0].state == "preempted"
    (recorder / "queue").write_text("102|CANCELLED|BeginTime\n", encoding="utf-8")
    (run_status,) = refresh_run_statuses([run])
    assert (run_status.state, run_status.status["step"]) == ("failed", 4)
    assert run_status.status["error"] == "Slurm job 102: cancelled (scancel)"


def test_runs_whose_rollouts_failed_say_so(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0)])
    (recorder / "queue").write_text("102|CANCELLED|DependencyNeverSatisfied\n", encoding="utf-8")
    (run_status,) = refresh_run_statuses(the_runs(tmp_path))
    assert run_status.status["error"].startswith("sampling its rollouts failed; logs: ")
    assert run_status.status["error"].endswith("outputs/rollouts/slurm")


def test_a_run_of_a_completed_job_is_not_marked(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0)])
    (recorder / "queue").write_text("102|COMPLETED|None\n", encoding="utf-8")
    (run_status,) = refresh_run_statuses(the_runs(tmp_path))
    assert run_status.state == "queued"
    assert run_status.is_over


def test_the_account_of_a_cancelled_array_is_read(recorder: Path, config, tmp_path: Path) -> None:
    send([config(seed=0), config(seed=1)])
    sacct = "#!/bin/bash\necho 'JobID|State|ExitCode'; echo '102_[0-1%2]|CANCELLED by 0|0:0'\n"
    (recorder / "sacct").write_text(sacct, encoding="utf-8")
    assert {each.status["error"] for each in refresh_run_statuses(the_runs(tmp_path))} == {
        f"Slurm job 102_{task}: cancelled (scancel)" for task in (0, 1)
    }


def test_sbatch_options_come_from_the_resources_only(recorder: Path, config, monkeypatch) -> None:
    for name in ("SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SLURM_ARRAY_JOB_ID", "SLURM_MEM_PER_CPU", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm.conf")
    (recorder / "sbatch").write_text(RECORDER.replace('cat "$1"', 'env > "$RECORD/env"; cat "$1"'), encoding="utf-8")
    send([config(seed=0)])
    given = [line for line in (recorder / "env").read_text(encoding="utf-8").splitlines() if "_" in line]
    assert sorted(line for line in given if line.startswith(("SBATCH_", "SLURM_"))) == [
        "SBATCH_ACCOUNT=7", "SLURM_CONF=/somewhere/slurm.conf",
    ]  # fmt: skip
    send([config(seed=1, resources={"account": "ours"})])
    assert "SBATCH_ACCOUNT" not in (recorder / "env").read_text(encoding="utf-8")
    assert os.environ["SBATCH_TIMELIMIT"] == "7"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": 28800}, "quotes"),  # what YAML makes of 8:00:00
        ({"time": 60, "signal_seconds": 1800}, "a fifth of the time"),
        ({"sbatch": {"array": "0-9"}}, "array is set by LossLens itself"),
        ({"sbatch": {"parsable": True}}, "parsable is set by LossLens itself"),
    ],
)
def test_misleading_resources_are_refused(composed: DictConfig, given: dict, said: str) -> None:
    all_of_them = OmegaConf.to_container(composed.resources)
    with pytest.raises(InputError, match=said):
        parse(Resources, {**all_of_them, **given}, "resources")


def test_a_percent_sign_in_the_output_folder_is_refused(recorder: Path, config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^output_dir="):
        send([config(output_dir=str(tmp_path / "50%j"))])


def test_pickles_of_jobs_are_private(recorder: Path, config, tmp_path: Path, monkeypatch) -> None:
    """They hold whole addresses, with what is secret in them."""
    monkeypatch.setattr(intent, "_SBATCH_SECONDS", 0.0)
    before = os.umask(0o022)
    try:
        killed([config(seed=0)], "sbatch 1")
        (late,) = arrays(recorder)
        assert "goes on" in begun(late, "101")
        [pending] = (tmp_path / "outputs").rglob("submission-*/")
        assert (pending / "0.pkl").stat().st_mode & 0o077 == pending.stat().st_mode & 0o077 == 0
        assert (pending.parent / "101_submitted.pkl").stat().st_mode & 0o077 == 0
        send([config(seed=1)])
    finally:
        os.umask(before)
    pickles = list((tmp_path / "outputs").rglob("*.pkl"))
    assert pickles
    for file in pickles:
        assert file.stat().st_mode & 0o077 == 0 or file.parent.stat().st_mode & 0o077 == 0
    assert {folder.stat().st_mode & 0o777 for folder in (tmp_path / "outputs").glob("*/slurm")} == {0o700}
    assert (tmp_path / "outputs" / "rollouts").stat().st_mode & 0o777 == 0o755


def test_tracebacks_of_jobs_are_redacted(monkeypatch, tmp_path: Path, capsys) -> None:
    """submitit would pickle the text of any error, with the key in it."""
    from losslens.scheduling.slurm import task

    secret = "k3y-of-Somebody-0123456789"

    def fails(_: task.Task) -> int:
        raise RuntimeError(f"no: {secret}")

    monkeypatch.setenv("SOME_API_KEY", secret)
    monkeypatch.setattr(task.Task, "_run", fails)
    monkeypatch.setattr(task.submitit, "JobEnvironment", lambda: SimpleNamespace(paths=SimpleNamespace(stdout="log")))
    monkeypatch.setattr(task.provenance, "JOB_LOG", "NO_LOG")
    monkeypatch.setattr(task.preemption, "install_handlers", lambda *_: None)
    monkeypatch.setattr(task.preemption, "ignore", lambda *_: None)
    monkeypatch.setattr(task.signal, "getsignal", lambda _: print)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as stopped:
        task.Task(tmp_path, tmp_path / "train.py", {}, None, tmp_path / "record.json")()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "RuntimeError: no: [redacted]" in said
    assert secret not in said


def test_a_snapshot_has_every_file_that_the_package_reads(tmp_path: Path) -> None:
    package = ROOT / "src" / "losslens"
    copy = snapshot_code(ROOT / "train.py", tmp_path) / "src" / "losslens"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."],
        cwd=package, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    there = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()}
    assert there == {name for name in tracked if not name.endswith(".safetensors")}
    assert {"report/published.json", "analysis/off_task.txt", "report/page.html.jinja"} <= there
