"""Every kind of file of an output folder, damaged: the undisturbed result, or one line that names the file."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import losslens
from losslens.analysis.cache import Cache
from losslens.analysis.function_space import base_of
from losslens.analysis.gathering import find_runs, gather_cohort
from losslens.analysis.manifests import RunFacts, read_facts
from losslens.analysis.snapshots import trajectory_of
from losslens.analysis.training_table import training_table
from losslens.analysis.weight_space import measure_weight_space
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.core.files import read_json, read_object, write_json
from losslens.core.hashing import hash_file
from losslens.models import loading
from losslens.models.loading import load_model
from losslens.rollouts.frozen import freeze, load_rollouts
from losslens.runs import integrity
from losslens.runs.prompts import questions_trained_on, write_prompts
from losslens.runs.recorded import Trust
from losslens.runs.run import Run, runs_of
from losslens.scheduling import code_snapshot
from losslens.scheduling.code_snapshot import damage_of, snapshot_code
from losslens.scheduling.monitor import table
from losslens.scheduling.progress import accuracies
from losslens.scheduling.record import SubmissionRecord, read_record, write_record
from losslens.scheduling.status import refresh_run_statuses
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.training.reference import ReferenceCache
from tests.conftest import TINY
from tests.faults.conftest import dice, per_kind
from tests.faults.damage import DAMAGES, linked_copy, outcome_of
from tests.faults.ledger import record

Read = tuple[dict[str, Any], str]


def analysed(outputs: Path) -> Read:
    """What an analysis reads of the runs, by run, and the measures of their weights."""
    contents = find_runs(outputs, ["main"], None)
    cohort = gather_cohort(contents, {})
    left_out = dict(cohort.left_out)
    training = training_table(cohort.members, left_out)
    values: dict[str, Any] = {
        f"training of {name}": rows.to_csv() for name, rows in training.groupby("run", sort=False)
    }
    runs, pairs = measure_weight_space(cohort, 4, Cache(outputs / "cache"))
    # How far A has moved is told apart: it is left out where the initial adapter is damaged.
    values |= {f"weights of {name}": repr(_plain(run)) for name, run in runs.items()}
    values |= {f"weights of {pair}": repr(_plain(measures)) for pair, measures in pairs.items()}
    for member in cohort.members:
        assert member.run is not None
        if member.initial is not None:
            values[f"drift of A in {member.name}"] = str(member.initial)
        values[f"points of {member.name}"] = [(step, _hash(run)) for step, run in trajectory_of(member).items()]
        values[f"outcomes of {member.name}"] = hash_file(member.run.evaluation("arithmetic"))
    return values, str(left_out)


def _hash(run: Run) -> str:
    return hash_file(run.adapter / "adapter_model.safetensors")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if "drift" not in field.name]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return [[str(key), _plain(entry)] for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def shown(outputs: Path) -> Read:
    """What `launch/status.py` shows: a damaged run is shown as such."""
    found = refresh_run_statuses(runs_of(outputs, "main"))
    table(found)
    scores = accuracies([each.run for each in found])
    values = {each.run.name: scores[each.run] for each in found if each.state == "completed" and each.run in scores}
    damaged = [str(each.status.get("error")) for each in found if each.state == "damaged"]
    return values, f"{damaged} manifest.json, eval and status.json of runs without an accuracy: arithmetic.parquet"


def frozen_read(outputs: Path) -> Read:
    [folder] = (outputs / "rollouts").glob("arithmetic-*")
    rollouts = load_rollouts(folder)
    # A flipped bit in the name of the seal leaves an entry of another name, which nothing reads.
    names = ("sha256", "logps_sha256", "identity", "keys", "tokenizer", "pass_rate", "tokens", "rollouts")
    return {"rows": rollouts.table.to_json(), **{name: rollouts.manifest.get(name) for name in names}}, ""


TOKENS = [([1, 2, 3], [4, 5]), ([1, 2], [6, 7, 8]), ([9], [4, 2])]


def referenced(outputs: Path) -> Read:
    """The base's log-probabilities of rollouts: computed anew where the cache is damaged."""
    table = pd.DataFrame(TOKENS, columns=["prompt_ids", "completion_ids"])
    logps, _ = _reference(outputs, "base", table)
    return {"logps": [values.tolist() for values in logps]}, ""


