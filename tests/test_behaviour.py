"""What updates do to outputs and hidden states: by hand, by brute force, and what must hold of any model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax
from scipy.stats import entropy

from losslens.analysis.off_task import OffTaskText
from losslens.measures import get_measure, run_function_measures
from losslens.measures.activations import COMPLETION, participation_ratio, shift_cosine, shift_size
from losslens.measures.behaviour import (
    Observation,
    OffTask,
    PairBehaviour,
    RotatedCopies,
    RunBehaviour,
    Shifted,
    pair_behaviour,
    prediction_bound,
    run_behaviour,
)
from losslens.measures.forward import Batch, Sequences, interpolated_model, observe
from losslens.measures.kept_tokens import kept_log_probs, likeliest_tokens
from losslens.measures.outputs import cosines, jensen_shannon, kl, output_shifts
from losslens.measures.views import Functions, RunFunctions
from losslens.models.loading import LoadedModel
from losslens.updates.base import Array, Update
from losslens.updates.lora import LoraUpdate

MODULES = ("model.layers.1.self_attn.q_proj", "model.layers.3.mlp.down_proj")


def drawn(seed: int, tokens: int = 7, vocabulary: int = 11) -> Array:
    return log_softmax(np.random.default_rng(seed).standard_normal((tokens, vocabulary)), axis=1)


def cosine(base: Array, a: Array, b: Array) -> float:
    vectors = output_shifts(base, [a, b])
    return float(cosines(vectors[:1], vectors[1:]).item())


class TestOutputs:
    def test_by_hand(self) -> None:
        """A fair coin against one of ¾ and ¼: KL = ½ln(½/¾) + ½ln(½/¼) = ½ln(4/3); JS from the middle (⅝, ⅜)."""
        fair, bent = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
        assert kl(fair, bent) == pytest.approx([0.5 * math.log(4 / 3)], rel=1e-12)
        by_hand = 0.5 * (
            0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3) + 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
        )
        assert jensen_shannon(fair, bent) == pytest.approx(by_hand, rel=1e-12)
        # F = (ln 1.5, ln 0.5), of mean ln(¾)/2, so its variance under the fair coin is (ln 3/2)².
        [shift] = output_shifts(fair, [bent])
        assert shift @ shift == pytest.approx((math.log(3) / 2) ** 2, rel=1e-12)
        # The coin bent to the other side is shifted by exactly as much in the opposite direction.
        assert cosine(fair, bent, bent[:, ::-1]) == pytest.approx(-1, abs=1e-12)

    def test_a_cosine_by_hand(self) -> None:
        """Of three equally likely tokens one run doubles the odds of the first, the other those of the second."""
        base = np.log(np.full((1, 3), 1 / 3))
        first, second = (log_softmax(np.array([odds]), axis=1) for odds in ([math.log(2), 0, 0], [0, math.log(2), 0]))
        # Centred, (⅔, −⅓, −⅓)·ln 2 and (−⅓, ⅔, −⅓)·ln 2: cosine −½.
        assert cosine(base, first, second) == pytest.approx(-0.5, abs=1e-12)

    def test_next_to_scipy(self) -> None:
        base, a, b = drawn(0), drawn(1), drawn(2)
        assert kl(base, a) == pytest.approx(entropy(np.exp(base), np.exp(a), axis=1), rel=1e-10)
        assert jensen_shannon(a, b) == pytest.approx(np.mean(jensenshannon(np.exp(a), np.exp(b), axis=1) ** 2))
        weights = [np.exp(row) for row in base]
        covariances = [np.cov(x - z, y - z, aweights=w, ddof=0) for w, x, y, z in zip(weights, a, b, base, strict=True)]
        c = np.mean(covariances, axis=0)
        assert cosine(base, a, b) == pytest.approx(c[0, 1] / math.sqrt(c[0, 0] * c[1, 1]), rel=1e-10)

    def test_more_positions_than_are_in_memory_at_once(self) -> None:
        base, a = (np.tile(drawn(seed), (30, 1)) for seed in (0, 1))
        assert kl(base, a) == pytest.approx(entropy(np.exp(base), np.exp(a), axis=1), rel=1e-10)
        assert jensen_shannon(base, a) == pytest.approx(jensen_shannon(drawn(0), drawn(1)), rel=1e-12)
        assert math.isnan(jensen_shannon(base[:0], a[:0]))

    def test_what_must_hold(self) -> None:
        base, a, b = drawn(0), drawn(1), drawn(2)
        assert kl(base, base).tolist() == [0] * 7
        assert jensen_shannon(a, a) == 0
        assert jensen_shannon(a, b) == pytest.approx(jensen_shannon(b, a), rel=1e-14)
        assert cosine(base, a, a) == pytest.approx(1, abs=1e-12)
        assert math.isnan(cosine(base, base, a))
        apart = np.log([[1 - 1e-12, 1e-12]])
        assert jensen_shannon(apart, apart[:, ::-1]) == pytest.approx(math.log(2), abs=1e-9)
        # In float32 a run that equals the base but for rounding has no negative KL.
        near = base.astype(np.float32).astype(np.float64) + np.random.default_rng(3).normal(0, 1e-8, base.shape)
        assert (kl(base, near) >= 0).all()

    @pytest.mark.filterwarnings("error")
    def test_far_tails(self) -> None:
        """Tokens that both exclude count for nothing, whatever lies between their log-probabilities."""
        fair = np.log([[0.5, 0.5]])
        bent = np.log([[0.75, 0.25]])
        for low, lower in ((-2e3, -1e9), (-1e9, -2e3), (-np.inf, -np.inf)):
            base, run = (np.append(logs, [[end]], axis=1) for logs, end in ((fair, low), (bent, lower)))
            assert kl(base, run) == pytest.approx(kl(fair, bent), rel=1e-12)
            assert jensen_shannon(base, run) == pytest.approx(jensen_shannon(fair, bent), rel=1e-12)
            assert output_shifts(base, [run])[0, :2] == pytest.approx(output_shifts(fair, [bent])[0], rel=1e-12)
        # ½·ln(½/e⁻¹⁰⁰⁰) more than 500 nats.
        assert kl(fair, np.array([[0.0, -1000.0]])) == pytest.approx([500 - math.log(2)])

    def test_small_shifts(self) -> None:
        """KL grows with the square, ½‖F‖² is the KL, and the cosine does not know the size."""
        base, direction = drawn(0), np.random.default_rng(1).standard_normal((7, 11))
        small, large = (log_softmax(base + size * direction, axis=1) for size in (1e-3, 2e-3))
        assert kl(base, large).mean() / kl(base, small).mean() == pytest.approx(4, rel=0.01)
        [shift] = output_shifts(base, [small])
        assert shift @ shift / 2 == pytest.approx(kl(base, small).mean(), rel=0.01)
        assert cosine(base, small, large) == pytest.approx(1, abs=1e-5)

    def test_of_a_large_vocabulary_the_likeliest_are_kept(self) -> None:
        """The others are one token together: what is merged is a lower bound, near where they are unlikely."""
        rng = np.random.default_rng(0)
        base = torch.tensor(4 * rng.standard_normal((5, 300)))
        run = base + torch.tensor(0.1 * rng.standard_normal((5, 300)))
        kept = likeliest_tokens(base, 20, exact_up_to=50)
        assert torch.equal(kept, base.argsort(dim=1, descending=True)[:, :20])
        merged, exact = ([kept_log_probs(logits, k).numpy() for logits in (base, run)] for k in (kept, kept[:, :0]))
        probabilities = run.softmax(dim=1).gather(1, kept).numpy()
        assert np.exp(merged[1]) == pytest.approx(
            np.concatenate([probabilities, 1 - probabilities.sum(axis=1, keepdims=True)], axis=1)
        )
        assert exact[1] == pytest.approx(run.log_softmax(dim=1).numpy())
        bound, whole = kl(*merged).mean(), kl(*exact).mean()
        assert 0.9 * whole < bound < whole
        assert likeliest_tokens(base).shape == (5, 0)
        assert likeliest_tokens(torch.zeros(2, 600)).shape == (2, 64)


class TestActivations:
    def test_by_hand(self) -> None:
        """Two sequences of two dimensions: shifts (3, 4) and (0, 0) against (3, 0) and (0, 4)."""
        first, second = (np.array(rows, dtype=float)[None, None] for rows in ([[3, 4], [0, 0]], [[3, 0], [0, 4]]))
        assert shift_cosine(first, second).item() == pytest.approx(9 / 25)
        base = np.array([[6, 8], [0, 0]], dtype=float)[None, None]
        assert shift_size(first, base).item() == pytest.approx(0.5)
        assert np.isnan(shift_cosine(0 * first, second)).all()

    def test_what_must_hold(self) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((2, 3, 4, 5, 6))
        assert shift_cosine(a, 3 * a) == pytest.approx(np.ones((3, 4)))
        assert shift_cosine(a, -a) == pytest.approx(-np.ones((3, 4)))
        assert shift_cosine(a, b) == pytest.approx(shift_cosine(b, a))
        assert shift_size(2 * a, b) == pytest.approx(2 * shift_size(a, b))

    def test_the_participation_ratio(self) -> None:
        """Equal spread in k orthogonal directions is k; variances 3 and 1 are (3 + 1)²/(9 + 1) = 1.6."""
        crossed = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=float)
        assert participation_ratio(crossed + 7) == pytest.approx(2)
        assert participation_ratio(crossed * [math.sqrt(3), 1]) == pytest.approx(1.6)
        states = np.random.default_rng(0).standard_normal((9, 30))
        values = np.linalg.eigvalsh(np.cov(states.T))
        assert participation_ratio(states) == pytest.approx(values.sum() ** 2 / np.sum(values**2))
        assert participation_ratio(5 * states) == pytest.approx(participation_ratio(states))
        assert math.isnan(participation_ratio(np.ones((4, 3))))


class TestRotatedCopies:
    def test_norm_spectrum_and_inputs_are_kept(self) -> None:
        rng = np.random.default_rng(0)
        update = LoraUpdate(rng.standard_normal((12, 3)), rng.standard_normal((3, 8)), 0.7)
        copy = update.left_rotated(rng)
        assert copy.svd().values == pytest.approx(update.svd().values)
        assert copy.dense().T @ copy.dense() == pytest.approx(update.dense().T @ update.dense())
        assert abs(copy.inner(update)) < 0.7 * update.inner(update)

    def test_outputs_are_uniform(self) -> None:
        """Of many copies the mean is 0, and each output has its share of the norm; also where the rank is larger."""
        rng = np.random.default_rng(0)
        for shape in ((6, 2), (2, 3)):
            update = LoraUpdate(rng.standard_normal(shape), np.eye(shape[1]), 1.0)
            copies = np.array([update.left_rotated(rng).dense() for _ in range(4000)])
            norm = update.inner(update)
            assert np.abs(copies.mean(axis=0)).max() < 0.1 * math.sqrt(norm)
            assert (copies**2).sum(axis=2).mean(axis=0) == pytest.approx(norm / shape[0], rel=0.1)

    def test_other_updates_have_none(self) -> None:
        class Dense(LoraUpdate):
            left_rotated = Update.left_rotated  # type: ignore[assignment]

        assert Dense(np.ones((2, 1)), np.ones((1, 2)), 1.0).left_rotated(np.random.default_rng(0)) is None


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    rng = np.random.default_rng(0)
    return Sequences(
        [rng.integers(3, 300, size).tolist() for size in (5, 9, 3, 6, 4)],
        [rng.integers(3, 300, size).tolist() for size in (6, 2, 8, 1, 5)],
    )


def update_of(base: LoadedModel, seed: int, size: float = 0.02) -> Mapping[str, LoraUpdate]:
    rng = np.random.default_rng(seed)
    shapes = {module: base.model.get_submodule(module).weight.shape for module in MODULES}
    return {
        module: LoraUpdate(size * rng.standard_normal((out, 2)), rng.standard_normal((2, into)), 1.0)
        for module, (out, into) in shapes.items()
    }


def run_of(
    base: LoadedModel, update: Mapping[str, LoraUpdate], sequences: Sequences, weight: float = 1.0
) -> Observation:
    with interpolated_model(base.model, MODULES, update) as (model, set_weights):
        set_weights([weight])
        return of(list(observe(model, sequences, 2, "mean")))


def of(batches: Sequence[Batch]) -> Observation:
    states = [batch.states for batch in batches if batch.states is not None]
    return Observation(np.concatenate([batch.log_probs for batch in batches]), np.concatenate(states, axis=2))


def behaviour(base: Observation, run: Observation, copies: Sequence[Observation] = (), **known: Array) -> RunBehaviour:
    off_task = OffTask(base.log_probs, np.ones(3))
    none = np.zeros(0)
    drawn = RotatedCopies(
        **{"kl": none, "off_task_kl": none, "off_task_change": none, **known}, observations=tuple(copies)
    )
    return run_behaviour(base, run, off_task, replace(off_task, log_probs=run.log_probs, nll=np.full(3, 2.0)), drawn)


class TestModels:
    def test_one_pass_is_what_each_sequence_alone_shows(self, base: LoadedModel, sequences: Sequences) -> None:
        """Log-probabilities, losses and states of each sequence without padding, to 1e-4."""
        batches = list(observe(base.model, sequences, 2, "mean"))
        found, nll = of(batches), np.concatenate([batch.nll for batch in batches])
        place = 0
        for n, (prompt, completion) in enumerate(zip(sequences.prompts, sequences.completions, strict=True)):
            with torch.no_grad():
                output = base.model(torch.tensor([prompt + completion]), output_hidden_states=True)
            scores = output.logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1].numpy()
            assert np.allclose(found.log_probs[place : place + len(completion)], scores, atol=1e-4)
            assert nll[n] == pytest.approx(-scores[np.arange(len(completion)), completion].sum(), abs=1e-4)
            place += len(completion)
            for layer, state in enumerate(output.hidden_states):
                assert np.allclose(found.states[0, layer, n], state[0, len(prompt) - 1].numpy(), atol=1e-4)
                start = state[0, len(prompt) : len(prompt) + 3].mean(dim=0).numpy()
                assert np.allclose(found.states[1, layer, n], start, atol=1e-4)
                whole = state[0, len(prompt) :].mean(dim=0).numpy()
                assert np.allclose(found.states[COMPLETION, layer, n], whole, atol=1e-4)
        assert place == len(found.log_probs)

    def test_next_to_brute_force(self, base: LoadedModel, sequences: Sequences) -> None:
        """KL, output cosine and JS of two models by float64 loops over tokens and vocabulary, to 1e-6."""
        base_run, a, b = (run_of(base, update_of(base, seed), sequences, float(seed > 0)) for seed in (0, 1, 2))
        kls, variances, divergences = [], [], []
        for zero, first, second in zip(base_run.log_probs, a.log_probs, b.log_probs, strict=True):
            p, q, r = (torch.tensor(row).double().softmax(0).tolist() for row in (zero, first, second))
            kls.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
            shifts = [[math.log(y / x) for x, y in zip(p, other, strict=True)] for other in (q, r)]
            means = [sum(x * f for x, f in zip(p, shift, strict=True)) for shift in shifts]
            centred = [[f - mean for f in shift] for shift, mean in zip(shifts, means, strict=True)]
            variances.append([
                sum(x * f * g for x, f, g in zip(p, centred[i], centred[j], strict=True))
                for i, j in ((0, 0), (1, 1), (0, 1))
            ])  # fmt: skip
            divergences.append(
                sum(
                    0.5 * (x * math.log(2 * x / (x + y)) + y * math.log(2 * y / (x + y)))
                    for x, y in zip(q, r, strict=True)
                )
            )
        own, other, both = np.mean(variances, axis=0)
        pair = pair_behaviour(Shifted(base_run, a, ()), Shifted(base_run, b, ()))
        found = behaviour(base_run, a)
        assert found.kl == pytest.approx(np.mean(kls), abs=1e-6)
        assert found.kl_quantile == pytest.approx(np.quantile(kls, 0.95), abs=1e-6)
        assert pair.output_cosine == pytest.approx(both / math.sqrt(own * other), abs=1e-6)
        assert pair.js == pytest.approx(np.mean(divergences), abs=1e-6)
        assert pair.shift_cosine == pytest.approx(
            shift_cosine(a.states - base_run.states, b.states - base_run.states), nan_ok=True
        )

    def test_scale_and_the_base_itself(self, base: LoadedModel, sequences: Sequences) -> None:
        update = update_of(base, 1, size=0.002)
        none, half, full = (run_of(base, update, sequences, weight) for weight in (0.0, 0.5, 1.0))
        assert behaviour(none, none).kl == behaviour(none, none).off_task_kl == 0
        assert behaviour(none, full).kl / behaviour(none, half).kl == pytest.approx(4, rel=0.1)
        pair = pair_behaviour(Shifted(none, half, ()), Shifted(none, full, ()))
        assert pair.output_cosine == pytest.approx(1, abs=1e-2)
        assert behaviour(none, full).shift_size[COMPLETION, -1] == pytest.approx(
            2 * behaviour(none, half).shift_size[COMPLETION, -1], rel=0.1
        )
        assert np.isnan(pair.shift_cosine[:, 0]).all()  # no embedding is shifted


class TestMeasures:
    def test_of_one_run(self, base: LoadedModel, sequences: Sequences) -> None:
        """KL 2 against copies of 0.4 and 0.6 is a gain of 4, with s.e. 4·(0.1√2/0.5)/√2 = 0.8."""
        zero, run = (run_of(base, update_of(base, 1), sequences, weight) for weight in (0.0, 1.0))
        known = replace(behaviour(zero, run), kl=2.0, kl_copies=np.array([0.4, 0.6]))
        bare = replace(known, kl_copies=np.zeros(0))
        view = RunFunctions(np.array([4.0, 4.0, 0.0, 1.0]), [known, bare, replace(known, kl=0.0), None])
        values = {measure.name: measure.value(view) for measure in run_function_measures()}
        assert values["kl"].tolist()[:3] == [2, 2, 0]
        assert values["kl_per_norm"][0] == 0.125
        assert np.isnan(values["kl_per_norm"][2])
        assert values["kl_gain"][0] == pytest.approx(4)
        assert values["kl_gain_se"][0] == pytest.approx(0.8)
        assert np.isnan(values["kl_gain"][1])
        assert all(np.isnan(column[3]) for column in values.values())
        # The cross-entropy rose from 3 to 6 nats over the tokens.
        assert values["off_task_change"][0] == pytest.approx(3 / len(zero.log_probs))

    def test_nulls_are_those_of_the_draws(self, base: LoadedModel, sequences: Sequences) -> None:
        zero = run_of(base, update_of(base, 1), sequences, 0.0)
        runs = [run_of(base, update_of(base, seed), sequences) for seed in range(6)]
        first, second = Shifted(zero, runs[0], tuple(runs[2:4])), Shifted(zero, runs[1], tuple(runs[4:6]))
        pair = pair_behaviour(first, second)
        # Draws 0, 1 of the first with draws 1, 0 of the second.
        drawn = [cosine(zero.log_probs, runs[i].log_probs, runs[j].log_probs) for i, j in ((2, 5), (3, 4))]
        bound = abs(np.mean(drawn)) + 12.7062 * np.std(drawn, ddof=1) * np.sqrt(1.5)
        assert pair.output_cosine_null == pytest.approx(min(1, bound), abs=1e-5)
        divergences = [jensen_shannon(runs[i].log_probs, runs[j].log_probs) for i, j in ((2, 5), (3, 4))]
        assert pair.js_null == pytest.approx(np.mean(divergences))
        found = behaviour(zero, runs[0], runs[2:4], off_task_change=np.array([-3.0, 1.0]))
        assert found.off_task_change_null == pytest.approx(1 + 12.7062 * 8**0.5 * 1.5**0.5, rel=1e-4)
        sizes = [shift_size(run.states - zero.states, zero.states) for run in runs[2:4]]
        assert found.shift_size_null == pytest.approx(np.mean(sizes, axis=0))

    def test_draws_of_the_same_number_are_not_compared(self) -> None:
        """Draw i of the first run with draw j ≠ i of the second, of three: six cosines; t is 4.3027."""
        rng = np.random.default_rng(0)
        base = log_softmax(rng.standard_normal((400, 11)), axis=1)
        logs = [log_softmax(base + 0.1 * rng.standard_normal(base.shape), axis=1) for _ in range(7)]
        first, *copies = (Observation(each, np.zeros((3, 1, 2, 4))) for each in (base, *logs))
        # The third draw is the same in both.
        own, other = (copies[1], copies[2], copies[3]), (copies[4], copies[5], copies[3])
        pair = pair_behaviour(Shifted(first, copies[0], own), Shifted(first, copies[6], other))
        drawn = [
            cosine(base, a.log_probs, b.log_probs) for i, a in enumerate(own) for j, b in enumerate(other) if i != j
        ]
        bound = abs(np.mean(drawn)) + 4.3027 * np.std(drawn, ddof=1) * np.sqrt(4 / 3)
        assert bound < 0.5
        assert pair.output_cosine_null == pytest.approx(bound, rel=1e-4)

    def test_the_bound_of_a_further_draw(self) -> None:
        """Of 4,000 further draws beside four known ones, 5% are beyond the bound, give or take 1 point."""
        draws = np.random.default_rng(0).normal(size=(5, 4000))
        beyond = np.abs(draws[4]) > prediction_bound(draws[:4], 4)
        assert beyond.mean() < 0.06
        centred = np.abs(draws[4] - draws[:4].mean(axis=0)) > prediction_bound(draws[:4] - draws[:4].mean(axis=0), 4)
        assert centred.mean() == pytest.approx(0.05, abs=0.01)
        assert np.isnan(prediction_bound(draws[:1], 1)).all()

    def test_of_two_runs(self, base: LoadedModel, sequences: Sequences) -> None:
        """A run next to itself shows what identical updates show; without passes nothing is shown."""
        zero, run = (run_of(base, update_of(base, 1), sequences, weight) for weight in (0.0, 1.0))
        same: PairBehaviour = pair_behaviour(Shifted(zero, run, ()), Shifted(zero, run, ()))
        view = Functions([None] * 2, [None] * 2, [same, None], [None] * 2)
        for name in ("output_cosine", "js", "shift_cosine", "shift_cosine_prompt"):
            measure = get_measure(name)
            assert measure.value(view)[0] == pytest.approx(measure.identical, abs=1e-6)  # type: ignore[attr-defined]
            assert np.isnan(measure.value(view)[1])  # type: ignore[attr-defined]
            assert np.isnan(measure.null(view)).all()  # type: ignore[attr-defined]


def test_the_off_task_text(base: LoadedModel) -> None:
    """Every paragraph stands alone, no window is longer than the model, and no token is lost but each first one."""
    text = OffTaskText(40)
    windows = text.tokens(base.tokenizer)
    assert max(len(p) + len(c) for p, c in zip(windows.prompts, windows.completions, strict=True)) == 40
    read = "".join(base.tokenizer.decode(p + c) for p, c in zip(windows.prompts, windows.completions, strict=True))
    assert read == text.text.strip().replace("\n\n", "")
    assert text.key != OffTaskText(41).key
    assert len(OffTaskText(None).tokens(base.tokenizer).prompts) >= 10
