"""On-policy methods: TRL's trainers on our problems, verifier and initial adapter, beside the frozen arms."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from losslens.core.errors import InputError
from losslens.losses import Batch, Method
from losslens.losses.grpo import Grpo
from losslens.losses.on_policy import OnPolicy
from losslens.losses.online_grpo import OnlineGrpo
from losslens.losses.opd import Opd
from losslens.models.adapters import adapter_fingerprint
from losslens.models.loading import LoadedModel, load_model, preserved
from losslens.models.tokens import encode_prompt
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.runs.run import runs_of
from losslens.training.on_policy import fill, groups_of, is_mixed
from losslens.training.run import make_trainer, train_run
from losslens.training.source import OnPolicySource
from tests.conftest import ROOT, TINY, base_source, command, script
from tests.test_data_parallel import ended, steps
from tests.test_trainers import logged

MAX_TOKENS = 60


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    # Past the cache, which holds one model: that of the other tests.
    return load_model.__wrapped__(base_source(path=str(TINY / "teacher")))


@pytest.fixture
def make_source(source: ReasoningGym, teacher: LoadedModel) -> Callable[..., OnPolicySource]:
    def make(method: OnPolicy, problems: int = 12) -> OnPolicySource:
        found = source.problems("train", problems, seed=3)
        with_teacher = teacher if method.needs_teacher else None
        return OnPolicySource(method, found, source.verifier, 10, MAX_TOKENS, with_teacher)

    return make


@contextmanager
def trainer_of(plan: Any, base: LoadedModel, source: OnPolicySource, tmp_path: Path) -> Iterator[Any]:
    """The trainer of a plan, whose policy is the base."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with preserved(base.model):
        trainer = make_trainer(plan, base, source, tmp_path, [])
        trainer.model.train()
        yield trainer


def rounds_of(trainer: Any, monkeypatch: pytest.MonkeyPatch, *rounds: list[tuple[list[int], bool]]) -> list[list[int]]:
    """Lets the trainer sample what is given (completion ids, correct) round by round; returns the numbers asked for."""
    asked: list[list[int]] = []
    verdicts = iter([[right for _, right in given] for given in rounds])

    def correct(_: OnPolicySource, numbers: list[int], texts: list[str]) -> list[bool]:
        asked.append(list(numbers))
        return next(verdicts)

    completions = iter([[ids for ids, _ in given] for given in rounds])

    def sample(prompts: list[str]) -> list[dict[str, Any]]:
        found = zip(prompts, next(completions), strict=True)
        return [{"prompt_ids": trainer.encode(prompt), "ids": ids, "logps": None} for prompt, ids in found]

    monkeypatch.setattr(OnPolicySource, "correct", correct)
    monkeypatch.setattr(trainer, "sample", sample)
    return asked


def inputs_of(source: OnPolicySource, numbers: list[int]) -> list[dict[str, Any]]:
    return [
        {"prompt": source.problems[number].prompt, "number": number}
        for number in numbers
        for _ in range(source.method.group_size)
    ]


def a_group(trainer: Any, outcomes: list[bool], lengths: list[int] | None = None) -> list[tuple[list[int], bool]]:
    """Completions of ordinary tokens with the end token, of these lengths."""
    lengths = lengths or [5] * len(outcomes)
    end = trainer.end_ids[0]
    return [
        ([20 + (7 * n + t) % 50 for t in range(length - 1)] + [end], right)
        for n, (right, length) in enumerate(zip(outcomes, lengths, strict=True))
    ]


