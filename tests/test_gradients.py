"""Gradients before step 1: against torch alone, by finite differences, by class; their measures by hand and densely."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from losslens.analysis.cohort import ComparedAdapter
from losslens.analysis.gradients import measure_gradients
from losslens.core.errors import InputError, UnavailableError
from losslens.core.files import write_json
from losslens.losses import Loss
from losslens.losses.dpo import Dpo
from losslens.losses.kto import Kto
from losslens.losses.rift import Rift
from losslens.losses.rpo import Rpo
from losslens.losses.sft import Sft
from losslens.measures.comparison import compare
from losslens.measures.definitions.gradients import (
    first_step,
    gradient_across,
    gradient_ceiling,
    gradient_cosine,
    gradient_cosine_null,
    gradient_halves,
    sign_step,
)
from losslens.measures.definitions.weight_space import cosine, cosine_null
from losslens.measures.gradients import Gradient, gradient_products, products_with_end
from losslens.measures.tables import ComparedWeights, pair_weights, run_weights
from losslens.measures.views import PairWeights, RunWeights
from losslens.models.adapters import initial_adapter
from losslens.models.loading import LoadedModel
from losslens.pipeline import initial_gradients as pipeline
from losslens.report.sections import gradients as page
from losslens.rollouts.frozen import freeze, load_rollouts
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.training import initial_gradient as training
from losslens.training.batches import Examples
from losslens.training.initial_gradient import InitialGradient, in_first_half, initial_gradient
from losslens.updates.base import Update
from losslens.updates.folder import open_adapter
from losslens.updates.lora import LoraUpdate
from tests.arm_tables import arm_tables
from tests.conftest import LORA, base_source
from tests.test_first_step import CLASSES
from tests.test_glance import run as run_row
from tests.test_report import MANIFEST, run
from tests.test_subspaces import random_delta
from tests.test_updates import DenseUpdate

pytestmark = pytest.mark.fast

# Prompts of each half that a gradient is taken of.
FEW = 3
Run = dict[str, Update]


@pytest.fixture(scope="module")
def base64(base: LoadedModel) -> LoadedModel:
    return LoadedModel(copy.deepcopy(base.model).double(), base.tokenizer)


@pytest.fixture(scope="module")
def initial64(base64: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initial_adapter(tmp_path_factory.mktemp("init"), {"sha256": "64"}, base64.model, LORA, init_seed=7)


@pytest.fixture(scope="module")
def rows(uneven: pd.DataFrame) -> pd.DataFrame:
    """Twelve rollouts of the problems of each half; the head computes log-probabilities in float32."""
    first = uneven["problem_id"].map(in_first_half)
    return pd.concat([uneven[first].head(4 * FEW), uneven[~first].head(4 * FEW)])


@pytest.fixture(scope="module")
def gradient(base64: LoadedModel, initial64: Path, rows: pd.DataFrame) -> Callable[[Loss], InitialGradient]:
    """Takes the gradient of a loss in float64; each loss once."""

    @cache
    def take(loss: Loss) -> InitialGradient:
        return initial_gradient(loss, Examples(rows, loss), LORA, initial64, base64, batch_size=4)

    return take


def flat(steps: dict[str, LoraUpdate]) -> np.ndarray:
    return np.concatenate([steps[name].dense().ravel() for name in sorted(steps)])


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def log_probabilities(model: Any, rows: pd.DataFrame) -> list[torch.Tensor]:
    """log π of the completion's tokens of each row, one sequence at a time, from the plain logits."""
    found = []
    for prompt, completion in zip(rows["prompt_ids"], rows["completion_ids"], strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return found


def test_sft_is_the_cross_entropy_of_torch(base64: LoadedModel, initial64: Path, rows: pd.DataFrame, gradient: Any):
    """Without PEFT: G = −s²·(∂L/∂W)·AᵀA, with L the mean of torch's cross-entropy over all tokens."""
    model = copy.deepcopy(base64.model)
    logps = torch.cat(log_probabilities(model, rows))
    (-logps.mean()).backward()
    factors = load_file(initial64 / "adapter_model.safetensors")
    found = gradient(Sft(name="sft")).whole
    assert len(found) == len(factors) / 2
    for name, step in found.items():
        a = factors[f"base_model.model.{name}.lora_A.weight"].double()
        expected = -((LORA.alpha / LORA.r) ** 2) * model.get_submodule(name).weight.grad @ a.T @ a
        assert expected.norm() > 0
        assert step.dense() == pytest.approx(expected.numpy(), abs=1e-6 * expected.norm().item())


def dpo_by_hand(logps: list[torch.Tensor], before: list[torch.Tensor], rows: pd.DataFrame) -> torch.Tensor:
    """Mean over the pairs (first correct, first incorrect rollout of a prompt) of −log σ(β(h_w − h_l)), β = .1."""
    ratios = torch.stack([(now - then).sum() for now, then in zip(logps, before, strict=True)])
    correct, group = rows["reward"].to_numpy() > 0, rows["group"].to_numpy()
    mixed = [g for g in sorted(set(group)) if len(set(correct[group == g])) == 2]
    pairs = [[np.flatnonzero((group == g) & (correct == outcome))[0] for outcome in (True, False)] for g in mixed]
    margins = torch.stack([ratios[chosen] - ratios[rejected] for chosen, rejected in pairs])
    return -torch.nn.functional.logsigmoid(0.1 * margins).mean()


def rift_by_hand(logps: list[torch.Tensor], before: list[torch.Tensor], rows: pd.DataFrame) -> torch.Tensor:
    """Mean over the tokens of −log π for correct rollouts, and of .2·π for incorrect ones."""
    terms = [-lp if r > 0 else 0.2 * lp.exp() for lp, r in zip(logps, rows["reward"], strict=True)]
    return torch.cat(terms).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [(Dpo(name="dpo"), dpo_by_hand), (Rift(name="rift"), rift_by_hand)],
    ids=["dpo", "rift"],
)
def test_finite_differences(loss: Loss, by_hand: Any, base64: LoadedModel, rows: pd.DataFrame, gradient: Any) -> None:
    """Of L(B = ε·D): the update s·ε·D·A is added to the weights, and L computed from the plain logits.

    D is half the gradient's direction and half random. The model's norms are in float32, so ε is not smaller.
    """
    rng = np.random.default_rng(0)
    model, found = copy.deepcopy(base64.model), gradient(loss).whole
    drawn = {name: rng.standard_normal(step.b.shape) for name, step in found.items()}
    sizes = [
        np.sqrt(sum(np.sum(part**2) for part in parts)) for parts in ((s.b for s in found.values()), drawn.values())
    ]
    directions = {name: step.b / sizes[0] + drawn[name] / sizes[1] for name, step in found.items()}
    slope = sum(-np.vdot(step.b, directions[name]) for name, step in found.items())
    values = []
    with torch.no_grad():
        before = log_probabilities(model, rows)
        plain = {name: model.get_submodule(name).weight.clone() for name in found}
        for epsilon in (1e-3, -1e-3):
            for name, step in found.items():
                moved = torch.tensor(epsilon * LORA.alpha / LORA.r * directions[name] @ step.a)
                model.get_submodule(name).weight.copy_(plain[name] + moved)
            values.append(by_hand(log_probabilities(model, rows), before, rows).item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("members", CLASSES.values(), ids=CLASSES)
def test_losses_of_one_class_have_one_direction(members: list[Loss], gradient: Any) -> None:
    """One loss of each kind, and the last: tests/test_first_step.py has all of them."""
    first = flat(gradient(members[0]).whole)
    for loss in {type(loss): loss for loss in members[1:]}.values():
        assert cos(flat(gradient(loss).whole), first) == pytest.approx(1, abs=1e-5), loss


@pytest.mark.slow
def test_classes_differ(gradient: Any) -> None:
    for one, other in combinations([losses[0] for losses in CLASSES.values()], 2):
        assert abs(cos(flat(gradient(one).whole), flat(gradient(other).whole))) < 0.999, (one, other)


@pytest.mark.slow
def test_dpo_at_the_base_is_linear_in_beta(gradient: Any) -> None:
    """w = ±β·σ(0) = ±β/2 on every token of a pair."""
    small, large = (flat(gradient(Dpo(name="dpo", beta=beta)).whole) for beta in (0.1, 0.3))
    assert large == pytest.approx(3 * small, abs=1e-5 * np.abs(small).max())


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Sft(name="sft"), Kto(name="kto"), Rpo(name="rpo")], ids=lambda loss: loss.name)
def test_the_half_is_the_gradient_of_its_problems(
    loss: Loss, base64: LoadedModel, initial64: Path, rows: pd.DataFrame, gradient: Any
) -> None:
    """Alone it has its own divisor, so the direction is compared; and another batch size changes nothing."""
    first = rows["problem_id"].map(in_first_half)
    assert 0 < first.mean() < 1
    alone = initial_gradient(loss, Examples(rows[first], loss), LORA, initial64, base64, batch_size=7)
    assert flat(alone.half) == pytest.approx(flat(alone.whole))
    found = gradient(loss)
    assert cos(flat(alone.whole), flat(found.half)) == pytest.approx(1, abs=1e-8)
    rest = initial_gradient(loss, Examples(rows[~first], loss), LORA, initial64, base64, batch_size=1)
    assert not flat(rest.half).any()
    assert cos(flat(rest.whole), flat(found.whole) - flat(found.half)) == pytest.approx(1, abs=1e-8)


