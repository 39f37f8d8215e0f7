"""Interpolated models against dense interpolation, and barriers by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from losslens.core.errors import InputError
from losslens.measures.base_weights import principal
from losslens.measures.connectivity import SequenceNll, barriers, curve
from losslens.measures.forward import Sequences, interpolated_model, observe, sequence_losses
from losslens.models.adapters import save_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.updates.folder import open_adapter
from losslens.updates.lora import LoraUpdate

pytestmark = pytest.mark.fast

ALPHAS = np.linspace(0, 1, 11)


class TestBarriers:
    def test_unequal_endpoints(self) -> None:
        """L = 1, 4, 3: chord at ½ is 2, so 4 − 2 = 2; mean of the endpoints 2, so 4 − 2 = 2."""
        chord, mean = barriers(np.array([0, 0.5, 1]), np.array([1.0, 4, 3]))
        assert (chord, mean) == (2, 2)

    def test_the_definitions_differ_on_a_slope(self) -> None:
        """L = 1, 2, 9 at 0, ¼, 1: chord at ¼ is 3, so no barrier (0, at the ends); the mean is 5, so 9 − 5 = 4."""
        chord, mean = barriers(np.array([0, 0.25, 1]), np.array([1.0, 2, 9]))
        assert (chord, mean) == (0, 4)

    def test_off_the_middle(self) -> None:
        """L = 2, 6, 7, 4 at 0, ¼, ¾, 1: above the chord (2.5, 3.5) by 3.5 and 3.5; above the mean 3 by 4."""
        chord, mean = barriers(np.array([0, 0.25, 0.75, 1]), np.array([2.0, 6, 7, 4]))
        assert (chord, mean) == (3.5, 4)

    def test_many_curves_at_once(self) -> None:
        rng = np.random.default_rng(0)
        many = rng.random((5, 11))
        chord, mean = barriers(ALPHAS, many)
        for n in range(5):
            assert (chord[n], mean[n]) == barriers(ALPHAS, many[n])


class TestCurve:
    def test_loss_is_per_token(self) -> None:
        """(2 + 6)/(1 + 3) = 2 nats a token, not the mean of 2 and 2 by chance: (1 + 6)/4 = 1.75."""
        tokens = np.array([1, 3])
        points = [SequenceNll(np.array(nll), tokens) for nll in ([2.0, 6.0], [1.0, 6.0], [2.0, 6.0])]
        found = curve(np.array([0, 0.5, 1]), points)
        assert found.loss == pytest.approx([2, 1.75, 2])
        assert found.chord[0] == 0

    def test_intervals_cover_and_pair(self) -> None:
        """Sequences of very different loss, all of which rise by exactly 1 a token halfway: the barrier is certain."""
        rng = np.random.default_rng(1)
        tokens = np.full(200, 10)
        level = rng.exponential(20, 200)
        points = [SequenceNll(level + 10 * rise, tokens) for rise in (0, 1, 0)]
        found = curve(np.array([0, 0.5, 1]), points)
        assert found.chord == pytest.approx((1, 1, 1))
        assert found.mean == pytest.approx((1, 1, 1))
        half_width = 1.96 * (level / 10).std() / np.sqrt(200)
        assert found.high[0] - found.low[0] == pytest.approx(2 * half_width, rel=0.15)
        assert found.low[0] < found.loss[0] < found.high[0]

    def test_the_interval_of_a_barrier(self) -> None:
        """Half of 400 sequences rise by 2 nats a token, half not: the barrier's mean is 1 with error 1/√400 = .05."""
        tokens = np.full(400, 5)
        rise = np.where(np.arange(400) % 2, 10.0, 0.0)
        flat = np.full(400, 3.0)
        found = curve(np.array([0, 0.5, 1]), [SequenceNll(flat + n * rise, tokens) for n in (0, 1, 0)])
        for value, low, high in (found.chord, found.mean):
            assert value == pytest.approx(1)
            assert (low, high) == pytest.approx((1 - 1.96 * 0.05, 1 + 1.96 * 0.05), abs=0.02)

    def test_seeded(self) -> None:
        rng = np.random.default_rng(2)
        points = [SequenceNll(rng.random(30), np.full(30, 2)) for _ in range(3)]
        first, second = (curve(np.array([0, 0.5, 1]), points) for _ in range(2))
        assert first.chord == second.chord
        assert np.array_equal(first.low, second.low)


