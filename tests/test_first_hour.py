"""A new user's first hour: a model and problems of one's own, paths as they are, experiments, and lines that help."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from losslens.cli.arguments import explain_rejection, prepare_arguments
from losslens.cli.key_values import KeyValueParser
from losslens.config.analysis import AnalyzeConfig
from losslens.config.data import RolloutConfig
from losslens.config.evaluation import EvaluateConfig
from losslens.config.interpolations import describe_derived
from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core.errors import InputError
from losslens.core.redaction import guard_streams
from losslens.evaluation.score import require_problems
from losslens.models.adapters import LoraSettings
from losslens.pipeline.sweep import SweepJobs
from losslens.pipeline.train_job import Outcome, train_job
from losslens.runs.run import require_one_base
from tests.conftest import ROOT, TINY, script

SCHEMAS = {"train": TrainConfig, "rollout": RolloutConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig}
WRITERS = ("rollouts.policy=base", "model.teacher=", "rollouts.engine=openai rollouts.server.model=")


def composed(*overrides: str, of: str = "train", hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(of, prepare_arguments(overrides, f"{of}.py", SCHEMAS[of]), return_hydra_config=hydra)


def settings(*overrides: str) -> TrainConfig:
    return parse(TrainConfig, composed(*overrides))


def refused(name: str, *arguments: str) -> str:
    outcome = script(name, *arguments, check=2)
    [line] = outcome.stderr.splitlines()
    assert line.startswith(f"{name.rpartition('/')[2]}: ")
    return line


# A model of one's own


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Twenty problems of one's own."""
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"What is {n} + 1?", "answer": n + 1}) + "\n" for n in range(20)))
    return file


SIZE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 319, "max_position_embeddings": 512, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZE, head_dim=8)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE)),
    "olmo": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=319, n_positions=512, eos_token_id=2, pad_token_id=0)
    ),
}


def folder_of(make: Any, folder: Path, template: bool) -> Path:
    """A model with random weights and the tiny tokenizer."""
    torch.manual_seed(0)
    model: PreTrainedModel = make()
    model.save_pretrained(folder)
    for file in (TINY / "student").iterdir():
        if "token" in file.name or (template and file.name == "chat_template.jinja"):
            shutil.copyfile(file, folder / file.name)
    return folder