def test_a_gradient_that_is_not_finite_is_refused(base: LoadedModel, initial: Path, rows: pd.DataFrame) -> None:
    class Broken(Sft):
        def terms(self, batch: Any) -> torch.Tensor:
            return super().terms(batch) * torch.inf

    loss = Broken(name="sft")
    with pytest.raises(InputError, match="method=sft: the gradient before step 1 is not finite"):
        initial_gradient(loss, Examples(rows[:4], loss), LORA, initial, base, batch_size=4)


# The measures

SHAPES = {"layers.0.q": (20, 9), "layers.1.v": (14, 12)}


def drawn(seed: int, count: int, a_seed: int | None = None) -> list[Run]:
    """Updates with one A, of `a_seed`, or each with its own."""
    rng = np.random.default_rng(seed)
    runs: list[Run] = [{m: random_delta(rng, *shape, 4) for m, shape in SHAPES.items()} for _ in range(count)]
    if a_seed is not None:
        [start] = drawn(a_seed, 1)
        for run in runs:
            for module, update in run.items():
                run[module] = update.with_arrays({**update.arrays(), "A": start[module].arrays()["A"]})
    return runs


def views(gradients: list[Gradient], ends: list[Run]) -> tuple[RunWeights, PairWeights]:
    """Runs "0", "1", … with these gradients and ends."""
    runs, pairs = compare(ends, list(SHAPES))
    products = gradient_products(gradients, list(SHAPES))
    named = {(str(i), str(j)): pair for (i, j), pair in pairs.items()}
    to_ends = [products_with_end(gradient, end, SHAPES) for gradient, end in zip(gradients, ends, strict=True)]
    compared = ComparedWeights(
        list(SHAPES), list(SHAPES.values()), {str(n): run for n, run in enumerate(runs)}, named, 4,
        gradients={str(n): of_run for n, of_run in enumerate(to_ends)},
        pair_gradients={(a, b): products.of(int(a), int(b)) for a, b in named}, same_a=dict.fromkeys(named, True),
    )  # fmt: skip
    return run_weights(compared), pair_weights(compared)


