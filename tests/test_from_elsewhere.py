"""What comes from elsewhere runs nothing, is told nothing, and at worst is refused in one line."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from losslens.analysis.gathering import find_runs, gather_cohort
from losslens.config.data import Server
from losslens.core import redaction
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError, ServerError
from losslens.core.files import read_json, read_object, read_parquet, write_json
from losslens.core.hashing import hash_json
from losslens.evaluation.outcomes import (
    SCHEMA,
    is_scored,
    read_outcomes,
    recorded_model_fingerprint,
    task_fingerprint,
    write_outcomes,
)
from losslens.models.loading import load_model, model_identity
from losslens.rollouts.frozen import load_rollouts
from losslens.sampling.server import Decoding, Request, _completion, ask
from tests.conftest import ROOT, TINY, base_source, cold, script, served_by
from tests.test_server import asked, command

KEY = "sk-Very.Secret/Key+0123456789"
TOKEN = "T0ken-in-the-path"
SMALL = [
    "data.train_size=12", "data.eval_size=6", "rollouts.policy=base", "rollouts.samples_per_prompt=2",
    "rollouts.max_tokens=32",
    "evaluation.max_tokens=16", "optim.max_steps=2", "optim.batch_size=4", "optim.save_steps=2", "optim.log_steps=2",
    "logger=none",
]  # fmt: skip
ANALYSIS = [
    "logger=none", "connectivity.resamples=100", "connectivity.points=3", "probe_set.problems=20", "rotated_copies=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two steps."""
    folder = tmp_path_factory.mktemp("made") / "outputs"
    script("train.py", "-m", "method=sft,dft", *SMALL, f"output_dir={folder}")
    return folder


@pytest.fixture
def outputs(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "outputs")