def test_a_model_of_ones_own_inherits_nothing(tmp_path: Path) -> None:
    own = settings("model.path=/models/My Model (2)")
    assert own.model.teacher is None
    assert own.model.teacher_revision is None
    assert own.model.name == "My-Model-2"
    assert own.model.target_modules == "attention"
    assert (own.model.default_lr, own.lr.peak) == (2e-4, 2e-4)
    assert (own.rollouts.max_tokens, own.evaluation.max_tokens) == (1024, 1024)
    said = describe_derived(composed("model.path=/models/My Model (2)"))
    for told in (
        "model.name=My-Model-2",
        "model.target_modules=attention",
        "model.default_lr=0.0002",
        "max_tokens=1024",
    ):
        assert told in said
    # What is given counts, also where it is what the embedded model has.
    given = settings(
        "model.path=/m", "model.default_lr=1e-3", "rollouts.max_tokens=96", "model.target_modules=[q_proj]"
    )
    assert (given.lr.peak, given.rollouts.max_tokens, given.model.target_modules) == (1e-3, 96, ["q_proj"])
    assert "lr=" not in describe_derived(composed("model.path=/m", "lr.peak=1e-5"))
    # By half of what the model can hold, but not by next to nothing, which is told when it is met.
    for positions, length in ((4096, 1024), (600, 300), (64, 128)):
        (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        assert settings(f"model.path={tmp_path}").rollouts.max_tokens == length


@pytest.mark.parametrize("option", ["model=smollm2", "model=qwen3_0_6b", "model=qwen3_4b", "experiment=smollm2_cpu"])
def test_an_option_for_another_model_gives_it_nothing_of_its_own(option: str) -> None:
    line = ["model.path=/models/mine", "rollouts.max_tokens=40"]
    own, plain = settings(option, *line), settings(*line)
    named = {"package": None}  # of one path only
    assert own.model.model_copy(update=named) == plain.model
    assert own.lr == plain.lr
    assert describe_derived(composed(option, *line)) == describe_derived(composed(*line))
    itself = settings(option)
    assert itself.model.name in option
    assert itself.model.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert itself.lr.peak == {"model=qwen3_0_6b": 2e-5, "model=qwen3_4b": 5e-6, "model=smollm2": 2e-4}.get(option, 5e-4)
    assert "model." not in describe_derived(composed(option)).replace("model.path=", "")


def test_the_modules_that_there_are_are_named() -> None:
    with pytest.raises(InputError, match=r"no module is called k_proj; the linear modules are c_attn, c_proj, c_fc$"):
        LoraSettings(8, 16.0, 0.0, ("k_proj",)).peft_config(MODELS["gpt2"]())


def test_the_embedded_model_stays_as_it_was() -> None:
    tiny = settings()
    assert (tiny.model.name, tiny.model.teacher) == ("tiny", str(TINY / "teacher"))
    assert tiny.model.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (tiny.lr.peak, tiny.rollouts.max_tokens, tiny.evaluation.max_tokens) == (1e-3, 96, 96)
    assert describe_derived(composed()) == ""


def test_a_copy_of_the_embedded_student_has_its_rate_and_no_teacher(tmp_path: Path) -> None:
    """It may have another tokenizer or configuration; it is known by its weights."""
    copy = shutil.copytree(TINY / "student", tmp_path / "copy")
    (copy / "generation_config.json").write_text("{}")
    own, tiny = settings(f"model.path={copy}"), settings()
    assert own.model.teacher is None
    assert (own.lr, own.model.target_modules, own.rollouts) == (tiny.lr, tiny.model.target_modules, tiny.rollouts)


def test_a_revision_belongs_to_its_repository() -> None:
    qwen = settings("model=qwen3_0_6b")
    assert len(qwen.model.revision or "") == len(qwen.model.teacher_revision or "") == 40
    other = settings("model=qwen3_0_6b", "model.path=me/mine", "model.teacher=me/theirs")
    assert (other.model.revision, other.model.teacher_revision) == (None, None)
    assert settings("data=gsm8k").data.source["revision"]
    assert settings("data=gsm8k", "data.source.repo=me/mine").data.source["revision"] is None


@pytest.mark.parametrize("name", ["train.py", "rollout.py"])
def test_who_writes_is_asked(name: str, problems: Path, tmp_path: Path) -> None:
    """For a model of one's own, even a copy of the embedded one, and for a file; nothing is left behind."""
    output = tmp_path / "out"
    copy = shutil.copytree(TINY / "student", tmp_path / "copy")
    for own in ([f"model.path={copy}"], ["data=file", f"data.path={problems}"]):
        line = refused(name, *own, f"output_dir={output}")
        assert all(writer in line for writer in WRITERS)
    assert not output.exists()


def test_the_embedded_teacher_does_not_write_on_datasets_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)]
    for split in ("train", "test"):
        (tmp_path / "mine" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = ["data=gsm8k", f"data.source.repo={tmp_path / 'mine'}", "data.source.config=null"]
    line = script("train.py", *mine, f"output_dir={tmp_path / 'out'}", "logger=none", check=2).stderr.splitlines()[-1]
    assert "data=gsm8k" in line
    assert all(writer in line for writer in WRITERS)
    assert not (tmp_path / "out").exists()


def test_six_architectures_on_problems_of_ones_own(problems: Path, tmp_path: Path) -> None:
    """Random weights answer nothing: that is said, with how to go on; and going on works."""
    for number, (name, make) in enumerate(MODELS.items()):
        model = folder_of(make, tmp_path / name, template=number % 2 == 0)
        line = ["method=sft", f"model.path={model}", "data=file", f"data.path={problems}", "rollouts.policy=base"]
        line += ["rollouts.samples_per_prompt=1", "rollouts.max_tokens=8", "evaluation.max_tokens=4", "logger=none"]
        line += [f"output_dir={tmp_path / 'out'}", f"sweep={name}", "optim.max_steps=1", "optim.batch_size=2"]
        stopped = script("train.py", *line, check=2)
        assert "pass rate: " in stopped.stdout
        assert "truncated at the token limit: " in stopped.stdout
        [said] = [text for text in stopped.stderr.splitlines() if text.startswith("train.py: ")]
        assert "is correct" in said or "are truncated" in said
        assert "rollouts.accept=" in said
        if name in ("gemma", "gpt2"):
            done = script("train.py", *line, "rollouts.accept=[all_incorrect,mostly_cut]")
            assert f"model.name={name}" in done.stdout
            assert "fan_in_fan_out" not in done.stderr
            assert "PAD/BOS/EOS" not in done.stderr
            [run] = (tmp_path / "out" / name).glob(f"sft-conventional-r8-{name}-*")
            assert json.loads((run / "manifest.json").read_text())["learning_rate"] == 2e-4


def test_a_second_base_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """Its runs could not be compared with the others; one that failed is in nobody's way."""
    other = tmp_path / "out" / "two" / "sft-x-12345678"
    other.mkdir(parents=True)
    (other / "manifest.json").write_text(json.dumps({"base": {"sha256": "another"}}))
    (other / "status.json").write_text(json.dumps({"state": "completed"}))
    config = settings("sweep=two", f"output_dir={tmp_path / 'out'}")
    outcome = train_job(config)
    assert (outcome.state, outcome.exit_status) == ("failed", 2)
    assert "all runs of a sweep (sweep=two) must have the same base" in outcome.error
    assert [path.name for path in other.parent.iterdir()] == [other.name]
    (other / "status.json").write_text(json.dumps({"state": "failed"}))
    require_one_base(other.parent, config.model)


def test_a_server_of_earlier_scores_is_stopped_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def prepare(*_: Any) -> None:
        done.append("prepare")
        raise InputError("enough")

    monkeypatch.setattr("losslens.sampling.vllm.free_gpu", lambda: done.append("free"))
    monkeypatch.setattr("losslens.pipeline.train_job.prepare", prepare)
    assert train_job(settings(f"output_dir={tmp_path}", "logger=none")).error == "enough"
    assert done == ["free", "prepare"]


def test_a_refusal_of_every_job_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    alike = SweepJobs()
    for number in range(6):
        alike._ended(number, Outcome(f"run-{number}", "failed", error="no such thing", exit_status=2))
    assert alike.end() == 2
    assert "".join(capsys.readouterr()) == "train.py: no such thing\n"
    mixed = SweepJobs()
    for number, error in enumerate(["no such thing", "no such thing", "another"]):
        mixed._ended(number, Outcome(f"run-{number}", "failed", error=error, exit_status=2))
    mixed.end()
    said = capsys.readouterr().out
    assert (said.count("no such thing"), said.count("as above"), said.count("another")) == (1, 1, 1)


def test_a_file_without_a_reward_trains_what_does_not_use_it(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "reward": 0} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["data=file", f"data.path={file}", "data.eval_size=0", f"output_dir={tmp_path}", "logger=none"]
    line += ["optim.max_steps=1", "optim.batch_size=4"]
    outcome = script("train.py", "-m", "method=sft,rft", *line, check=2)
    assert "s42" in outcome.stdout
    assert len(list(tmp_path.glob("main/sft-*/adapter"))) == 1
    assert not list(tmp_path.glob("main/rft-*/adapter"))
    assert "none of the 8 rollouts is correct" in outcome.stderr
    assert outcome.stdout.count("pass rate: 0.0%") == 1  # once for both
    assert script("rollout.py", *line[:2], line[3]).stdout.startswith(str(tmp_path / "rollouts" / "file-"))


# Experiments


@pytest.mark.parametrize("name", ["train", "rollout", "evaluate", "analyze"])
def test_every_script_takes_every_experiment(name: str) -> None:
    """train.py sweeps over what it says; the others take from it what they read, and make one job of it.

    rollout.py makes the rollouts of each of several draws of the data.
    """
    for file in (ROOT / "conf" / "experiment").glob("*.yaml"):
        line = [f"experiment={file.stem}"]
        line += ["rollouts.server.model=x"] if name in ("train", "rollout") else []
        line += ["benchmark=gsm8k"] if name == "evaluate" else []
        config = composed(*line, of=name, hydra=True)
        sweeps = name == "train" and file.stem != "published"  # the adapters of others are not trained
        sweeps |= name == "rollout" and "data.seed" in (config.hydra.sweeper.params or {})
        assert config.hydra.mode == (RunMode.MULTIRUN if sweeps else None)
        checked = parse(SCHEMAS[name], config)
        assert getattr(checked, "sweep", file.stem) == file.stem
    assert composed(of=name, hydra=True).hydra.mode is None
    assert composed("hydra/launcher=slurm", of=name, hydra=True).hydra.mode == RunMode.MULTIRUN


def test_rollouts_are_swept_over_where_an_experiment_does() -> None:
    params = {"rollouts.samples_per_prompt": "2,4", "method": "sft,dpo"}
    for read_by, mode in (("[model,data,rollouts]", RunMode.MULTIRUN), ("[]", None), ("null", RunMode.MULTIRUN)):
        hydra = {"mode": f"${{implied_mode:{read_by}}}", "sweeper": {"params": params}}
        assert OmegaConf.create({"hydra": hydra}).hydra.mode == mode


def test_runs_are_scored_again_as_long_as_before(sweep: Path) -> None:
    line = ["sweep=main", f"output_dir={sweep}", "benchmark=arithmetic_long", "benchmark.arithmetic_long.eval_size=2"]
    for run in (file.parent for file in sweep.glob("main/*/status.json")):
        if not run.name.startswith("sft"):
            shutil.rmtree(run)  # also the base, as if none had been scored
    assert "benchmark" in refused("evaluate.py", *line[:2])
    script("evaluate.py", *line)
    before = set(sweep.glob("main/*/eval/arithmetic_long*.parquet"))
    assert {file.parents[1].name.partition("-")[0] for file in before} == {"sft", "base"}
    script("evaluate.py", *line, "evaluation.max_tokens=64")  # conftest.SMALL's
    assert set(sweep.glob("main/*/eval/arithmetic_long*.parquet")) == before


# The command line


def read(key: str, value: str, *flags: str) -> Any:
    """What Hydra reads as the value of a key."""
    *_, argument = prepare_arguments([*flags, f"{key}={value}"], "train.py", TrainConfig)
    override = OverridesParser.create().parse_override(argument)
    assert override.key_or_group == key
    return (
        [str(getattr(one, "text", one)) for one in override.value().list]
        if override.is_sweep_override()
        else override.value()
    )


@pytest.mark.parametrize(
    "path",
    [
        "~/roll.jsonl", "a=b.jsonl", "my data (1).jsonl", "x[1].jsonl", "{x}.jsonl", "7", "1e3", "true", "a b/c d",
        "日本/é.jsonl", "back\\slash", "it's", 'a"b"', "end\\", "a:b", "x,y=z", "50%", "#1", "@home", "$HOME", "a;b|c",
    ],
)  # fmt: skip
def test_a_path_needs_no_quotes_of_hydras(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for key in ("data.path", "model.path", "output_dir", "rollouts.path", "data.source.repo", "model.teacher"):
        assert read(key, path) == path


def test_what_means_more_than_a_path_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("data.path", "a.jsonl,b.jsonl", "-m") == ["a.jsonl", "b.jsonl"]
    assert read("data.path", "~/a,~/b", "-m") == ["~/a", "~/b"]
    assert read("rollouts.path", "null") is None
    assert read("output_dir", "${oc.env:HOME}/x") == "${oc.env:HOME}/x"
    assert read("sweep", "2026") == "2026"
    assert read("data.path", "'quoted, already'") == "quoted, already"
    (tmp_path / "one,two").touch()
    assert read("data.path", "one,two") == "one,two"
    [argument] = prepare_arguments(["adapters={a: ~/x (1), b: /y=z}"], "analyze.py", AnalyzeConfig)
    assert OverridesParser.create().parse_override(argument).value() == {"a": "~/x (1)", "b": "/y=z"}


def test_home_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = settings(
        "output_dir='~/o'", "model.path='~/m'", "model.teacher='~/t'", "data=file", "data.path='~/d'",
        "rollouts.path='~/r'", "weight_tracking.references={a: '~/l'}", "benchmark=[gsm8k]",
        "benchmark.gsm8k.source.repo='~/g'",
    )  # fmt: skip
    found = [own.output_dir, own.model.path, own.model.teacher, own.data.path, own.rollouts.path]
    found += [own.weight_tracking.references["a"], own.benchmark["gsm8k"].source["repo"], own.data.source["path"]]  # type: ignore[index]
    assert [str(path) for path in found] == [str(tmp_path / name) for name in "omtdrlgd"]
    line = ["adapters={a: '~/a'}", "model_path='~/m'", "probe_set.completions='~/h'"]
    theirs = parse(AnalyzeConfig, composed(*line, of="analyze"))
    assert theirs.adapters == {"a": tmp_path / "a"}
    assert (theirs.model_path, theirs.probe_set.completions) == (str(tmp_path / "m"), tmp_path / "h")
    parser = KeyValueParser({"output_dir": "outputs", "sweep": "main"}, "", prog="status.py")
    assert parser.parse(["output_dir=~/a=b c"])[0]["output_dir"] == f"{tmp_path}/a=b c"
    with pytest.raises(InputError, match=r"output_dir: .*no such home folder"):
        settings("output_dir='~nobody-here/x'")


def test_a_folder_whose_name_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the files, unquoted for Hydra."""
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / "a=b (c), d é"
    home.mkdir()
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "reward": n % 2} for n in range(8)]
    (home / "roll=1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(TINY / "student", home / "model (1)")
    line = [f"data.path=~/{home.name}/roll=1.jsonl", f"output_dir=~/{home.name}/out", "data=file", "data.eval_size=0"]
    line += [f"model.path=~/{home.name}/model (1)", "logger=none", "optim.max_steps=1", "optim.batch_size=4"]
    script("train.py", *line)
    assert list((home / "out" / "main").glob("sft-conventional-r8-model-1-*/adapter"))
    assert not (ROOT / "~").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("lr=1e-4", "lr.peak=1e-4"),
        ("lora_rank=16", "lora_rank=r16"),
        ("lora_rank=17", "lora_rank.r=17"),
        ("model=Qwen/Qwen3-0.6B", "model.path=Qwen/Qwen3-0.6B"),
        ("model=./folder", "model.path=./folder"),
        ("data=problems.jsonl", "data=file data.path=problems.jsonl"),
        ("data=me/mine", "data.source.repo=me/mine"),
        ("method=SFT", "method=sft"),
        ("-m method=sft,DPO", "method=dpo"),
        ("benchmark=mine.jsonl", "benchmark=file benchmark.file.eval_path=mine.jsonl"),
        ("experiment=smollm", "experiment=smollm2"),
        ("hydra/launcher=slum", "hydra/launcher=slurm"),
        ("optim.maxsteps=3", "optim.max_steps"),
        ("max_steps=3", "optim.max_steps"),
        ("learning_rate=1e-4", "lr.peak"),
        ("lr.pointwise_factor=1", "there is no lr.pointwise_factor; it is called lr.factor now"),
        ("-m lr.pairwise_factor=1,0.1", "it is called lr.factor now"),
        ("method.betta=1", "method.beta"),
        ("method=sft,dpo", "add -m"),
        ("benchmark=arithmetic benchmark.eval=4", "did you mean benchmark.arithmetic.eval_size=4?"),
        ("benchmark.file.eval_path=x.jsonl benchmark=gsm8k", "benchmark=[gsm8k,file]"),
        ("-m method=sft,grpo method.bias=0.0,0.1", "no option of method=sft; sweep it with method=grpo alone"),
        ("method.bias=0.1", "did you mean method=grpo method.bias=0.1?"),
        ("data.path=x.jsonl", "did you mean data=file data.path=x.jsonl?"),
        ("data.columns.prompt=q", "data.source.columns.prompt"),
        ("data=file data.source.column.prompt=q", "data.source.columns.prompt"),
        ("model=llama", "model.path=FOLDER_OR_HUB_ID"),
        ("rollouts.accept=a,b", "several values are a list: 'rollouts.accept=[a,b]'"),
        ("benchmark=gsm8k,aime26", "several values are a list: 'benchmark=[gsm8k,aime26]'"),
    ],
)
def test_what_was_meant_is_named(line: str, told: str) -> None:
    assert told in explain_rejection(line.split(), ROOT / "conf", TrainConfig)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["benchmark=file", "data.path=x"], "is benchmark=file benchmark.file.eval_path=x"),
        (["benchmark=file", "benchmark.path=~/x"], "did you mean 'benchmark.file.eval_path=~/x'?"),
        (["benchmark=file", "benchmrk.path=~/x"], "there is no benchmrk.path"),
    ],
)
def test_a_key_that_is_not_there_is_told_before_how_it_would_be_quoted(line: list[str], told: str) -> None:
    with pytest.raises(InputError) as error:
        prepare_arguments(line, "evaluate.py", EvaluateConfig, ROOT / "conf")
    assert told in str(error.value)


def test_what_is_wrong_with_a_value_names_the_whole_field(tmp_path: Path, problems: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "What is 1?", "reward": "1"}))
    for line, told in (
        (["data=file"], "data.path is required: data.path=FILE"),
        (["rollouts.engine=openai"], "rollouts.server.model=NAME"),
        (["rollouts.accept=true"], "all_incorrect, mostly_cut or [all_incorrect,mostly_cut], not True"),
        (["data=file", "data.path=/no.jsonl"], "data.path=/no.jsonl: no such file"),
        (["data=file", f"data.path={problems}", "data.eval_path=/no"], "data.eval_path=/no: no such file"),
        (["benchmark=file"], "benchmark.file.eval_path=FILE is required"),
        (["benchmark=file", "benchmark.file.eval_path=/no"], "benchmark.file.eval_path=/no: no such file"),
        (
            ["data=file", f"data.path={problems}", "data.eval_size=9"],
            "held-out problems; data.eval_size=null uses all",
        ),
        (["data=file", f"data.path={other}", "data.eval_path=/dev/null"], "data.eval_path=/dev/null: no such file"),
        (["benchmark=file", f"benchmark.file.eval_path={other}"], "(benchmark.file.source.columns.prompt=question)"),
    ):
        with pytest.raises(InputError) as error:
            require_problems(settings(*line).benchmarks)
        assert str(error.value).endswith(told) or str(error.value).startswith(told), error.value
    with pytest.raises(InputError, match="benchmark: choose what to score on"):
        parse(EvaluateConfig, composed(of="evaluate"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["pairs=[[rft,", "dpo]]"], "'pairs=[[rft, dpo]]'"),
        (["data.path=my", "file.jsonl"], "'data.path=my file.jsonl'"),
        (["data.source.template={question}=?"], "'data.source.template=\"{question}=?\"'"),
        (["sweep=a(b"], "unbalanced"),
        (["method"], "key=value"),
    ],
)
def test_how_it_is_quoted_is_shown(line: list[str], told: str) -> None:
    schema = AnalyzeConfig if line[0].startswith("pairs") else TrainConfig
    with pytest.raises(InputError) as error:
        prepare_arguments(line, "x.py", schema)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_any_terminal_is_printed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    guard_streams()
    print("‖ΔW‖ é", flush=True)
    print("‖ΔW‖ é", flush=True, file=sys.stderr)
    assert sys.stdout.buffer.getvalue() == sys.stderr.buffer.getvalue() == "??W? é\n".encode("latin-1")  # type: ignore[attr-defined]