def test_by_hand() -> None:
    """In one module with A = 1: G¹_a = (3, 0), G²_a = (0, 4), so ρ_a = 0 and G_a = (3, 4).

    G¹_b = (1, 1), G²_b = (1, 0): ρ_b = 1/√2, G_b = (2, 1), cos = 10/(5·√5). Across: cos(G¹_a, G²_b) = 1 and
    cos(G²_a, G¹_b) = 1/√2. The end (0, 2): cos = 4/5 with G_a; the sign step (1, 1): 1/√2.
    """

    def run(*b: float) -> Run:
        return {"m": LoraUpdate(np.array(b)[:, None], np.ones((1, 1)), 1.0)}

    a, b = Gradient(run(3, 4), run(3, 0)), Gradient(run(2, 1), run(1, 1))
    of_run = np.array([products_with_end(a, run(0, 2), ["m"])])
    assert of_run[0, 0].tolist() == [[25, 9, 7, 8], [9, 9, 3, 0], [7, 3, 2, 2], [8, 0, 2, 4]]
    runs: Any = SimpleNamespace(gradients=of_run)
    assert [f(runs).item() for f in (first_step, sign_step, gradient_halves)] == pytest.approx([0.8, np.sqrt(0.5), 0])
    products = gradient_products([a, b], ["m"]).of(0, 1)
    pair: Any = SimpleNamespace(gradients=products.products[None])
    assert gradient_across(pair).item() == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert np.isnan(gradient_ceiling(pair).item())  # ρ_a is 0
    own: Any = SimpleNamespace(gradients=gradient_products([b], ["m"]).of(0, 0).products[None])
    assert gradient_ceiling(own).item() == pytest.approx(np.sqrt(0.5))
    assert products.overlap.tolist() == [25 * 5]  # A is 1, so ‖G_a·G_bᵀ‖ = ‖G_a‖·‖G_b‖


