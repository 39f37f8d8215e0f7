"""Fuzzed readers: any content gives a value or `InputError` in one line, nothing else."""

from __future__ import annotations

import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from losslens.analysis.replacement import read_earlier
from losslens.config.data import Server
from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core import hub
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError, ServerError
from losslens.core.files import read_json, read_object, read_parquet, write_json
from losslens.core.hashing import hash_json
from losslens.evaluation.outcomes import read_outcomes
from losslens.problems import Problem
from losslens.problems.judges import identity_of, verifier_of
from losslens.problems.mathematics import MathVerify
from losslens.problems.rows import read_rows
from losslens.problems.verification import _Checker
from losslens.runs.current_words import current_manifest
from losslens.runs.integrity import require_own_manifest
from losslens.runs.run import Run
from losslens.runs.spec import RunSpec
from losslens.sampling.server import Decoding, Request, ask
from losslens.scheduling.monitor import table
from losslens.scheduling.record import read_record
from losslens.scheduling.slurm.intent import _content
from losslens.scheduling.status import refresh_run_statuses
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.updates.folder import open_adapter
from losslens.updates.lora_config import LoraConfigFile
from tests.conftest import ROOT

EXAMPLES = int(os.environ.get("LOSSLENS_FAULTS_PER_KIND", "25"))
fuzzed = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip

SCALARS = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**400) | st.floats() | st.text(max_size=20)
    | st.sampled_from(["\udc80", "x" * 5000, -1, 2**63, "../../x", "\x00", "completed", "1e999"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)

IDENTITY = {
    "format": 1,
    "method": {"name": "sft", "version": 1},
    "seed": 42,
    "lora": {"r": 8},
    "optim": {"max_steps": 1},
}
MANIFEST = {
    "run": "sft-x-00000000", "method": "sft", "options": {}, "loss": {}, "learning_rate": 1e-3, "identity": IDENTITY,
    "config": {
        "method": {"name": "sft"}, "lr": {"name": "c", "peak": 1e-3, "factor": 1.0}, "seed": 42, "init_seed": 1,
        "benchmark": {"a": {"name": "a"}}, "data": {"name": "a"}, "optim": {"max_steps": 1}, "lora_rank": {"r": 8},
    },
    "rollouts": {"folder": "x", "sha256": "0", "share_right": 0.5}, "outcomes": {"a.parquet": "0"},
}  # fmt: skip
STATUS = {
    "state": "running", "time": "2026-01-01T00:00:00+00:00", "step": 3, "max_steps": 9, "loss": 0.5,
    "tokens_per_second": 9.5, "seconds_per_step": 0.1, "slurm": {"job": "12", "cluster": "c", "log": "l"},
    "process": {"host": "h", "pid": 3}, "error": "x",
}  # fmt: skip
RECORD = {"job": "12", "cluster": "c", "log": "l", "submitted": "now"}
INTENT = {"cluster": "c", "processes": 1, "records": ["a"], "runs": [None]}
LORA = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"q": 2},
    "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True, "bias": "none", "use_dora": False,
}  # fmt: skip


def _paths(value: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [start, *(path for key, entry in entries for path in _paths(entry, (*start, key)))]


def changed(document: Any) -> st.SearchStrategy[bytes]:
    """A document with one value replaced by another, or bytes of any kind."""

    def replaced(path: tuple[Any, ...], value: Any) -> bytes:
        content = json.loads(json.dumps(document))
        if not path:
            return json.dumps(value).encode()
        inner = content
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value
        return json.dumps(content).encode()

    whole = json.dumps(document).encode()
    cut = st.integers(0, len(whole)).map(lambda length: whole[:length])
    flipped = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)).map(
        lambda change: whole[: change[0]] + bytes([whole[change[0]] ^ change[1]]) + whole[change[0] + 1 :]
    )
    return (
        st.builds(replaced, st.sampled_from(_paths(document)), VALUES) | cut | flipped | st.binary(max_size=40)
        | st.just(b"[" * 100_000)
    )  # fmt: skip


