"""On-policy methods: TRL's trainers on our problems, verifier and initial adapter, beside the frozen arms."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from losslens.analysis.cohort import ComparedAdapter
from losslens.analysis.gathering import _require_comparable
from losslens.analysis.manifests import RunFacts
from losslens.core import distributed
from losslens.core.errors import InputError
from losslens.core.files import write_json
from losslens.evaluation.score import _report_contamination
from losslens.losses import Batch, Method
from losslens.losses.grpo import Grpo
from losslens.losses.on_policy import OnPolicy
from losslens.losses.online_grpo import OnlineGrpo
from losslens.losses.opd import Opd
from losslens.models.adapters import adapter_fingerprint
from losslens.models.loading import LoadedModel, load_model, preserved
from losslens.models.tokens import encode_prompt
from losslens.pipeline.preflight import require_fit
from losslens.problems import Problem
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.runs.prompts import prompts_sha256, write_prompts
from losslens.runs.run import Run, runs_of
from losslens.runs.spec import RunSpec
from losslens.training.on_policy import NO_SIGNAL, fill, groups_of, is_mixed, warn_without_signal
from losslens.training.run import make_trainer, train_run
from losslens.training.source import OnPolicySource
from tests.conftest import TINY, base_source, command, script
from tests.test_ablation import facts
from tests.test_data_parallel import ended, steps
from tests.test_runs import config
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


@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize("options", [{}, {"recipe": "dapo"}, {"temperature": 1.5, "kl_coef": 0.3}], ids=str)
def test_one_step_pulls_as_the_offline_loss_on_the_same_samples(
    options: dict[str, Any], micro_batch: int, make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Offline GRPO with the policy as sampler (ρ = 1) and PPO's clip, over the batch's tokens or each sample's.

    The reference scores each sample alone, without padding, with the plain logits of the same model; the base is the
    model without its adapter. In micro-batches of 2 a group is in two of them, and the sum must be the same.
    """
    method = OnlineGrpo(name="online_grpo", samples_per_prompt=4, scale_rewards="none", **options)
    source = make_source(method)
    dapo = method.recipe == "dapo"
    numbers, lengths = [2, 5], [5, 9, 3, 7, 4, 11, 6, 2]
    with trainer_of(make_plan(method, batch_size=8, micro_batch=micro_batch), base, source, tmp_path) as trainer:
        outcomes = [*THREE_OF_FOUR, False, True, False, False]
        rounds_of(trainer, monkeypatch, a_group(trainer, outcomes, lengths))
        torch.manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # else the policy is the base, from which the KL term does not pull
                torch.nn.init.normal_(parameter, std=0.05)
        trainer.current_gradient_accumulation_steps = 8 // micro_batch
        for _ in range(8 // micro_batch):
            trainer.training_step(trainer.model, inputs_of(source, numbers), None)
        found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        with torch.no_grad(), trainer.model.disable_adapter():
            reference = padded([completion_logps(trainer.model, sample, method) for sample in trainer.samples])
        logps = padded([completion_logps(trainer.model, sample, method) for sample in trainer.samples])
        rollouts = Batch(
            logps=logps,
            mask=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
            reward=torch.tensor([float(right) for right in outcomes]),
            columns={"advantage": torch.tensor([0.25, 0.25, 0.25, -0.75, -0.25, 0.75, -0.25, -0.25])},
            reference=reference,
            sampler=logps.detach(),
        )
        offline = Grpo(name="grpo", bias=0.0, ratio="clip", kl_coef=method.kl_coef)
        terms = offline.terms(rollouts) * rollouts.mask
        loss = terms.sum() / sum(lengths) if dapo else (terms.sum(dim=1) / torch.tensor(lengths)).mean()
        loss.backward()
        expected = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert sum(grad.norm() for grad in found.values()) > 1e-3
        for name, grad in found.items():
            assert torch.allclose(grad, expected[name], atol=1e-6, rtol=1e-5), name


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def completion_logps(model: Any, sample: dict[str, Any], method: OnPolicy) -> torch.Tensor:
    """Log-probabilities of a sample's tokens from plain logits, shape (tokens,), with gradient."""
    ids = torch.tensor([[*sample["prompt_ids"], *sample["ids"]]])
    logits = model(input_ids=ids).logits[0, len(sample["prompt_ids"]) - 1 : -1].float() / method.temperature
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


class TestNothingToLearn:
    """Groups with equal outcomes have advantage 0: said once, and again at the end if no step had another."""

    @pytest.mark.parametrize("recipe", ["grpo", "dapo"])
    def test_the_first_such_step_is_told(
        self, recipe: Any, make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Step 1 has a mixed group; steps 2 and 3 have none, with 2 of 4 samples correct."""
        resamples = {"resamples": 0} if recipe == "dapo" else {}
        method = OnlineGrpo(name="online_grpo", recipe=recipe, samples_per_prompt=2, **resamples)
        source = make_source(method)
        with trainer_of(make_plan(method, batch_size=4), base, source, tmp_path) as trainer:
            equal = [*a_group(trainer, [True, True]), *a_group(trainer, [False, False])]
            mixed = [*a_group(trainer, [True, False]), *a_group(trainer, [False, False])]
            rounds_of(trainer, monkeypatch, mixed, equal, equal)
            for step in range(3):
                trainer.state.global_step = step
                trainer._generate_and_score_completions(inputs_of(source, [4, 6]))
        [line] = [line for line in capsys.readouterr().out.splitlines() if NO_SIGNAL in line]
        assert "in step 2: none of its 2 groups" in line
        assert "(50% of the samples are correct)" in line

    @pytest.mark.parametrize(
        ("shares", "told"), [([0.0, 0.0], True), ([0.0, 0.125], False), ([None, None], False), ([], False)]
    )
    def test_the_end_is_told_if_no_step_had_a_mixed_group(
        self, shares: list[float | None], told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = [{"step": 1, "train/reward": 0.5, **({} if share is None else {"train/mixed_groups": share})}
                 for share in shares]  # fmt: skip
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        warn_without_signal(tmp_path)
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == told
        assert not told or "in any step" in printed[0]


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


@pytest.mark.parametrize("name", ["grpo", "opd"])
def test_the_models_own_settings_do_not_change_what_is_sampled(
    name: str, make_plan: Any, base: LoadedModel, make_source: Any, tmp_path: Path
) -> None:
    """`generate` takes from `generation_config.json` what TRL leaves unset: this min_p would leave one token each."""
    method = METHODS[name]
    source, own = make_source(method), base.model.generation_config
    found = []
    try:
        for min_p in (None, 1.0):
            base.model.generation_config = copy.deepcopy(own)
            base.model.generation_config.min_p = min_p
            with trainer_of(make_plan(method, batch_size=4), base, source, tmp_path) as trainer:
                batch = trainer._prepare_inputs(inputs_of(source, [1] if name == "grpo" else [1, 2, 3, 4]))
                assert trainer.model.get_base_model().generation_config.min_p == min_p
                found.append(batch["completion_ids"])
    finally:
        base.model.generation_config = own
    assert torch.equal(*found)


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
    sft = json.loads(next(tmp_path.glob("main/sft-*/manifest.json")).read_text())
    assert manifest["prompts_sha256"] == sft["prompts_sha256"]
    assert manifest["references"]["sft"]["name"].startswith("sft-")


class TestPrompts:
    """The prompts of an on-policy run are recorded, so that they can be compared as those of rollouts are."""

    PROMPTS = (("a", "Add 1 and 2."), ("b", "Add 3 and 4."))

    def run(self, folder: Path, **manifest: Any) -> Run:
        run = Run(folder / "online_grpo-conventional-r8-tiny-s1-00000000")
        run.folder.mkdir(parents=True)
        write_json(run.folder / "manifest.json", {"rollouts": None, **manifest})
        return run

    def test_the_hash_is_that_of_a_set(self) -> None:
        """SHA-256 of the sorted pairs as JSON without spaces."""
        table = pd.DataFrame(self.PROMPTS, columns=["problem_id", "prompt"])
        expected = hashlib.sha256(b'[["a","Add 1 and 2."],["b","Add 3 and 4."]]').hexdigest()
        assert prompts_sha256(table) == prompts_sha256(pd.concat([table[::-1], table])) == expected
        assert prompts_sha256(table[:1]) != expected

    def test_problems_that_were_trained_on_are_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """In another template, as for rollouts; a snapshot has the prompts of its run."""
        run = self.run(tmp_path)
        sha256 = write_prompts(run, self.PROMPTS)
        identity = {"rollouts": {"source": {"template": "Add {question}."}}}
        write_json(run.folder / "manifest.json", {"rollouts": None, "prompts_sha256": sha256, "identity": identity})
        problems = [Problem("x", "Q: 3 and 4", "7", {}), Problem("y", "Q: 5 and 6", "11", {})]
        for scored in (run, Run(run.folder / "snapshots" / "step-000002")):
            _report_contamination(scored, problems, {"template": "Q: {question}"}, "it on these")
            assert capsys.readouterr().out == "it on these: trained on the prompts of 1 of 2 problems\n"

    @pytest.mark.parametrize(
        ("manifest", "message"),
        [
            ({}, "has recorded no prompts (older version)"),
            ({"prompts_sha256": "0"}, "its hash is not the manifest's prompts_sha256"),
            ({"rollouts": {"folder": "gone"}, "config": {"rollouts": {"path": None}}}, "no such folder"),
        ],
    )
    def test_what_cannot_be_checked_is_told(
        self, manifest: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = self.run(tmp_path, **manifest)
        write_prompts(run, self.PROMPTS)
        for _ in range(2):
            _report_contamination(run, [], {}, "it on these")
        [line] = capsys.readouterr().out.splitlines()
        assert message in line
        assert "cannot check if" in line

    def test_runs_of_other_prompts_are_refused(self) -> None:
        """Unless runs may differ in their rollouts; of a run that does not record its prompts that is said."""

        def member(name: str, own: bool, prompts: str | None) -> ComparedAdapter:
            recorded = {**facts("grpo", "conventional", 1), "prompts_sha256": prompts}
            return ComparedAdapter(
                name, Path(name), name, facts=RunFacts.model_validate(recorded | ({"rollouts": None} if own else {}))
            )

        frozen, same, other = member("frozen", False, "p"), member("same", True, "p"), member("other", True, "q")
        old, left_out = member("old", True, None), dict[str, str]()
        _require_comparable([frozen, same], [], None, left_out)
        assert not left_out
        with pytest.raises(InputError, match=r"other: different prompts than frozen; .*allow_different=rollouts"):
            _require_comparable([frozen, same, other], [], None, left_out)
        _require_comparable([frozen, same, other], [], "rollouts", left_out)
        _require_comparable([frozen, old], [], None, left_out)
        assert list(left_out) == ["a check of the training prompts of old"]
        left_out.clear()
        _require_comparable([frozen, member("frozen, too", False, None)], [], None, left_out)
        assert not left_out


def test_the_time_limit_is_part_of_the_identity_unless_it_is_the_default() -> None:
    own = [
        RunSpec.of(config("method=online_grpo", *limit)).identity["own_samples"]
        for limit in ((), ("data.verify_seconds=10.0",), ("data.verify_seconds=2",))
    ]
    assert own[0] == own[1] == {"version": 3, "max_tokens": 96}
    assert own[2] == {**own[0], "verify_seconds": 2.0}


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


# Runs train.py; in the sweep `killed`, the main process is killed when the third step begins, after a checkpoint.
KILLED = """
import os, runpy, signal, sys
from losslens.training.on_policy import OnlineGrpoTrainer
original = OnlineGrpoTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if os.environ["RANK"] == "0" and self.state.global_step == 2 and "/killed/" in self.args.output_dir:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
OnlineGrpoTrainer.compute_loss = compute_loss
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_two_processes_killed_and_started_again_end_in_the_same_bytes(tmp_path: Path) -> None:
    """Each samples whole groups of its own. The first processes train the run as a whole, then are killed in it."""
    output = tmp_path / "outputs"
    common = ("optim.batch_size=16", "method.recipe=dapo", "data.eval_size=0")
    (tmp_path / "killed.py").write_text(KILLED)
    with steps(str(tmp_path / "killed.py"), *online(output, *common, "-m", "sweep=whole,killed")[1:]) as processes:
        assert processes[0].wait(timeout=240) == -signal.SIGKILL
    [stopped] = output.glob("killed/online_grpo-*")
    assert not (stopped / "adapter").exists()
    with steps(*online(output, *common, "sweep=killed")) as processes:
        for process in processes:
            ended(process, 0)
    [run], [other] = (runs_of(output, sweep) for sweep in ("killed", "whole"))
    assert run.manifest["training"]["resumed_from"] == 2
    assert run.manifest["identity"]["processes"] == 2
    assert run.name == other.name
    assert adapter_fingerprint(run.adapter) == adapter_fingerprint(other.adapter)
    assert not run.checkpoints.exists()
    assert sorted(path.name for path in output.iterdir()) == ["init", "killed", "whole"]  # no rollouts were sampled


def test_the_share_of_a_process_must_hold_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RunSpec.of(config("method=online_grpo", "method.samples_per_prompt=16", "optim.batch_size=16"))
    require_fit(spec)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match=r"method\.samples_per_prompt=16 does not divide 8"):
        require_fit(spec)