def test_equals_the_dense_computation() -> None:
    wholes, halves, ends = drawn(0, 3, 9), drawn(1, 3, 9), drawn(2, 3)
    gradients = [Gradient(w, h) for w, h in zip(wholes, halves, strict=True)]
    runs, pairs = views(gradients, ends)

    def vector(run: Run) -> np.ndarray:
        return np.concatenate([run[m].dense().ravel() for m in SHAPES])

    whole, first, end = ([vector(run) for run in group] for group in (wholes, halves, ends))
    second = [w - f for w, f in zip(whole, first, strict=True)]
    assert first_step(runs) == pytest.approx([cos(w, e) for w, e in zip(whole, end, strict=True)])
    signs = [vector({m: u.sign_step() for m, u in run.items()}) for run in wholes]
    assert signs[0][:5] == pytest.approx(
        (wholes[0]["layers.0.q"].scale * np.sign(wholes[0]["layers.0.q"].b) @ wholes[0]["layers.0.q"].a).ravel()[:5]  # type: ignore[attr-defined]
    )
    assert sign_step(runs) == pytest.approx([cos(s, e) for s, e in zip(signs, end, strict=True)])
    rho = [cos(f, s) for f, s in zip(first, second, strict=True)]
    assert gradient_halves(runs) == pytest.approx(rho)
    at = [(0, 1), (0, 2), (1, 2)]
    assert gradient_cosine(pairs) == pytest.approx([cos(whole[i], whole[j]) for i, j in at])
    across = [(cos(first[i], second[j]) + cos(second[i], first[j])) / 2 for i, j in at]
    assert gradient_across(pairs) == pytest.approx(across)
    ceilings = [np.sqrt(rho[i] * rho[j]) if min(rho[i], rho[j]) > 0 else np.nan for i, j in at]
    assert gradient_ceiling(pairs) == pytest.approx(ceilings, nan_ok=True)
    # Dense updates, as a fully fine-tuned run would have, give the same but for the sign step.
    dense = [
        Gradient(*({m: DenseUpdate(u.dense()) for m, u in part.items()} for part in (gradient.whole, gradient.half)))
        for gradient in gradients
    ]
    of_dense, pairs_of_dense = views(dense, ends)
    for measure in (first_step, gradient_halves):
        assert measure(of_dense) == pytest.approx(measure(runs))
    for measure in (gradient_cosine, gradient_cosine_null, gradient_across):
        assert measure(pairs_of_dense) == pytest.approx(measure(pairs))


def test_their_null_is_that_of_updates() -> None:
    """The cosine and its bound, which tests/test_nulls.py calibrates, of updates that are the gradient steps."""
    steps = drawn(3, 3, 9)
    _, pairs = views([Gradient(step, step) for step in steps], steps)
    assert gradient_cosine(pairs) == pytest.approx(cosine(pairs))
    assert gradient_cosine_null(pairs) == pytest.approx(cosine_null(pairs))


def test_scale_does_not_matter() -> None:
    wholes, halves, ends = drawn(0, 2, 9), drawn(1, 2, 9), drawn(2, 2)
    runs, pairs = views([Gradient(w, h) for w, h in zip(wholes, halves, strict=True)], ends)

    def scaled(run: Run, by: float) -> Run:
        return {m: by * u for m, u in run.items()}

    scaled_gradients = [
        Gradient(scaled(w, by), scaled(h, by)) for w, h, by in zip(wholes, halves, (1e-9, 1e6), strict=True)
    ]
    of_scaled, pairs_of_scaled = views(scaled_gradients, [scaled(end, 1e3) for end in ends])
    for measure in (first_step, sign_step, gradient_halves):
        assert measure(of_scaled) == pytest.approx(measure(runs))
    for measure in (gradient_cosine, gradient_cosine_null, gradient_across, gradient_ceiling):
        assert measure(pairs_of_scaled) == pytest.approx(measure(pairs), nan_ok=True)