def _reference(outputs: Path, about: str, table: pd.DataFrame) -> tuple[list[np.ndarray], Path]:
    def score(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["input_ids"][:, 1:] / -len(about)

    return ReferenceCache(outputs / "reference", {"base": about}).logps(table, score, 0)


def prompted(outputs: Path) -> Read:
    """The questions that an on-policy run was trained on."""
    seen = vars(questions_trained_on(Run(outputs / "own" / "online_grpo-1")))
    return {name: sorted(texts) for name, texts in seen.items()}, ""


def loaded(outputs: Path) -> Read:
    """A table by the Python interface, and one as the report reads it."""
    analysis = AnalysisFolder(outputs / "main" / "analysis")
    by_hand = losslens.load_sweep("main", outputs).tables["pairs"].to_csv()
    in_report = analysis.table("pairs", ("run_a",), ("cosine",)).to_csv()
    return {"reference": analysis.manifest["reference"], "notebook": by_hand, "report": in_report}, ""


def based(outputs: Path) -> Read:
    """What the base of a run gives, from the folder at which an analysis is told that it lies."""
    for cached in (loading.locate, loading.model_identity, loading.load_config, loading.load_tokenizer, load_model):
        cached.cache_clear()
    facts = read_facts(Run(of_run("manifest.json")(outputs).parent), RunFacts)
    source, _ = base_of(str(outputs / "student"), facts, Trust(False, ()))
    found = load_model(source)
    weights = [parameter.double().sum().item() for parameter in found.model.parameters()]
    ids = found.tokenizer("12 + 30 = 42\n", return_tensors="pt")
    with torch.no_grad():
        logits = found.model(ids.input_ids).logits.double().sum().item()
    return {"base": repr((weights, ids.input_ids.tolist(), logits, found.tokenizer.chat_template))}, ""


def submitted(outputs: Path) -> Read:
    """The code that a job would run: refused by the job, and copied anew by the next submission."""
    [copy] = (outputs / "code").iterdir()
    if damage := damage_of(copy):
        raise InputError(damage)
    return {"code": (copy / "src" / "losslens" / "mine.py").read_text()}, ""


def of_run(pattern: str, method: str = "sft") -> Callable[[Path], Path]:
    return lambda outputs: sorted(outputs.glob(f"main/{method}-*/{pattern}"))[0]


def first(pattern: str, place: int = 0) -> Callable[[Path], Path]:
    return lambda outputs: sorted(outputs.glob(pattern))[place]


# Kind of file: where one lies, and the readers that meet it.
FILES: dict[str, tuple[Callable[[Path], Path], tuple[Callable[[Path], Read], ...]]] = {
    "rollouts": (lambda outputs: next(outputs.glob("rollouts/*/rollouts.parquet")), (frozen_read,)),
    "manifest of rollouts": (lambda outputs: next(outputs.glob("rollouts/*/manifest.json")), (frozen_read,)),
    "manifest of a run": (of_run("manifest.json"), (analysed, shown)),
    "status": (of_run("status.json"), (analysed, shown)),
    "metrics": (of_run("metrics.jsonl"), (analysed,)),
    "outcomes": (of_run("eval/arithmetic.parquet"), (analysed, shown)),
    "adapter": (of_run("adapter/adapter_model.safetensors"), (analysed,)),
    "configuration of an adapter": (of_run("adapter/adapter_config.json"), (analysed,)),
    "snapshot": (of_run("snapshots/*/adapter/adapter_model.safetensors"), (analysed,)),
    "manifest of a snapshot": (of_run("snapshots/*/manifest.json"), (analysed,)),
    "initial adapter": (lambda outputs: next(outputs.glob("init/*/adapter_model.safetensors")), (analysed,)),
    "configuration of the initial adapter": (
        lambda outputs: next(outputs.glob("init/*/adapter_config.json")), (analysed,),
    ),
    "manifest of the initial adapter": (lambda outputs: next(outputs.glob("init/*/manifest.json")), (analysed,)),
    "cached measures": (lambda outputs: sorted(outputs.glob("cache/*/*.npz"))[0], (analysed,)),
    "reference log-probabilities": (
        lambda outputs: _reference(outputs, "base", pd.DataFrame(TOKENS, columns=["prompt_ids", "completion_ids"]))[1],
        (referenced,),
    ),
    "prompts": (first("own/online_grpo-1/prompts.parquet"), (prompted,)),
    "table of an analysis": (first("main/analysis/pairs.csv"), (loaded,)),
    "manifest of an analysis": (first("main/analysis/manifest.json"), (loaded,)),
    "weights of the base": (first("student/model.safetensors"), (based,)),
    "configuration of the base": (first("student/config.json"), (based,)),
    "tokenizer of the base": (first("student/tokenizer.json"), (based,)),
    "chat template of the base": (first("student/chat_template.jinja"), (based,)),
    "code of a job": (first("code/*/src/losslens/mine.py"), (submitted,)),
    "commit of the code of a job": (first("code/*/code.json"), (submitted,)),
}  # fmt: skip

# The same-named file of another run, another analysis, another base: valid, and the wrong one.
OTHERS: dict[str, Callable[[Path], Path]] = {
    "rollouts": first("others/*/rollouts.parquet"),
    "manifest of rollouts": first("others/*/manifest.json"),
    "manifest of a run": of_run("manifest.json", "dpo"),
    "status": of_run("status.json", "dpo"),
    "metrics": of_run("metrics.jsonl", "dpo"),
    "outcomes": of_run("eval/arithmetic.parquet", "dpo"),
    "adapter": of_run("adapter/adapter_model.safetensors", "dpo"),
    "configuration of an adapter": of_run("adapter/adapter_config.json", "dpo"),
    "snapshot": of_run("adapter/adapter_model.safetensors", "dpo"),
    "manifest of a snapshot": of_run("snapshots/*/manifest.json", "dpo"),
    "initial adapter": of_run("adapter/adapter_model.safetensors", "dpo"),
    "cached measures": lambda outputs: sorted(outputs.glob("cache/*/*.npz"))[-1],
    "reference log-probabilities": lambda outputs: next(
        file for file in sorted(outputs.glob("reference/*/*.safetensors"))
        if file != FILES["reference log-probabilities"][0](outputs)
    ),
    "prompts": first("own/online_grpo-2/prompts.parquet"),
    "table of an analysis": first("main/analysis-norm/pairs.csv"),
    "manifest of an analysis": first("main/analysis-norm/manifest.json"),
    "weights of the base": lambda _: TINY / "teacher" / "model.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs(sweep: Path) -> Path:
    """A finished sweep, with snapshots (the ends of its runs), a cache, and what else is read of a folder."""
    for method in ("sft", "dpo"):
        [run] = sweep.glob(f"main/{method}-*")
        add_snapshot(run)
    for name in ("rift", "dft", "grpo", "rft"):
        for folder in sweep.glob(f"main/{name}-*"):
            shutil.rmtree(folder)
    analysed(sweep)
    [folder] = sweep.glob("rollouts/arithmetic-*")
    freeze(load_rollouts(folder).table.iloc[:-1], sweep / "others", "arithmetic", {"keys": []})
    tokens = pd.DataFrame(TOKENS, columns=["prompt_ids", "completion_ids"])
    for about in ("base", "another base"):
        _reference(sweep, about, tokens)
    for number, question in (("1", "1 + 1"), ("2", "2 + 2")):
        own = Run(sweep / "own" / f"online_grpo-{number}")
        own.folder.mkdir(parents=True)
        write_json(own.folder / "manifest.json", {"prompts_sha256": write_prompts(own, [("a", question)])}, sealed=True)
    for name, cosine in (("analysis", 0.5), ("analysis-norm", 0.25)):
        write_json(sweep / "main" / name / "manifest.json", {"reference": name}, sealed=True)
        pairs = pd.DataFrame({"run_a": ["x", "y"], "cosine": [cosine, -cosine]})
        AnalysisFolder(sweep / "main" / name).add_table("pairs", pairs)
    shutil.copytree(TINY / "student", sweep / "student")
    small_snapshot(sweep)
    return sweep


def small_snapshot(folder: Path) -> Path:
    """The copy of a package of two files for jobs, in the folder `code`."""
    package = folder / "package" / "src" / "losslens"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("LEARNING_RATE = 1e-3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_snapshot.losslens, "__file__", str(package / "__init__.py"))
        return snapshot_code(folder / "none" / "train.py", folder / "code")


def add_snapshot(run: Path) -> None:
    manifest = read_object(run / "manifest.json")
    shutil.copytree(run / "adapter", run / "snapshots" / "step-000006" / "adapter")
    hashes = {name: manifest[name] for name in ("adapter_sha256", "adapter_config_sha256")}
    about = {"run": integrity.run_fingerprint(manifest), "step": 6, "outcomes": {}, **hashes}
    write_json(run / "snapshots" / "step-000006" / "manifest.json", about, sealed=True)


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file(kind: str, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_RETRY_SECONDS", 0.0)
    find, readers = FILES[kind]
    expected = {read: read(outputs)[0] for read in readers}
    rng = dice(kind)
    names = rng.sample([*DAMAGES], 5) if per_kind(0) == 0 else [*DAMAGES, *["flipped bit"] * per_kind(0)]
    for number, damage in enumerate([*names, "flipped bit", *["of another"] * (kind in OTHERS)]):
        copy = linked_copy(outputs, tmp_path / str(number))
        file = find(copy)
        if damage == "of another":
            file.unlink()
            shutil.copyfile(OTHERS[kind](outputs), file)
        else:
            DAMAGES[damage](file, rng)
        for read in readers:
            unit = next(copy.glob("code/*")) / "code.json" if read is submitted else file  # as named
            found, detail = outcome_of(partial(read, copy), _moved(expected[read], outputs, copy), unit)
            record(f"{damage}: {kind}", f"{read.__name__} {number}", found, detail)
        _allow_removal(file)
        shutil.rmtree(copy)


def _moved(values: dict[str, Any], before: Path, now: Path) -> dict[str, Any]:
    """Values with the paths of a copy."""
    return {
        name: value.replace(str(before), str(now)) if isinstance(value, str) else value
        for name, value in values.items()
    }


def _allow_removal(file: Path) -> None:
    if file.is_file():
        file.chmod(0o600)


class TestKinds:
    """What was found, mended as a kind."""

    def test_any_flipped_bit_of_a_sealed_file_is_told(self, tmp_path: Path) -> None:
        file = tmp_path / "manifest.json"
        value = {"pass_rate": 0.75, "text": "é\udc80", "rows": [1, {"a": None}]}
        write_json(file, value, sealed=True)
        assert read_json(file) == value
        content, told = file.read_bytes(), 0
        for place in range(len(content)):
            for bit in range(8):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                file.write_bytes(changed)
                try:
                    found = read_json(file)
                except InputError:
                    told += 1
                else:  # white space, or the name of the seal itself
                    assert {name: entry for name, entry in found.items() if name in value} == value
        assert told > 5 * len(content)

    def test_a_cache_file_of_another_key_is_not_read(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        cache.save("pair", "mine", {"cosine": np.array(0.5)})
        cache.save("pair", "yours", {"cosine": np.array(0.7)})
        mine, yours = (cache._file("pair", key) for key in ("mine", "yours"))
        shutil.copy(yours, mine)
        assert cache.load("pair", "mine", ["cosine"]) is None
        found = cache.load("pair", "yours", ["cosine"])
        assert found is not None
        assert found["cosine"] == 0.7

    def test_any_flipped_bit_of_a_cache_file_is_noticed(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        cache.save("pair", "mine", {"cosine": np.arange(4.0)})
        file = cache._file("pair", "mine")
        content = file.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            found = cache.load("pair", "mine", ["cosine"])
            assert found is None or np.array_equal(found["cosine"], np.arange(4.0)), place

    def test_the_journal_of_another_request_is_refused(self, tmp_path: Path) -> None:
        mine, yours = tmp_path / "mine.jsonl", tmp_path / "yours.jsonl"
        journal = Journal(yours)
        journal.add({"0": Completion("7", 1, True)}, "state")
        journal.close()
        assert Journal(yours).completions.keys() == {"0"}
        shutil.copy(yours, mine)
        with pytest.raises(InputError, match=r"mine\.jsonl: line 1 is damaged, of another journal"):
            Journal(mine)

    @pytest.mark.parametrize("name", ["rollouts.parquet", "manifest.json"])
    def test_damaged_rollouts_are_replaced_when_made_again(self, name: str, rollouts: Any, tmp_path: Path) -> None:
        folder = freeze(rollouts, tmp_path, "x", {"keys": ["a"]})
        before = load_rollouts(folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        assert freeze(rollouts, tmp_path, "x", {"keys": ["a"]}) == folder
        assert load_rollouts(folder) == before

    def test_a_wrong_value_in_a_status_is_one_line(self, tmp_path: Path) -> None:
        run = Run(tmp_path / "sft-1")
        for name, value in {
            "loss": "x", "step": [], "slurm": 3, "process": {"pid": 1}, "max_steps": 10**400, "seconds_per_step": 1e999,
        }.items():  # fmt: skip
            write_json(run.folder / "status.json", {"state": "running", name: value})
            with pytest.raises(InputError, match=rf"status\.json: {name}: not a valid value; delete it"):
                _ = run.status
            [shown_as] = refresh_run_statuses([run])
            assert shown_as.state == "damaged"
            table([shown_as])

    def test_a_damaged_copy_of_the_code_is_made_again_by_the_next_submission(self, tmp_path: Path) -> None:
        copy = small_snapshot(tmp_path)
        file = copy / "src" / "losslens" / "mine.py"
        (file.parent / "__pycache__").mkdir()  # jobs have run from it
        for left in ("__pycache__/mine.pyc", "__pycache__/mine.nbi", ".nfs0001", ".DS_Store"):
            (file.parent / left).write_text("left by jobs and systems")
        (copy / "cache.json").write_text("{}")  # by a module of the user's, beside itself
        assert not damage_of(copy)
        assert small_snapshot(tmp_path) == copy
        assert (copy / "cache.json").exists()  # not replaced under the jobs that run from it
        file.write_text("LEARNING_RATE = 9e-3\n")
        assert damage_of(copy) == f"{copy}: the code of this job has changed since it was submitted; submit it again"
        assert small_snapshot(tmp_path) == copy
        assert file.read_text() == "LEARNING_RATE = 1e-3\n"
        assert not damage_of(copy)

    def test_submission_records(self, tmp_path: Path) -> None:
        file = tmp_path / "slurm.json"
        write_record(file, SubmissionRecord("12", "here", "log", "now"))
        content, rng = file.read_bytes(), random.Random(0)
        for damage in DAMAGES:
            file.write_bytes(content)
            DAMAGES[damage](file, rng)
            found, detail = outcome_of(
                lambda: ({"job": getattr(read_record(file), "job", None)}, ""), {"job": "12"}, file
            )
            if damage == "dangling link":
                assert read_record(file) is None
            else:
                record(f"{damage}: submission record", "read_record", found, detail)
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def test_tables_of_an_analysis(self, tmp_path: Path) -> None:
        file = tmp_path / "pairs.csv"
        for damage in ("a folder", "NUL bytes", "no UTF-8"):
            file.write_text("run_a,cosine\nx,0.5\n")
            DAMAGES[damage](file, random.Random(1))
            folder = AnalysisFolder(tmp_path)
            try:
                folder.table("pairs", ("run_a",), ("cosine",))
            except InputError as error:
                told = str(error)
            else:
                told = "pairs.csv"
            assert "pairs.csv" in told
            shutil.rmtree(file) if file.is_dir() else file.unlink()