@pytest.fixture
def crooked(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    log = tmp_path / "requests.log"
    with served_by("crooked_server", log) as url:
        yield url, log


def edit(outputs: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifests of all runs, as whoever hands over a run folder can."""
    for file in outputs.glob("main/*-s42-*/manifest.json"):
        manifest = read_object(file)
        change(manifest)
        file.write_text(json.dumps(manifest))


def one_line(outcome: subprocess.CompletedProcess[str], name: str) -> str:
    lines = [line for line in outcome.stderr.splitlines() if line.startswith(f"{name}: ")]
    assert len(lines) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return lines[0]


def test_a_manifest_that_names_code_runs_none(outputs: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    attack = {"_target_": "subprocess.Popen", "args": ["touch", str(ran)]}

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"]["data"]["source"] = attack
        manifest["config"]["rollouts"]["_target_"] = "subprocess.Popen"

    edit(outputs, change)
    outcome = script("analyze.py", *ANALYSIS, f"output_dir={outputs}")
    reason = "the manifest names code for its problems, 'subprocess.Popen', which is only run if"
    assert f"left out: connectivity, CKA, KL, outputs and activations: {reason}" in outcome.stdout.replace("\n", " ")
    script(
        "evaluate.py",
        "benchmark=arithmetic",
        "benchmark.arithmetic.eval_size=3",
        "evaluation.max_tokens=16",
        f"output_dir={outputs}",
    )
    assert not ran.exists()


def test_a_source_of_ones_own_is_made_again_when_the_command_line_names_it(outputs: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        source = manifest["config"]["data"]["source"]
        source["_target_"] = "tests.own_problems.Own"

    edit(outputs, change)
    line = ["analyze.py", *ANALYSIS, f"output_dir={outputs}", "sources=[tests.own_problems.Own]"]
    outcome = script(*line, check=None)  # too few answers of these two steps are right to measure anything on
    assert "names code" not in outcome.stdout + outcome.stderr
    assert list(outputs.glob("rollouts/arithmetic-heldout-*"))


def test_a_manifest_sends_no_key_to_a_server(
    outputs: Path, crooked: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's address and the name of a variable; with the user's own address it is asked, with the user's key."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x1" * 10)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, log = crooked

    def change(manifest: dict[str, Any]) -> None:
        rollouts = manifest["config"]["rollouts"]
        rollouts["engine"] = "openai"
        rollouts["server"] |= {"base_url": url, "api_key_env": "HF_TOKEN", "model": "good"}

    edit(outputs, change)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    outcome = script("analyze.py", *ANALYSIS, f"output_dir={outputs}")
    assert "used only if probe_set.base_url is set" in outcome.stdout
    assert not asked(log)
    script("analyze.py", *ANALYSIS, f"output_dir={outputs}", f"probe_set.base_url={url}", check=None)
    assert asked(log)


def test_a_manifest_starts_no_server(outputs: Path, tmp_path: Path) -> None:
    """What vLLM sampled from a local model is sampled here; the command in the manifest is a stranger's."""
    ran = tmp_path / "ran"

    def change(manifest: dict[str, Any]) -> None:
        rollouts = manifest["config"]["rollouts"]
        rollouts |= {"engine": "vllm", "policy": "base"}
        rollouts["server"] |= {"command": f"touch {ran}", "args": {"x": 1}}

    edit(outputs, change)
    outcome = script("analyze.py", *ANALYSIS, f"output_dir={outputs}", check=None)
    assert not ran.exists()
    assert not (outputs / ".vllm").exists()
    assert "vLLM" not in outcome.stdout + outcome.stderr


CODE = """
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
open({file!r}, "a").write("ran")
class Config(Qwen3Config):
    model_type = "of-its-own"
class Model(Qwen3ForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model folder that comes with code, which writes a file when it is imported."""
    folder = shutil.copytree(TINY / "student", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    write_json(folder / "config.json", config | {"model_type": "of-its-own", "auto_map": own})
    (folder / "own.py").write_text(CODE.format(file=str(tmp_path / "ran")))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", tokenizer | {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}})
    return folder


def test_transformers_never_asks(with_code: Path, tmp_path: Path) -> None:
    """On a terminal, with a `y` that waits to be read."""
    terminal, end = pty.openpty()
    os.write(terminal, b"y\ny\ny\n")
    line = [sys.executable, "train.py", *SMALL, f"model.path={with_code}", f"output_dir={tmp_path / 'outputs'}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    outcome = subprocess.run(line, cwd=ROOT, stdin=end, capture_output=True, text=True, env=environment, check=False)
    assert outcome.returncode == 2, outcome.stderr
    assert "model.trust_remote_code=true" in one_line(outcome, "train.py")
    assert not (tmp_path / "ran").exists()


def test_trust_in_code_is_the_command_lines(with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trained these runs trusted their base's code, and their manifests say so; who reads them has not."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    outputs, ran = tmp_path / "outputs", tmp_path / "ran"
    own = [f"model.path={with_code}", "model.trust_remote_code=true"]
    cold("train.py", "-m", "method=sft,dft", *SMALL, *own, f"output_dir={outputs}")
    assert ran.exists()
    ran.unlink()
    score = ["evaluate.py", "benchmark=arithmetic", "benchmark.arithmetic.eval_size=3", f"output_dir={outputs}"]
    assert "model.trust_remote_code=true" in one_line(script(*score, check=2), "evaluate.py")
    outcome = script("analyze.py", *ANALYSIS, f"output_dir={outputs}")
    assert "trust_remote_code=true" in outcome.stdout
    assert not ran.exists()


def test_a_manifest_of_another_base_is_refused(outputs: Path, with_code: Path, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["config"]["model"] |= {"path": str(with_code), "package": None, "trust_remote_code": True}
        manifest["base"] = model_identity(base_source(path=str(with_code)))

    edit(outputs, change)
    for name, arguments in (("evaluate.py", ["benchmark=arithmetic"]), ("analyze.py", ANALYSIS)):
        outcome = script(name, *arguments, f"output_dir={outputs}", check=2)
        assert "base is" in one_line(outcome, name)
        assert "the file was changed or belongs to another run" in one_line(outcome, name)
    assert not (tmp_path / "ran").exists()
    load_model.cache_clear()


def everything_below(folder: Path) -> str:
    return "\n".join(file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file())


def test_keys_and_tokens_are_told_to_nobody(
    crooked: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that repeats its key and its address in an error, then in its answers; W&B and Hydra write too."""
    monkeypatch.setenv("MY_ODD_NAME", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    url = crooked[0].replace("/v1", f"/{TOKEN}/v1")
    told = []
    outputs = tmp_path / "outputs"
    for model, status in (("tells", 1), ("echoes", 0)):
        server = [f"rollouts.server.base_url={url}", f"rollouts.server.model={model}"]
        line = [*SMALL[:-1], "rollouts.engine=openai", *server, "rollouts.server.api_key_env=MY_ODD_NAME"]
        line.append("rollouts.accept=all_incorrect")
        outcome = script("train.py", "-m", "method=sft", *line, f"output_dir={outputs}", check=status)
        told.append(outcome.stdout + outcome.stderr)
        assert "Traceback" not in told[-1]
    assert "[redacted]" in told[0]
    assert "/…/v1" in told[0]
    for text in (*told, everything_below(outputs)):
        assert KEY not in text
        assert KEY[:20] not in text
        assert TOKEN not in text
    [folder] = (outputs / "rollouts").glob("arithmetic-*")
    assert json.loads((folder / "manifest.json").read_text())["base_url"] == url.replace(TOKEN, "…")


def test_what_a_server_says_steers_no_terminal(crooked: tuple[str, Path], tmp_path: Path) -> None:
    outcome = script(*command(tmp_path, crooked[0], "tells"), check=1)
    assert not [c for c in outcome.stdout + outcome.stderr if c in "\x1b\x07\u202e\x9b"]
    assert r"\x1b" in one_line(outcome, "rollout.py")


def test_names_of_folders_steer_no_terminal(tmp_path: Path) -> None:
    name = f"{tmp_path}/a\x1b]0;x\x07b\x1b[8mc"
    Path(name).write_text("no folder")
    for place in ("model.path", "rollouts.path"):
        outcome = script("train.py", *SMALL, f'{place}="{name}"', f"output_dir={tmp_path / 'outputs'}", check=2)
        assert not [c for c in outcome.stdout + outcome.stderr if c in "\x1b\x07"]
        assert r"a\x1b]0;x\x07b\x1b[8mc" in one_line(outcome, "train.py")


ODD = [
    "list", "number", "reasoning", "no-message", "message-text", "choices-object", "choices-text", "array", "null",
    "latin", "deep", "binary",
]  # fmt: skip
COUNTS = ["-5", "1e300", "NaN", "99999999999999999999999", '"many"', "[1]", "2.5"]


def answered(url: str, model: str) -> dict[str, Completion]:
    """What is kept of a server's answers to two prompts, each asked at most twice."""
    settings = dict.fromkeys(("requests_per_minute", "price_prompt", "price_completion", "extra_body"))
    server = Server(
        token_ids="off",
        base_url=url, model=model, api_key_env="NO_SUCH_KEY", concurrency=2, attempts=2, timeout=20, **settings
    )  # fmt: skip
    kept: dict[str, Completion] = {}
    requests = {"a": Request("1 + 1", 1), "b": Request("2 + 2", 2)}
    ask("rollouts.server", server, model, requests, Decoding(1.0, 1.0, 8), kept.__setitem__, "answers")
    return kept


def test_answers_that_are_none_are_told_in_one_line_and_not_kept(crooked: tuple[str, Path]) -> None:
    for kind in ODD:
        with pytest.raises(ServerError, match="no answer in 2 attempts") as error:
            answered(crooked[0], f"odd-{kind}")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600
    assert max(asked(crooked[1]).values()) == 2


def test_counts_that_are_none_are_not_known(crooked: tuple[str, Path], tmp_path: Path) -> None:
    """The answer was paid for, and is one; how long it was is not known. What is kept can be read again."""
    for number, count in enumerate(COUNTS):
        kept = answered(crooked[0], f"counts-{count}")
        assert {(c.text, c.tokens) for c in kept.values()} == {("<answer>7</answer>", None)}
        journal = Journal(tmp_path / f"{number}.jsonl")
        journal.add(kept)
        journal.close()
        assert Journal(tmp_path / f"{number}.jsonl").completions == kept


DAMAGED = {"deep": "[" * 200_000, "array": "[]", "text": '"x"', "null": "null", "digits": "1" * 5000, "cut": '{"a": '}


@pytest.mark.parametrize("kind", [*DAMAGED, "latin"])
def test_a_json_file_that_is_none_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_bytes(b'{"a": "\xe9"}' if kind == "latin" else DAMAGED[kind].encode())
    with pytest.raises(InputError, match=r"manifest\.json: (no|the JSON is nested)") as error:
        read_object(file)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)


def compared(outputs: Path) -> None:
    """What `analyze.py` reads of the runs before it measures anything."""
    gather_cohort(find_runs(outputs, ["main"], None), {})


def test_a_damaged_run_is_refused_in_one_line(outputs: Path) -> None:
    [run] = outputs.glob("main/sft-*")
    for name in ("manifest.json", "status.json"):
        before = (run / name).read_text()
        for kind in DAMAGED:
            (run / name).write_text(DAMAGED[kind])
            with pytest.raises(InputError, match=re.escape(str(run / name))) as error:
                compared(outputs)
            assert "\n" not in str(error.value)
        (run / name).write_text(before)
    (run / "manifest.json").write_text(DAMAGED["deep"])
    outcome = script(
        "evaluate.py", "benchmark=arithmetic", "benchmark.arithmetic.eval_size=3", f"output_dir={outputs}", check=2
    )
    assert str(run / "manifest.json") in one_line(outcome, "evaluate.py")


OTHER_TYPES: list[tuple[str, Any]] = [
    ("config.lr.name", 5), ("config.lr.name", "a b"), ("config.lr.peak", -1), ("config.lr.peak", "x"),
    ("config.lr", []), ("config", "x"), ("config.lora_rank.r", []), ("rollouts", []), ("rollouts.folder", "../../x"),
    ("base", []), ("method", {}), ("identity", 3), ("training.steps", "many"), ("initial_adapter.folder", 7),
    ("config.seed", []), ("config.benchmark", 4), ("config.data.eval_size", "x"), ("adapter_sha256", 5),
    ("conventional_lr_scale", "?"), ("config.lr.factor", "x"),
]  # fmt: skip


def test_a_value_of_another_type_in_a_manifest_is_refused_in_one_line(outputs: Path) -> None:
    [file] = outputs.glob("main/sft-*/manifest.json")
    before = file.read_text()
    compared(outputs)
    for path, value in OTHER_TYPES:
        manifest = inner = json.loads(before)
        manifest.pop("content_sha256", None)
        *parents, last = path.split(".")
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        file.write_text(json.dumps(manifest))
        with pytest.raises(InputError) as error:
            compared(outputs)
        assert "\n" not in str(error.value)


def test_a_flipped_byte_in_a_parquet_file_is_one_line(outputs: Path, tmp_path: Path) -> None:
    """In its own metadata, where pyarrow raises all kinds of errors."""
    [rollouts] = outputs.glob("rollouts/arithmetic-*[!t]")
    [outcomes] = outputs.glob("main/sft-*/eval/*.parquet")
    told = []
    for file, read in (
        (rollouts / "rollouts.parquet", lambda: load_rollouts(rollouts)),
        (outcomes, lambda: (read_outcomes(outcomes), task_fingerprint(outcomes), is_scored(outcomes, "a", "b"))),
    ):
        content = file.read_bytes()
        footer = int.from_bytes(content[-8:-4], "little") + 8
        for place in range(len(content) - footer, len(content), 23):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            try:
                read()
            except InputError as error:
                told.append(str(error))
    assert len(told) > 50
    assert not [line for line in told if "\n" in line or ".parquet: " not in line]
    (tmp_path / "not.parquet").write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    with pytest.raises(InputError, match=r"not\.parquet: not a readable parquet file"):
        read_parquet(tmp_path / "not.parquet")


def test_what_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SOME_API_KEY": "abcd1234efgh", "GH_TOKEN": "ghp_abcdefgh", "DB_PASSWORD": "Hunter2Hunter2",
        "MY_KEY": "arithmetic",
        "SHORT_KEY": "x1", "HTTPS_PROXY": "http://me:pass0word1@proxy:80", "A_SECRET": "word-word-1",
        "KEY_OF_A_FILE_KEY": str(ROOT),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    value = {
        "a": ["abcd1234efgh x", ("ghp_abcdefgh",)], "Hunter2Hunter2": 1, "data": "arithmetic x1 word", "n": 2.5,
        "url": "http://u:p@h/v1?api_key=zzz&x=1", "proxy": "pass0word1", "root": str(ROOT),
    }  # fmt: skip
    assert redaction.remove_secrets(value) == {
        "a": ["[redacted] x", ["[redacted]"]], "[redacted]": 1, "data": "arithmetic x1 word", "n": 2.5,
        "url": "http://[redacted]@h/v1?api_key=[redacted]&x=1", "proxy": "[redacted]", "root": str(ROOT),
    }  # fmt: skip
    assert redaction.public_address("https://u:p@h:8/abc/v1/deployments/x?k=v") == "https://h:8/…/v1/deployments/…"
    assert redaction.public_address("http://127.0.0.1:8000/v1") == "http://127.0.0.1:8000/v1"
    assert redaction.escape_control("é\t\n\x1b[0m\x9b\u202e") == "é\t\n\\x1b[0m\\x9b\\u202e"


SECRET = "Zx9Qw3Lk7Pm2Rt5vBn8a"
SERVERS = {  # address, the model's name there
    "https://me.openai.azure.com/openai/deployments/gpt-4o-mini": "gpt-4o-mini",
    "https://me.openai.azure.com/openai/deployments/my-deployment-of-2024/v1": "my-deployment-of-2024",
    "https://router.huggingface.co/hf-inference/models/meta-llama/Llama-3.1-8B-Instruct/v1": "meta-llama/Llama-3.2-1B",
    "https://openrouter.ai/api/v1": "qwen/qwen3-30b-a3b-instruct-2507",
    "https://api.together.xyz/v1": "Qwen/Qwen2.5-7B-Instruct-Turbo",
    "https://gateway.ai.cloudflare.com/v1/0123456789abcdef0123456789abcdef/arithmetic/openai": "gpt-4o-mini",
    "https://api.fireworks.ai/inference/v1/accounts/a1b2c3d4e5f6g7h8i9/v1": "accounts/a1b2c3d4e5f6g7h8i9/models/x",
    f"http://localhost:8000/{SECRET}/v1": "Qwen/Qwen3-4B",
    "http://localhost:8000/models": "/models/Qwen3-4B",
    "http://localhost:8000/attention/proj-rift": "attention",
}


@pytest.mark.parametrize("url", SERVERS)
def test_an_address_hides_nothing_of_what_a_run_is(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity is the same when it is read again, and names and options are what they were."""
    monkeypatch.setattr(redaction, "_remembered", set())
    monkeypatch.setattr(redaction, "_paths", set())
    monkeypatch.setattr(redaction, "_names", set())
    monkeypatch.setenv("MY_KEY", "meta-llama/Llama-3.2-1B")
    model = SERVERS[url]
    settings = dict.fromkeys(("requests_per_minute", "price_prompt", "price_completion", "extra_body"))
    server = Server(
        base_url=url, model=model, api_key_env="NO", concurrency=1, attempts=1, timeout=9, token_ids="off", **settings
    )
    redaction.remember_address(url)
    writer = {"server_model": model, "extra_body": redaction.hash_secrets({"api_key": SECRET, "top_k": 5})}
    identity = {"method": {"name": "proj-rift"}, "base": {"path": model}, "rollouts": {"writer": writer}, "url": url}
    config = {
        "model": {"path": "meta-llama/Llama-3.2-1B", "target_modules": "attention"}, "method": {"name": "proj-rift"},
        "data": {"name": "arithmetic", "path": "/data/attention"}, "rollouts": {"server": server.model_dump()},
    }  # fmt: skip
    write_json(tmp_path / "manifest.json", {"run": "proj-rift-x", "identity": identity, "config": config})
    manifest = read_json(tmp_path / "manifest.json")
    assert hash_json(manifest["identity"], 8) == hash_json(identity, 8)
    assert manifest["config"]["rollouts"]["server"].pop("base_url") == redaction.public_address(url)
    config["rollouts"]["server"].pop("base_url")
    assert manifest["config"] == config
    assert manifest["run"] == "proj-rift-x"
    assert SECRET not in json.dumps([writer, manifest["config"]])
    assert SECRET not in url or SECRET not in redaction.remove_secrets(f"{url}: no {SECRET}")
    assert url == redaction.public_address(url) or url not in redaction.remove_secrets(f"x={url}/chat")


@pytest.mark.parametrize("key", ["whatever", "not-needed", "sk-no-key-required", "12345678", "EMPTY", None, KEY])
def test_a_completion_is_kept_as_it_was_written(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any environment, for any placeholder; only a key that the server repeats is hidden, with its ids."""
    monkeypatch.setattr(redaction, "_remembered", {"compute it"})
    monkeypatch.setenv("SOME_API_KEY", "so-we-compute-1")
    text = (
        "So whatever not-needed sk-no-key-required 12345678 EMPTY http://u:p@a.b/c?zipcode=12345&key=x so-we-compute-1"
    )
    for said in (text, f"{text} {KEY}"):
        message = SimpleNamespace(content=said, reasoning_content=None)
        choice = SimpleNamespace(message=message, finish_reason="stop", token_ids=[1, 2])
        kept = _completion(SimpleNamespace(choices=[choice], prompt_token_ids=[3]), key)
        hidden = key == KEY and said != text
        assert kept.text == (f"{text} [redacted]" if hidden else said)
        assert kept.ids == (None if hidden else (1, 2))


def test_who_asked_and_answered_is_read_without_the_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.parquet"
    write_outcomes(SCHEMA.empty_table().to_pandas(), file, "asked", "scored")
    monkeypatch.setattr("pyarrow.parquet.read_table", None)
    assert (task_fingerprint(file), recorded_model_fingerprint(file)) == ("asked", "scored")
    file.write_bytes(b"PAR1" + b"\xff" * 99 + b"PAR1")
    with pytest.raises(InputError, match=r"x\.parquet: not a readable parquet file"):
        recorded_model_fingerprint(file)
    with pytest.raises(InputError, match="no such file"):
        task_fingerprint(tmp_path / "none.parquet")