def test_without_gradients_there_are_none() -> None:
    ends = drawn(2, 2)
    runs, pairs = compare(ends, list(SHAPES))
    compared = ComparedWeights(
        list(SHAPES), list(SHAPES.values()), dict(zip("ab", runs, strict=True)), {("a", "b"): pairs[0, 1]}, 4
    )
    assert np.isnan(gradient_cosine(pair_weights(compared))).all()
    assert np.isnan(first_step(run_weights(compared))).all()


# Which runs have one, and that each is computed once


def facts(method: str = "sft", frozen: Any = None, **changes: Any) -> Any:
    """What a gradient needs of a manifest."""
    known = {
        "method": method, "options": {}, "own_samples": False, "rollouts": SimpleNamespace(folder="none", sha256=""),
        "initial_adapter": SimpleNamespace(sha256="a", folder="none"), "identity": {"lora": dataclasses.asdict(LORA)},
        "config": SimpleNamespace(train_on="all", rollouts={}),
    }  # fmt: skip
    if frozen is not None:
        known["rollouts"] = SimpleNamespace(folder=frozen.name, sha256=load_rollouts(frozen).sha256)
    return SimpleNamespace(**{**known, **changes})


@pytest.fixture
def found(base: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`initial_gradients` of members on the base that all tests share."""
    monkeypatch.setattr(pipeline, "base_of", lambda *_: (base_source(), {"sha256": "base"}))
    monkeypatch.setattr(pipeline, "load_model", lambda _: base)
    monkeypatch.setattr(pipeline, "trust_of", lambda _: None)

    def find(*members: ComparedAdapter, batch_size: int = 4) -> tuple[dict[str, Path], dict[str, str]]:
        config: Any = SimpleNamespace(output_dir=tmp_path, model_path=None, batch_size=batch_size)
        cohort: Any = SimpleNamespace(members=members, first=None, left_out={})
        return pipeline.initial_gradients(config, cohort), cohort.left_out

    return find


def member(name: str, initial: Path | None, of: Any) -> ComparedAdapter:
    return ComparedAdapter(name, Path(), name, initial, None, of)


def test_what_has_no_gradient_is_told(found: Any, initial: Path, frozen: Path) -> None:
    gone = member("gone", initial, facts())
    other = facts(frozen=frozen)
    other.rollouts.sha256 = "other"
    folders, left_out = found(
        member("theirs", initial, None),
        member("online", initial, facts("online_grpo", own_samples=True)),
        member("unknown start", None, facts()),
        member("mine", initial, facts("mine")),
        gone,
        member("other", initial, other),
    )
    assert folders == {}
    reasons = {name.removeprefix("gradient before step 1 of "): why for name, why in left_out.items()}
    assert reasons["theirs"] == "trained elsewhere: its rows are unknown"
    assert reasons["online"] == "method=online_grpo samples its own rollouts: it has no rows before step 1"
    assert reasons["unknown start"] == "its initial adapter is missing"
    assert reasons["mine"] == "method=mine is not a loss of this version of LossLens"
    assert reasons["gone"].endswith("/rollouts/none, are missing")
    assert reasons["other"].endswith("not the rollouts that it was trained on")
    assert all("\n" not in why for why in left_out.values())


def test_without_a_base_there_are_none(found: Any, initial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise UnavailableError("give model_path=FOLDER")

    monkeypatch.setattr(pipeline, "base_of", none)
    assert found(member("a", initial, facts())) == ({}, {"gradients before step 1": "give model_path=FOLDER"})


def test_each_is_computed_once(
    found: Any,
    initial: Path,
    rollouts: pd.DataFrame,
    rows: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs that differ in their optimiser share one; a damaged one is computed again, to the same bytes."""
    computed = []
    take = training.initial_gradient
    monkeypatch.setattr(training, "initial_gradient", lambda *given: computed.append(given[0].name) or take(*given))
    frozen = freeze(rollouts.loc[rows.index], tmp_path / "rollouts", "test", {"policy": "test"})
    members = [member(name, initial, facts("sft", frozen)) for name in ("a", "b")]
    members.append(member("c", initial, facts("dft", frozen)))
    folders, left_out = found(*members)
    assert left_out == {}
    assert computed == ["sft", "dft"]
    assert folders["a"] == folders["b"] != folders["c"]
    assert found(*members)[0] == folders
    assert len(computed) == 2
    file = folders["a"] / "half" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert found(*members)[0] == folders
    assert file.read_bytes() == content
    assert computed == ["sft", "dft", "sft"]
    with open_adapter(folders["a"] / "whole") as whole:
        cohort: Any = SimpleNamespace(
            names=["a", "b", "c"], modules=whole.modules,
            by_name={name: SimpleNamespace(adapter=folders[name] / "whole") for name in "abc"},
        )  # fmt: skip
    measured = measure_gradients(cohort, folders)
    runs: Any = SimpleNamespace(gradients=np.array(list(measured.runs.values())))
    assert first_step(runs) == pytest.approx(1)  # they ended where the step leads
    pairs: Any = SimpleNamespace(gradients=np.array([of.products for of in measured.pairs.values()]))
    assert gradient_across(pairs)[0] == pytest.approx(gradient_halves(runs)[0])


# The page


def of_pair(a: str, b: str, start: float, end: float) -> dict[str, Any]:
    shown = {"gradient_cosine": start, "gradient_cosine_null": 0.03, "gradient_across": 0.1, "gradient_ceiling": 0.4}
    return {"run_a": f"{a}-conventional-s0-0", "run_b": f"{b}-conventional-s0-0", "cosine": end, **shown}


def test_the_page_splits_the_end(tmp_path: Path) -> None:
    runs = [run_row(method) for method in ("sft", "rft", "dpo")]
    pairs = [of_pair("sft", "rft", 0.8, 0.7), of_pair("sft", "dpo", -0.2, 0.3), of_pair("rft", "dpo", 0.2, 0.5)]
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    arms = pd.DataFrame([{"arm": "sft-conventional", "first_step": 0.5, "gradient_halves": 0.25}])
    made = {"runs": pd.DataFrame(runs), "arms": arms, **arm_tables(runs, pairs)}
    for name, table in made.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    section = page.section(AnalysisFolder(tmp_path))
    assert section is not None
    [table, alone] = section.tables
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    assert rows == {
        "SFT–RFT": ["0.800", "0.10", "0.700", "0.700", "0.000", "0.100"],
        "SFT–DPO": ["−0.200", "0.10", "0.300", "0.000", "0.300", "0.200"],
        "RFT–DPO": ["0.200", "0.10", "0.500", "0.200", "0.300", "0.000"],
    }
    assert [cell.text for cell in alone.rows[0].cells] == ["SFT", "0.25", "0.50", "–"]
    [finding] = section.findings
    said = "SFT–DPO moved most from its start: cosine of gradients −0.20, of final updates 0.30."
    assert finding.text == said
    [plot] = section.figures
    points = [(trace.x[0], trace.y[0]) for trace in plot.plot.data if trace.mode.startswith("markers")]  # type: ignore[union-attr]
    assert points == [(0.8, 0.7), (-0.2, 0.3), (0.2, 0.5)]


def test_without_gradients_there_is_no_section(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    assert page.section(AnalysisFolder(tmp_path)) is None


@pytest.mark.fast
def test_no_gradients_are_no_fault() -> None:
    """Where no run has one (adapters of others, on-policy runs, whole models) the rest is analysed all the same."""
    found = measure_gradients(SimpleNamespace(names=["a", "b"]), {})  # type: ignore[arg-type]
    assert (found.runs, found.pairs) == ({}, {})


@pytest.mark.fast
def test_the_end_is_a_share_of_its_ceiling(tmp_path: Path) -> None:
    """Two losses of one gradient whose updates differ by the order of the data alone did not part in training."""
    pair = {
        "arm_a": "rft-conventional", "arm_b": "rift-conventional", "pairing": "same init", "pairs": 2,
        "gradient_cosine": 0.997, "gradient_cosine_null": 0.02, "cosine": 0.38, "cosine_ceiling": 0.385,
        "cosine_relative": 0.99,
    }  # fmt: skip
    runs = [run(f"{method}-s{seed}", method, seed=seed) for method in ("rft", "rift") for seed in (1, 2)]
    write_json(tmp_path / "manifest.json", {"reference": "rft-s1"})
    for name, table in {"runs": runs, "arm_pairs": [pair]}.items():
        pd.DataFrame(table).to_csv(tmp_path / f"{name}.csv", index=False)
    section = page.section(AnalysisFolder(tmp_path))
    assert section is not None
    [finding] = section.findings
    assert finding.text.startswith("What the losses share was decided before step 1")
    cells = section.tables[0].rows[0].cells
    assert [cell.text for cell in cells[3:]] == ["0.990", "0.990", "0.000", "0.007"]
    assert cells[3].below == "of its ceiling"