THREE_OF_FOUR = [True, True, True, False]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [("none", [0.25, 0.25, 0.25, -0.75]), ("group", [0.25 / 0.5001] * 3 + [-0.75 / 0.5001])],
)
def test_advantages_by_hand(
    scale: Any, expected: list[float], make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """K = 4 with 3 correct: r − r̄ = .25 | −.75. The unbiased variance is (3·.0625 + .5625)/3 = .25."""
    method = OnlineGrpo(name="online_grpo", samples_per_prompt=4, scale_rewards=scale)
    source = make_source(method)
    with trainer_of(make_plan(method, batch_size=4), base, source, tmp_path) as trainer:
        rounds_of(trainer, monkeypatch, a_group(trainer, THREE_OF_FOUR))
        output = trainer._generate_and_score_completions(inputs_of(source, [2]))
        assert output["advantages"].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_one_step_pulls_as_the_offline_loss_on_the_same_samples(
    recipe: Any, make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ρ = 1 the gradient is that of −Σ Â·log π: over the batch's tokens (`dapo`), or each sample's, then samples.

    The reference scores each sample alone, without padding, with the plain logits of the same model.
    """
    method = OnlineGrpo(
        name="online_grpo", recipe=recipe, samples_per_prompt=4, scale_rewards="none", overlong_share=0.2
    )
    source = make_source(method)
    numbers, lengths = [2, 5], [5, 9, 3, 7, 4, 11, 6, 2]
    with trainer_of(make_plan(method, batch_size=8), base, source, tmp_path) as trainer:
        outcomes = [*THREE_OF_FOUR, False, True, False, False]
        rounds_of(trainer, monkeypatch, a_group(trainer, outcomes, lengths))
        batch = trainer._generate_and_score_completions(inputs_of(source, numbers))
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, batch).backward()
        found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        samples = trainer.samples
        logps = [completion_logps(trainer.model, sample) for sample in samples]
        width = max(lengths)
        rollouts = Batch(
            logps=torch.stack([torch.nn.functional.pad(values, (0, width - len(values))) for values in logps]),
            mask=torch.arange(width) < torch.tensor(lengths)[:, None],
            reward=torch.tensor([float(right) for right in outcomes]),
            columns={"advantage": torch.tensor([0.25, 0.25, 0.25, -0.75, -0.25, 0.75, -0.25, -0.25])},
        )
        terms = Grpo(name="grpo", bias=0.0).terms(rollouts) * rollouts.mask
        loss = terms.sum() / sum(lengths) if recipe == "dapo" else (terms.sum(dim=1) / torch.tensor(lengths)).mean()
        loss.backward()
        expected = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert sum(grad.norm() for grad in found.values()) > 1e-3
        for name, grad in found.items():
            assert torch.allclose(grad, expected[name], atol=1e-6), name


def completion_logps(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of a sample's tokens from plain logits, shape (tokens,), with gradient."""
    ids = torch.tensor([[*sample["prompt_ids"], *sample["ids"]]])
    logits = model(input_ids=ids).logits[0, len(sample["prompt_ids"]) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(sample["ids"])[:, None])[:, 0]


class TestDynamicSampling:
    """DAPO's: groups with equal outcomes are replaced by mixed groups of other prompts, as far as there are any."""

    def test_fill(self) -> None:
        same, mixed = ([{"correct": right} for right in outcomes] for outcomes in ([True, True], [True, False]))
        others = [[{"correct": right, "other": n} for right in (n != 0, False)] for n in range(3)]  # the first is not
        assert not is_mixed(same)
        assert fill([same, mixed, same, same], others) == [others[1], mixed, others[2], same]
        assert groups_of([*same, *mixed], 2) == [same, mixed]

    @pytest.mark.parametrize("resamples", [0, 1, 3])
    def test_equal_groups_are_replaced_or_left_out(
        self, resamples: int, make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Round 1 has one mixed group of three, round 2 one more, and round 3 two, of which one is needed."""
        method = OnlineGrpo(name="online_grpo", recipe="dapo", samples_per_prompt=2, resamples=resamples)
        source = make_source(method)
        right, wrong, mixed = [True, True], [False, False], [True, False]
        with trainer_of(make_plan(method, batch_size=6), base, source, tmp_path) as trainer:
            given = [
                [sample for outcomes in outcomes_of_round for sample in a_group(trainer, outcomes, lengths)]
                for outcomes_of_round, lengths in (
                    ((right, mixed, wrong), [4, 4]), ((wrong, mixed, wrong), [5, 5]), ((mixed, mixed, right), [6, 6]),
                )
            ]  # fmt: skip
            asked = rounds_of(trainer, monkeypatch, *given)
            output = trainer._generate_and_score_completions(inputs_of(source, [4, 6, 8]))
            lengths = [len(sample["ids"]) for sample in trainer.samples]
            scored = output["completion_mask"].sum(dim=1).tolist()
            assert len(asked) == 1 + min(resamples, 2)
            assert asked[0] == [4, 4, 6, 6, 8, 8]
            assert all(numbers[::2] == numbers[1::2] for numbers in asked)
            if resamples == 0:
                assert (lengths, scored) == ([4] * 6, [0, 0, 4, 4, 0, 0])
            elif resamples == 1:
                assert (lengths, scored) == ([5, 5, 4, 4, 4, 4], [5, 5, 4, 4, 0, 0])
            else:
                assert (lengths, scored) == ([5, 5, 4, 4, 6, 6], [5, 5, 4, 4, 6, 6])
            assert output["num_items_in_batch"].item() == sum(scored)
            # The samples to train on are those that the rewards are of, with their own prompts.
            assert trainer.correct() == [float(sample["correct"]) for sample in trainer.samples]
            first = trainer.samples[0]
            assert first["prompt_ids"] == encode_prompt(base.tokenizer, source.problems[first["number"]].prompt)
            assert trainer._own["rounds"] == [len(asked)]
            assert trainer._own["filtered_groups"] == [pytest.approx([2 / 3, 1 / 3, 0][min(resamples, 2)])]
            of_all = [right for samples in given[: len(asked)] for _, right in samples]
            assert trainer._own["reward"] == [pytest.approx(sum(of_all) / len(of_all))]

    def test_the_other_recipe_keeps_them(
        self, make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = OnlineGrpo(name="online_grpo", samples_per_prompt=2)
        source = make_source(method)
        with trainer_of(make_plan(method, batch_size=2), base, source, tmp_path) as trainer:
            asked = rounds_of(trainer, monkeypatch, a_group(trainer, [True, True]))
            output = trainer._generate_and_score_completions(inputs_of(source, [4]))
            assert (len(asked), output["completion_mask"].sum().item()) == (1, 10)
            assert output["advantages"].tolist() == [0, 0]


def test_overlong_samples_by_hand(
    make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L = 60 and a fifth of it: none up to 48 tokens, −(54 − 48)/12 = −.5 at 54, −1 at 60.

    A truncated sample (no end token) of 60 tokens is not scored, but shifts the mean of its group:
    r = 1, 1 − .5, 0, 0 − 1 have the mean .125.
    """
    method = OnlineGrpo(name="online_grpo", recipe="dapo", samples_per_prompt=4, scale_rewards="none")
    source = make_source(method)
    with trainer_of(make_plan(method, batch_size=4), base, source, tmp_path) as trainer:
        given = a_group(trainer, [True, True, False, False], [48, 54, 10, 60])
        given[3][0][-1] = 21
        rounds_of(trainer, monkeypatch, given)
        output = trainer._generate_and_score_completions(inputs_of(source, [2]))
        assert output["advantages"].tolist() == pytest.approx([0.875, 0.375, -0.125, -1.125])
        assert output["completion_mask"].sum(dim=1).tolist() == [48, 54, 10, 0]
        assert trainer._own["truncated"] == [0.25]
        assert trainer._own["completion_length"] == [43]


def test_the_distillation_loss_is_the_reverse_divergence(
    make_plan: Any, base: LoadedModel, teacher: LoadedModel, make_source: Any, tmp_path: Path
) -> None:
    """Σ_t KL(π_θ ‖ q)_t over all tokens of the batch, from plain logits of both models, sample by sample."""
    method = Opd(name="opd")
    source = make_source(method)
    with trainer_of(make_plan(method, batch_size=4), base, source, tmp_path) as trainer:
        batch = trainer._prepare_inputs(inputs_of(source, [0, 3, 5, 7]))
        loss = trainer.compute_loss(trainer.model, batch).item()
        total, tokens = 0.0, 0
        for row in range(4):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            ids = torch.cat([prompt, completion])[None]
            with torch.no_grad():
                ours, theirs = (
                    model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                    for model in (trainer.model, teacher.model)
                )
            total += (ours.exp() * (ours - theirs)).sum().item()
            tokens += len(completion)
    assert loss == pytest.approx(total / tokens, rel=1e-4)
    assert loss > 0.01


METHODS: dict[str, OnPolicy] = {
    "grpo": OnlineGrpo(name="online_grpo", samples_per_prompt=4),
    "dapo": OnlineGrpo(name="online_grpo", recipe="dapo", samples_per_prompt=4, temperature=1.2, resamples=1),
    "opd": Opd(name="opd"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bytes(
    name: str, make_plan: Any, make_source: Any, base: LoadedModel, teacher: LoadedModel, tmp_path: Path
) -> None:
    """With dropout, in micro-batches; and base and teacher are as they were."""
    method = METHODS[name]
    plan = make_plan(method, 1e-2, max_steps=3, batch_size=8, micro_batch=4, warmup_ratio=0, save_steps=1, log_steps=1)
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=0.1))
    before = [weights(model) for model in (base, teacher)]

    def cut(step: int, _: dict[str, float]) -> None:
        if step == 2:
            torch.rand(3)  # the state of the global generators is another one then
            raise KeyboardInterrupt

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    train_run(plan, base, make_source(method), tmp_path / "whole", lambda step, values: None)
    with pytest.raises(KeyboardInterrupt):
        train_run(plan, base, make_source(method), tmp_path / "cut", cut)
    facts = train_run(plan, base, make_source(method), tmp_path / "cut", lambda step, values: None)
    assert facts["resumed_from"] == 1
    assert adapter_fingerprint(tmp_path / "cut" / "adapter") == adapter_fingerprint(tmp_path / "whole" / "adapter")
    assert adapter_fingerprint(tmp_path / "whole" / "adapter") != adapter_fingerprint(plan.initial_adapter)
    lines = logged(tmp_path / "whole")
    assert logged(tmp_path / "cut") == lines
    assert [weights(model) for model in (base, teacher)] == before
    assert not (tmp_path / "whole" / "checkpoints").exists()
    for line in lines:
        assert {"train/reward", "train/completion_length", "train/truncated", "train/entropy"} <= line.keys()
        assert ("train/mixed_groups" in line) == (name != "opd")
        assert ("train/rounds" in line) == (name == "dapo")
        assert 0 <= line["train/reward"] <= 1
        assert line["train/epoch"] == line["step"] * 8 / (12 * method.group_size)


def weights(model: LoadedModel) -> list[Any]:
    state = model.model.state_dict()
    return [len(state), *(float(value.double().sum()) for value in state.values()), model.model.training]


def test_a_step_follows_from_its_number_and_the_policy(
    make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path
) -> None:
    method = OnlineGrpo(name="online_grpo", samples_per_prompt=4)
    source = make_source(method)
    rows = inputs_of(source, [0, 3])
    with trainer_of(make_plan(method, batch_size=8, micro_batch=4), base, source, tmp_path) as trainer:

        def sampled(step: int) -> list[list[int]]:
            torch.rand(5)
            trainer.state.global_step, trainer._buffered_inputs = step, None
            state = torch.get_rng_state()
            trainer._prepare_inputs(rows)
            assert torch.equal(torch.get_rng_state(), state)
            return [sample["ids"] for sample in trainer.samples]

        first = sampled(0)
        assert sampled(0) == first
        assert sampled(1) != first
        assert len({tuple(ids) for ids in first[:4]}) > 1


def test_dropout_is_off_while_sampling(make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path) -> None:
    """At B = 0 dropout changes no logit, but would draw from the generator of the samples."""
    method = OnlineGrpo(name="online_grpo", samples_per_prompt=4)
    source, plan = make_source(method), make_plan(method, batch_size=4)
    found = []
    for dropout in (0.0, 0.1):
        changed = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=dropout))
        with trainer_of(changed, base, source, tmp_path) as trainer:
            trainer._prepare_inputs(inputs_of(source, [1]))
            assert trainer.model.training
            found.append([sample["ids"] for sample in trainer.samples])
    assert found[0] == found[1]


# The options


@pytest.mark.parametrize("method", [OnlineGrpo(name="online_grpo"), Opd(name="opd")], ids=lambda method: method.name)
def test_defaults_are_no_part_of_the_identity(method: Method) -> None:
    assert method.identity == {"version": 1, "name": method.name}
    assert method.own_samples


# The pipeline

FEW = (
    "optim.max_steps=3", "optim.batch_size=8", "optim.save_steps=1", "optim.log_steps=1", "data.eval_size=8",
    "data.train_size=12", "logger=none", "evaluation.max_tokens=48", "rollouts.max_tokens=48",
)  # fmt: skip


def online(output_dir: Path, *arguments: str) -> list[str]:
    return command(output_dir, *FEW, "method=online_grpo", "method.samples_per_prompt=4", *arguments)


def test_killed_and_started_again_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = ("optim.max_steps=6", "method.recipe=dapo", "data.eval_size=0")
    script(*online(whole, *steps))
    line = [sys.executable, *online(killed, *steps)]
    with subprocess.Popen(line, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL) as process:
        for _ in range(3000):
            if any(killed.glob("main/online_grpo-*/checkpoints/checkpoint-2/sealed.json")):
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    [stopped] = killed.glob("main/online_grpo-*")
    assert not (stopped / "adapter").exists()
    script(*online(killed, *steps))
    [run], [other] = (runs_of(folder, "main") for folder in (killed, whole))
    assert run.manifest["training"]["resumed_from"] >= 2
    assert run.name == other.name
    assert adapter_fingerprint(run.adapter) == adapter_fingerprint(other.adapter)
    assert not run.checkpoints.exists()
    assert sorted(path.name for path in killed.iterdir()) == ["init", "main"]  # no rollouts were sampled


def test_a_sweep_with_frozen_and_own_rows_says_whose_they_are(tmp_path: Path) -> None:
    """One seed: SFT and RFT share their batches, online GRPO those of none; the rollouts are those of the others."""
    script(*command(tmp_path, *FEW, "-m", "method=sft,rft"))
    script(*online(tmp_path))
    analysed = script("analyze.py", "sweep=main", f"output_dir={tmp_path}", "logger=none", "pairs=none")
    assert "rows of their own (samples of their policy): online_grpo-conventional" in analysed.stdout
    folder = tmp_path / "main" / "analysis"
    arms = pd.read_csv(folder / "arms.csv").set_index("method")
    assert arms["samples"].to_dict() == {"sft": "frozen", "rft": "frozen", "online_grpo": "own"}
    assert arms["pass_rate"].isna().to_dict() == {"sft": False, "rft": False, "online_grpo": True}
    pairs = pd.read_csv(folder / "pairs.csv")
    by = {frozenset((a.split("-")[0], b.split("-")[0])): p for a, b, p in
          zip(pairs["arm_a"], pairs["arm_b"], pairs["pairing"], strict=True)}  # fmt: skip
    assert by[frozenset(("sft", "rft"))] == "same seeds"
    assert by[frozenset(("sft", "online_grpo"))] == by[frozenset(("rft", "online_grpo"))] == "same init"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Online GRPO trained on rows of its own" in page
    assert "but for Online GRPO, which sampled its own," in page
    manifest = json.loads(next(tmp_path.glob("main/online_grpo-*/manifest.json")).read_text())
    assert manifest["rollouts"] is None
    assert manifest["trained_on"] == {"own_samples": True, "prompts": 12}
    assert manifest["references"]["sft"]["name"].startswith("sft-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("method=online_grpo", "train_on=mixed_groups"), "train_on=mixed_groups: method=online_grpo samples its own"),
        (("method=online_grpo", "optim.batch_size=12"), "method.samples_per_prompt=8 does not divide 12"),
        (("method=online_grpo", "method.max_tokens=100000"), "method.max_tokens=100000 and the"),
        (("method=opd", "model.teacher=null"), "method=opd: no model.teacher is set"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    refused = script(*command(tmp_path, *FEW, *arguments), check=2)
    [line] = [line for line in refused.stderr.splitlines() if line.strip()]
    assert message in line
    assert not (tmp_path / "main").exists()


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    load_model.__wrapped__(base_source(path=str(TINY / "teacher"))).model.save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    refused = script(*command(tmp_path / "outputs", *FEW, "method=opd", f"model.teacher={other}"), check=2)
    assert "another vocabulary than that of model.path" in refused.stderr


def test_given_rollouts_must_answer_the_problems(frozen: Path, tmp_path: Path) -> None:
    refused = script(*online(tmp_path, f"rollouts.path={frozen}"), check=2)
    assert f"rollouts.path={frozen}: does not answer the problems of data=arithmetic" in refused.stderr


def test_a_release_of_trl_without_the_trainers_is_told(
    make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.__version__", "1.15.3")
    method = METHODS["opd"]
    with pytest.raises(InputError, match=r"on-policy methods need trl>=1\.16"), preserved(base.model):
        make_trainer(make_plan(method), base, make_source(method), tmp_path, [])


# Runs train.py; the main process is killed when its third step begins, after the checkpoint of the second.
KILLED = """
import os, runpy, signal, sys
from losslens.training.on_policy import OnlineGrpoTrainer
original = OnlineGrpoTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if os.environ["RANK"] == "0" and self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
OnlineGrpoTrainer.compute_loss = compute_loss
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_two_processes_killed_and_started_again_end_in_the_same_bytes(tmp_path: Path) -> None:
    """Each samples whole groups of its own; of a process's share of 8, groups of 16 are refused."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = ("optim.batch_size=16", "method.recipe=dapo", "data.eval_size=0")
    (tmp_path / "killed.py").write_text(KILLED)
    with steps(*online(whole, *common)) as processes:
        for process in processes:
            ended(process, 0)
    with steps(str(tmp_path / "killed.py"), *online(killed, *common)[1:]) as processes:
        assert processes[0].wait(timeout=240) == -signal.SIGKILL
    with steps(*online(killed, *common)) as processes:
        for process in processes:
            ended(process, 0)
    [run], [other] = (runs_of(folder, "main") for folder in (killed, whole))
    assert run.manifest["training"]["resumed_from"] == 2
    assert run.manifest["identity"]["processes"] == 2
    assert run.name == other.name
    assert adapter_fingerprint(run.adapter) == adapter_fingerprint(other.adapter)
    with steps(*online(tmp_path / "refused", *common, "method.samples_per_prompt=16")) as processes:
        assert "method.samples_per_prompt=16 does not divide 8" in ended(processes[0], 2)[1]