@pytest.fixture(scope="module")
def adapters(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of different rank, scale and rank pattern on the tiny student, with updates that matter."""
    folders = []
    for number, options in enumerate(
        ({"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"q_proj": 3}})
    ):
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
        folder = tmp_path_factory.mktemp(f"adapter{number}")
        with preserved(base.model):
            torch.manual_seed(number)
            model = get_peft_model(base.model, config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.copy_(0.05 * torch.randn_like(parameter))
            save_adapter(model, folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def sequences(base: LoadedModel) -> Sequences:
    rng = np.random.default_rng(3)
    draw = lambda n: rng.integers(5, base.model.config.vocab_size, n).tolist()  # noqa: E731
    return Sequences([draw(n) for n in (5, 9, 3, 7, 4)], [draw(n) for n in (6, 2, 8, 1, 5)])


def test_the_interpolated_model_is_the_dense_one(base: LoadedModel, adapters: list[Path]) -> None:
    """Logits at every alpha equal those of the base with (1 − α)·ΔW₁ + α·ΔW₂ added to its weights, to 1e-5."""
    ids = torch.randint(5, base.model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    with open_adapter(adapters[0]) as first, open_adapter(adapters[1]) as second:
        modules = first.modules
        plain = base.model(ids).logits
        with interpolated_model(base.model, modules, first, second) as (model, set_weights), torch.no_grad():
            found = []
            for alpha in ALPHAS:
                set_weights([1 - alpha, alpha])
                found.append(model(ids).logits.clone())
        weights = {module: base.model.get_submodule(module).weight for module in modules}
        before = {module: weight.detach().clone() for module, weight in weights.items()}
        for alpha, logits in zip(ALPHAS, found, strict=True):
            with torch.no_grad():
                for module, weight in weights.items():
                    deltas = [adapter[module] for adapter in (first, second)]
                    dense = [delta.dense() for delta in deltas]
                    weight.copy_(before[module].double() + torch.from_numpy((1 - alpha) * dense[0] + alpha * dense[1]))
                expected = base.model(ids).logits
                for module, weight in weights.items():
                    weight.copy_(before[module])
            assert torch.allclose(logits, expected, atol=1e-5)
            assert (logits - plain).abs().max() > 0.1
    # Interpolating A and B apart is another model.
    assert (found[5] - (found[0] + found[10]) / 2).abs().max() > 1e-3


@pytest.mark.parametrize("which", [0, 1])
def test_the_endpoints_are_pefts_models(which: int, base: LoadedModel, adapters: list[Path]) -> None:
    ids = torch.randint(5, base.model.config.vocab_size, (2, 15), generator=torch.Generator().manual_seed(1))
    with preserved(base.model), torch.no_grad():
        expected = PeftModel.from_pretrained(base.model, adapters[which]).eval()(ids).logits
    with open_adapter(adapters[which]) as adapter, torch.no_grad():
        with interpolated_model(base.model, adapter.modules, adapter) as (model, set_weights):
            set_weights([1.0])
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        after = base.model(ids).logits
    assert not torch.allclose(after, expected, atol=1e-2)


def test_a_negative_scale(base: LoadedModel) -> None:
    """s = −2 on one update, 3 on the other, at weights ¼ and ¾: the output moves by the dense sum."""
    rng = np.random.default_rng(6)
    module = "model.layers.1.self_attn.o_proj"
    deltas = [
        LoraUpdate(rng.standard_normal((128, r)), rng.standard_normal((r, 128)), s) for r, s in ((2, -2.0), (3, 3.0))
    ]
    x = torch.randn(4, 128)
    plain = base.model.get_submodule(module)(x)
    with (
        interpolated_model(base.model, [module], *({module: d} for d in deltas)) as (model, set_weights),
        torch.no_grad(),
    ):
        set_weights([0.25, 0.75])
        found = model.get_submodule(module)(x) - plain
    dense = sum(w * d.dense() for w, d in zip((0.25, 0.75), deltas, strict=True))
    assert torch.allclose(found, x @ torch.from_numpy(dense).float().T, atol=1e-2, rtol=1e-4)


def test_an_adapter_of_another_base(base: LoadedModel) -> None:
    delta = LoraUpdate(np.ones((3, 1)), np.ones((1, 3)), 1.0)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.no_such"):
        with (
            pytest.raises(InputError, match="do not fit the base"),
            interpolated_model(base.model, [module], {module: delta}),
        ):
            pass


def test_losses_are_those_of_each_sequence_alone(base: LoadedModel, sequences: Sequences) -> None:
    """Without padding, one by one, from log-softmax; whatever the batch."""
    expected = []
    for prompt, completion in zip(sequences.prompts, sequences.completions, strict=True):
        with torch.no_grad():
            scores = base.model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected.append(-sum(float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(completion)))
    for batch_size in (1, 2, 5):
        found = sequence_losses(base.model, sequences, batch_size)
        assert found.nll == pytest.approx(expected, abs=1e-4)
        assert found.tokens.tolist() == [6, 2, 8, 1, 5]


def test_hidden_states_are_those_of_each_sequence_alone(base: LoadedModel, sequences: Sequences) -> None:
    """Every hidden state, pooled over the completion's tokens or at its last one."""
    for pooling, start in (("mean", None), ("last", -1)):
        parts = [batch.features for batch in observe(base.model, sequences, 2, pooling)]
        assert [part.shape[1] for part in parts] == [2, 2, 1]
        found = np.concatenate(parts, axis=1)
        for n, (prompt, completion) in enumerate(zip(sequences.prompts, sequences.completions, strict=True)):
            with torch.no_grad():
                states = base.model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
            assert len(found) == len(states) == base.model.config.num_hidden_layers + 1
            for layer, state in enumerate(states):
                first = len(prompt) if start is None else len(prompt) + len(completion) - 1
                assert np.allclose(found[layer, n], state[0, first:].double().mean(dim=0).numpy(), atol=1e-5)


class TestBaseWeights:
    @pytest.mark.parametrize("shape", [(30, 50), (700, 530)])
    def test_principal_directions_are_the_dense_ones(self, shape: tuple[int, int]) -> None:
        weight = np.random.default_rng(4).standard_normal(shape)
        found = principal(weight, top=5)
        u, _, vt = np.linalg.svd(weight)
        assert found.norm == pytest.approx(np.linalg.norm(weight))
        for k in range(5):
            assert abs(found.left[:, k] @ u[:, k]) == pytest.approx(1, abs=1e-10)
            assert abs(found.right[:, k] @ vt[k]) == pytest.approx(1, abs=1e-10)