def refused_or_read(read: Callable[[Path], Any], name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run-00000000" / name
        file.parent.mkdir()
        file.write_bytes(content)
        try:
            read(file)
        except InputError as error:
            line = str(error)
        else:
            return
    assert "\n" not in line
    assert len(line) < 2000


def _status(file: Path) -> None:
    run = Run(file.parent)
    table(refresh_run_statuses([run]))
    _ = run.lock_holder
    _ = run.divergence


def _manifest(file: Path) -> None:
    run = Run(file.parent)
    with suppress(InputError):
        run.is_trained()
    require_own_manifest(file.parent, run.manifest)


class TestJson:
    """JSON files of an output folder."""

    @fuzzed
    @given(changed(MANIFEST))
    def test_json(self, content: bytes) -> None:
        refused_or_read(read_json, "x.json", content)
        refused_or_read(read_object, "x.json", content)

    @fuzzed
    @given(changed(MANIFEST))
    def test_manifests_of_runs(self, content: bytes) -> None:
        refused_or_read(_manifest, "manifest.json", content)

    @fuzzed
    @given(VALUES)
    def test_current_words(self, value: Any) -> None:
        if isinstance(value, dict):
            current_manifest(value)

    @fuzzed
    @given(changed(STATUS))
    def test_statuses(self, content: bytes) -> None:
        refused_or_read(_status, "status.json", content)

    @fuzzed
    @given(changed(RECORD))
    def test_submission_records(self, content: bytes) -> None:
        refused_or_read(read_record, "slurm.json", content)
        refused_or_read(lambda file: table(refresh_run_statuses([Run(file.parent)])), "slurm.json", content)

    @fuzzed
    @given(changed(INTENT))
    def test_intents(self, content: bytes) -> None:
        refused_or_read(_content, "submission-1.json", content)

    @fuzzed
    @given(changed({"adapters": {"a": "1"}, "measured_pairs": [["a", "b"]], "losses": {"x": {"title": "X"}}}))
    def test_manifests_of_analyses(self, content: bytes) -> None:
        refused_or_read(lambda file: read_earlier(file.parent), "manifest.json", content)
        refused_or_read(lambda file: AnalysisFolder(file.parent), "manifest.json", content)

    @fuzzed
    @given(changed(LORA))
    def test_adapter_configurations(self, content: bytes) -> None:
        refused_or_read(lambda file: LoraConfigFile(file).scale("model.q_proj", 2), "adapter_config.json", content)

    @fuzzed
    @given(VALUES)
    def test_a_sealed_value_is_read_as_it_was(self, value: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "x.json"
            write_json(file, {"value": value}, sealed=True)
            assert json.dumps(read_json(file)) == json.dumps({"value": value})


class TestOthers:
    """Files that are not JSON."""

    @fuzzed
    @given(changed({"prompt": "1 + 1", "answer": "2"}), st.sampled_from(["x.jsonl", "x.csv", "x.parquet"]))
    def test_problem_files(self, content: bytes, name: str) -> None:
        refused_or_read(lambda file: list(read_rows(file, csv=True)[1]), name, content)
        refused_or_read(lambda file: list(read_rows(file)[1]), name, b"\x1f\x8b" + content)

    @fuzzed
    @given(changed({"key": "0", "text": "7", "tokens": 1, "finished": True, "prompt_tokens": None}), st.booleans())
    def test_journals(self, content: bytes, complete: bool) -> None:
        def read(file: Path) -> None:
            journal = Journal(file)
            journal.close()
            assert all(isinstance(each, Completion) for each in journal.completions.values())

        refused_or_read(read, "x.jsonl", content + b"\n" * complete)

    @fuzzed
    @given(st.binary(max_size=60), st.integers(0, 10**6))
    def test_parquet(self, content: bytes, place: int) -> None:
        whole = _outcomes()
        place %= len(whole)
        damaged = whole[:place] + content + whole[place + len(content) :]
        for read in (read_parquet, read_outcomes):
            refused_or_read(read, "x.parquet", damaged)
            refused_or_read(read, "x.parquet", content)

    @fuzzed
    @given(st.binary(max_size=60), st.integers(0, 10**6))
    def test_adapters(self, content: bytes, place: int) -> None:
        whole = _weights()
        place %= len(whole)

        def read(file: Path) -> None:
            (file.parent / "adapter_config.json").write_text(json.dumps(LORA))
            with open_adapter(file.parent) as adapter:
                for module in adapter.modules:
                    assert all(np.isfinite(array).all() for array in adapter[module].arrays().values())

        damaged = whole[:place] + content + whole[place + len(content) :]
        for each in (damaged, damaged[: len(whole) // 2], content):
            refused_or_read(read, "adapter_model.safetensors", each)

    @fuzzed
    @given(st.binary(max_size=60))
    def test_tables(self, content: bytes) -> None:
        for text in (content, b"run_a,cosine\n" + content):
            refused_or_read(
                lambda file: AnalysisFolder(file.parent).table("pairs", ("run_a",), ("cosine",)), "pairs.csv", text
            )


CHOICE = {
    "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "1 + 1 = 2", "reasoning": "so"},
    "token_ids": [5, 6], "logprobs": {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": []}] * 2},
}  # fmt: skip
CHAT = {
    "id": "a", "object": "chat.completion", "created": 1, "model": "m", "choices": [CHOICE], "prompt_token_ids": [1, 2],
    "usage": {"completion_tokens": 2, "prompt_tokens": 2, "total_tokens": 4},
}  # fmt: skip
TEXT = {
    **CHAT, "object": "text_completion",
    "choices": [{
        "index": 0, "finish_reason": "length", "text": "2", "token_ids": [5], "logprobs": {"token_logprobs": [-1.5]},
    }],
}  # fmt: skip


class TestServers:
    """Answers of servers and of the process that checks answers, which may be anybody's."""

    @fuzzed
    @given(
        st.sampled_from([CHAT, TEXT]).flatmap(lambda answer: st.tuples(st.just(answer is TEXT), changed(answer))),
        st.sampled_from([200, 200, 200, 204, 400, 422, 429, 500, 302]),
        st.sampled_from([{}, {"retry-after": "x"}, {"retry-after": "-1"}, {"retry-after": "nan"}]),
    )
    def test_answers_of_a_server(self, answer: tuple[bool, bytes], status: int, headers: dict[str, str]) -> None:
        """A completion that is stored and read back as it came, or `ServerError` in one line."""
        by_ids, content = answer
        kept: dict[str, Completion] = {}
        line = ""
        request = Request("1 + 1", 7, (1, 2) if by_ids else None)
        server = Server(
            base_url="http://localhost:1/v1", model="m", api_key_env="NO_KEY", concurrency=1, attempts=1, timeout=1,
            requests_per_minute=None, token_ids="auto", price_prompt=None, price_completion=None, extra_body=None,
        )  # fmt: skip

        def respond(_: httpx.Request) -> httpx.Response:
            return httpx.Response(status, content=content, headers={"content-type": "application/json", **headers})

        def client(**options: Any) -> openai.AsyncOpenAI:
            return made(**options, http_client=httpx.AsyncClient(transport=httpx.MockTransport(respond)))

        made = openai.AsyncOpenAI
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setattr(openai, "AsyncOpenAI", client)
            try:
                ask("server", server, "m", {"0": request}, Decoding(1.0, 1.0, 9, logps=True), kept.__setitem__, "")
            except ServerError as error:
                line = str(error)
            if not kept:
                assert "\n" not in line
                assert 0 < len(line) < 2000
                return
            assert not line
            [completion] = kept.values()
            assert all(0 <= id_ < 2**31 for id_ in completion.ids or ())
            assert all(-9999 < value <= 0 for value in completion.sampler_raw_logps or ())
            journal = Journal(Path(folder) / "x.jsonl")
            journal.add(kept)
            journal.close()
            assert Journal(Path(folder) / "x.jsonl").completions == kept

    @fuzzed
    @given(changed({"number": 1, "answer": "7", "correct": True, "trouble": ""}))
    def test_answers_of_the_process_that_checks_answers(self, content: bytes) -> None:
        """A verdict that can be stored; correct only if it says so of this request."""
        checker = _Checker("losslens.problems.mathematics", needs_network=False)
        line = content.replace(b"\n", b" ") + b"\n"
        fake: Any = SimpleNamespace(
            stdin=io.BytesIO(), stdout=io.BytesIO(line), poll=lambda: None, kill=lambda: None, communicate=lambda: None
        )
        checker._process = fake
        problem = Problem("a", "1 + 6", "7")
        try:
            verdict = checker.verdict(MathVerify(), problem, "7", 5.0)
        except InputError:
            return
        f"{verdict.answer}{verdict.trouble}".encode()
        if verdict.correct:
            said = json.loads(line)
            assert (said["number"], said["correct"]) == (1, True)

    @fuzzed
    @given(st.text(max_size=20), VALUES, st.dictionaries(st.text(max_size=6), VALUES, max_size=2))
    def test_verifiers_in_a_configuration(self, path: str, value: Any, options: dict[str, Any]) -> None:
        known = {"_target_": "losslens.problems.mathematics.MathVerify", **options}
        for read, setting in itertools.product((verifier_of, identity_of), (path, {"_target_": value}, known)):
            line = ""
            try:
                read(setting)
            except InputError as error:
                line = str(error)
            assert "\n" not in line


class TestConfigurations:
    """What a user's YAML files may say: a value of any kind in the place of any other."""

    @fuzzed
    @given(st.data())
    def test_configurations_of_a_run(self, data: Any) -> None:
        content = json.loads(_composed())
        path = data.draw(st.sampled_from(_paths(content)[1:]))
        inner = content
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = data.draw(VALUES | st.sampled_from(["${x", "${seed}", "${nowhere}", "???", "main", "0.5"]))

        def refuse(field: str, path: str, *_: Any) -> Any:
            raise InputError(f"{field}={path}: not on the hub")

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(hub, "resolve_commit", refuse)
                spec = RunSpec.of(parse(TrainConfig, OmegaConf.create(content)))
                folder = spec.run.folder
        except (InputError, OmegaConfBaseException):  # as `core.jobs` tells them
            return
        assert folder.parent.parent == Path(spec.config.output_dir)
        assert folder.name.endswith(hash_json(json.loads(json.dumps(spec.identity)), 8))


@cache
def _composed() -> str:
    """The default configuration of `train.py`, unresolved, as JSON."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return json.dumps(OmegaConf.to_container(compose("train"), resolve=False))


def _outcomes() -> bytes:
    import pandas as pd

    from losslens.evaluation.outcomes import write_outcomes

    with tempfile.TemporaryDirectory() as folder:
        row = {"problem_id": "a", "sample": 0, "completion": "7", "answer": "7", "correct": True, "tokens": 1}
        write_outcomes(pd.DataFrame([{**row, "finished": True}]), Path(folder) / "x", "asked", "scored")
        return (Path(folder) / "x").read_bytes()


def _weights() -> bytes:
    from safetensors.numpy import save

    name = "base_model.model.layers.0.q_proj"
    shapes = {f"{name}.lora_A.weight": (2, 4), f"{name}.lora_B.weight": (3, 2)}
    return save({key: np.ones(shape, dtype=np.float32) for key, shape in shapes.items()})
