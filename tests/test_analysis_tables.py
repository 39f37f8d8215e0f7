"""The tables from made-up measurements, each cell worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from losslens.analysis.accuracy import midpoint_table, pair_table, run_table, seed_table
from losslens.analysis.base_weights import BaseWeights
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Base, Cohort, ComparedAdapter
from losslens.analysis.forward_passes import ForwardPasses
from losslens.analysis.function_space import FunctionSpaceResults
from losslens.analysis.gradients import Gradients
from losslens.analysis.manifests import BaseFacts, RunFacts
from losslens.analysis.scores import scores_of_runs
from losslens.analysis.tables import compared_weights
from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json
from losslens.evaluation.outcomes import write_outcomes
from losslens.measures.base_weights import PrincipalParts
from losslens.measures.comparison import PairGeometry, RunGeometry
from losslens.measures.definitions.weight_space import random_agreement
from losslens.measures.nulls import expected_angles
from losslens.measures.tables import BaseComparison, ComparedWeights, WeightTables, weight_tables
from losslens.models.loading import LoadedModel, ModelSource
from losslens.runs.run import Run
from losslens.tables.analysis_folder import AnalysisFolder

pytestmark = pytest.mark.fast

NAN = float("nan")
MODEL = {"name": "t", "path": "t", "revision": None, "dtype": "auto", "device": "auto", "trust_remote_code": False}


def facts(method: str, seed: int, init: str) -> RunFacts:
    return RunFacts.model_validate(
        {
            "method": method,
            "conventional_lr_scale": 0.1 if method == "dpo" else 1.0,
            "learning_rate": 1e-3,
            "base": {"sha256": "b"},
            "rollouts": {"folder": "r", "sha256": "r"},
        "trained_on": {"pass_rate": 0.7},
            "initial_adapter": {"folder": init, "sha256": init},
            "identity": {"method": method, "seed": seed, "init_seed": 1},
            "config": {
                "data": {"name": "quiz", "eval_size": 9}, "benchmark": {}, "evaluation": {}, "rollouts": {},
                "model": MODEL,
                "lr": {"name": "conventional", "peak": 1e-3, "factor": None},
                "lora_rank": {"r": 2}, "seed": seed, "init_seed": 1,
            },
            "adapter_sha256": "a",
            "adapter_config_sha256": "c",
            "training": {"steps": 10},
        }
    )  # fmt: skip


def scored(folder: Path, correct: dict[str, list[bool]]) -> Run:
    """A run with outcomes: of each problem its samples."""
    rows = [(problem, n, right) for problem, samples in correct.items() for n, right in enumerate(samples)]
    table = pd.DataFrame(
        {
            "problem_id": [row[0] for row in rows],
            "sample": [row[1] for row in rows],
            "completion": "",
            "answer": "",
            "correct": [row[2] for row in rows],
            "tokens": [4 + row[1] for row in rows],
            "finished": [row[2] for row in rows],
        }
    )
    write_outcomes(table, folder / "eval" / "quiz.parquet", "asked", "scored")
    return Run(folder)


def cohort(members: list[ComparedAdapter], **values) -> Cohort:
    shapes = values.get("shapes", [(30, 50)])
    ranks = {member.name: values.get("ranks", [2] * len(shapes)) for member in members}
    modules = [f"model.layers.{n}.m" for n in range(len(shapes))]
    bases = values.get("bases", [])
    scores = scores_of_runs([*(base.run for base in bases), *(member.run for member in members if member.run)])
    return Cohort(members, modules, shapes, ranks, bases, scores, [], {})


class TestAccuracy:
    def test_pairs_are_matched_by_problem(self, tmp_path: Path) -> None:
        """Of p, q, r run x has p and q right, run y r alone, in another order: b = 2, c = 1, difference ⅓."""
        x = scored(tmp_path / "x", {"p": [True], "q": [True], "r": [False]})
        y = scored(tmp_path / "y", {"r": [True], "q": [False], "p": [False]})
        members = [ComparedAdapter(run.name, run.folder, run.name, run=run) for run in (x, y)]
        table = pair_table(cohort(members), "quiz")
        row = table.iloc[0]
        assert (row["mcnemar_b"], row["mcnemar_c"]) == (2, 1)
        assert row["accuracy_diff"] == pytest.approx(1 / 3)
        assert row["mcnemar_p"] == 1

    def test_several_samples_stay_together(self, tmp_path: Path) -> None:
        """x: 2, 1, 0 of two right; y: 1, 1, 1. Better on one problem each; means ½ and ½; n = 3 problems."""
        x = scored(tmp_path / "x", {"p": [True, True], "q": [True, False], "r": [False, False]})
        y = scored(tmp_path / "y", {"p": [True, False], "q": [False, True], "r": [True, False]})
        members = [ComparedAdapter(run.name, run.folder, run.name, run=run) for run in (x, y)]
        row = pair_table(cohort(members), "quiz").iloc[0]
        assert (row["mcnemar_b"], row["mcnemar_c"], row["accuracy_diff"]) == (1, 1, 0)
        runs = run_table(cohort(members), pd.DataFrame({"run": ["x", "y"], "norm": [1.0, 2.0]}))
        assert runs["n"].tolist() == [3, 3]
        assert runs["accuracy"].tolist() == [0.5, 0.5]

    def test_against_the_base(self, tmp_path: Path) -> None:
        """Twenty problems: the base has half, x all, y none. A run has no verdict; one of its own is its arm's."""
        problems = [f"p{n}" for n in range(20)]
        base = scored(tmp_path / "base", {p: [n < 10] for n, p in enumerate(problems)})
        x, y = (scored(tmp_path / name, {p: [right] for p in problems}) for name, right in (("x", True), ("y", False)))
        members = [ComparedAdapter(run.name, run.folder, run.name, run=run) for run in (x, y)]
        bases = [Base("base", base, BaseFacts.model_validate({"base": {}, "config": {"model": {"name": "tiny"}}}))]
        table = run_table(cohort(members, bases=bases), pd.DataFrame({"run": ["x", "y"]})).set_index("run")
        assert table.loc["x", "base_diff"] == 0.5
        assert table.loc["y", "base_diff"] == -0.5
        assert table.loc["x", "base_diff_low"] < 0.5 < table.loc["x", "base_diff_high"]
        assert pd.isna(table.loc["base", "base_diff"])
        assert not [name for name in table if name.endswith(("verdict", "p_holm"))]

    def test_fallen_to_nothing_is_more_than_chance(self, tmp_path: Path) -> None:
        """None of 25 against one of 25 has p = 1, and says nothing; against all of 25 p = 2/2²⁵."""
        problems = [f"p{n}" for n in range(25)]
        none = scored(tmp_path / "none", {p: [False] for p in problems})
        members = [ComparedAdapter("none", none.folder, "none", run=none)]
        for right, fallen in ((1, False), (25, True)):
            base = scored(tmp_path / f"base{right}", {p: [n < right] for n, p in enumerate(problems)})
            facts = BaseFacts.model_validate({"base": {}, "config": {"model": {"name": "tiny"}}})
            table = run_table(cohort(members, bases=[Base("base", base, facts)]), pd.DataFrame({"run": ["none"]}))
            assert ("fell to 0.0%" in str(table.iloc[-1]["diverged"])) == fallen

    def test_the_midpoint_stands_between_its_ends(self, tmp_path: Path) -> None:
        x = scored(tmp_path / "x", {"p": [True], "q": [True], "r": [False], "s": [True]})
        y = scored(tmp_path / "y", {"p": [False], "q": [False], "r": [True], "s": [True]})
        members = [
            ComparedAdapter(run.name, run.folder, run.name, run=run, facts=facts("sft", 1, "i")) for run in (x, y)
        ]
        members.append(ComparedAdapter("z", tmp_path, "z"))
        correct = pd.Series([True, False, False], index=["r", "p", "q"])
        table = midpoint_table(cohort(members), {("x", "y"): correct, ("x", "z"): correct})
        assert table.loc[0, ["accuracy_mid", "accuracy_mid_a", "accuracy_mid_b"]].tolist() == pytest.approx(
            [1 / 3, 2 / 3, 1 / 3]
        )
        assert table["accuracy_mid_n"].tolist() == [3, 3]
        assert np.isnan(table.loc[1, "accuracy_mid_b"])

    def test_the_spread_over_seeds(self, tmp_path: Path) -> None:
        """Accuracies ¼ and ¾: mean ½, standard deviation √(2·(¼)²/1) = .354; norms 1 and 3: √2."""
        runs = [
            scored(tmp_path / f"s{n}", {p: [k < right] for k, p in enumerate("pqrs")})
            for n, right in enumerate((1, 3, 2))
        ]
        members = [
            ComparedAdapter(run.name, run.folder, run.name, run=run, facts=facts(method, n, "i"))
            for n, (run, method) in enumerate(zip(runs, ("sft", "sft", "dpo"), strict=True))
        ]
        them = cohort(members)
        sizes = pd.DataFrame({"run": them.names, "norm": [1.0, 3.0, 9.0]})
        table = seed_table(them, run_table(them, sizes))
        assert len(table) == 1
        row = table.iloc[0]
        assert (row["method"], row["seeds"], row["accuracy_mean"]) == ("sft", 2, 0.5)
        assert row["accuracy_std"] == pytest.approx(np.sqrt(0.125))
        assert row["norm_std"] == pytest.approx(np.sqrt(2))
        assert (row["accuracy_min"], row["accuracy_max"]) == (0.25, 0.75)

    def test_other_problems(self, tmp_path: Path) -> None:
        x, y = scored(tmp_path / "x", {"p": [True]}), scored(tmp_path / "y", {"q": [True]})
        members = [ComparedAdapter(run.name, run.folder, run.name, run=run) for run in (x, y)]
        with pytest.raises(InputError, match="x and y: not scored on the same problems"):
            pair_table(cohort(members), "quiz")


class TestGeometryTables:
    """Three modules in two layers, two runs."""

    MODULES = ("model.layers.0.q", "model.layers.0.k", "model.layers.1.q")
    # Squared norms of U_kᵀΔW, ΔW·V_k and U_kᵀΔW·V_k in each module.
    PARTS = ((10.0, 3.0, 1.0), (4.0, 2.0, 1.0), (0.0, 0.0, 0.0))

    def tables(self):
        runs = {
            "x": RunGeometry(np.array([[3.0, 4.0], [2.0, NAN], [1.0, 1.0]]), np.radians([[1.0, 2], [3, 4], [8, 9]])),
            "y": RunGeometry(np.array([[5.0, NAN], [2.0, 2.0], [NAN, NAN]]), np.zeros((3, 0))),
        }
        pair = PairGeometry(
            inner=np.array([10.0, 4.0, 0.0]),
            right_overlap=np.ones(3),
            angles_left=np.radians([[10.0, 80.0], [20.0, NAN], [NAN, NAN]]),
            angles_right=np.radians([[1.0, 2.0], [5.0, NAN], [NAN, NAN]]),
            u1=np.array([0.2, 0.4, NAN]),
            v1=np.array([0.5, 0.9, NAN]),
        )
        parts = [PrincipalParts(left, right, both, 1.0, 0.5, 0.0, 1.0) for left, right, both in self.PARTS]
        base = {name: BaseComparison.of(np.array([6.0, 6.0, 7.0]), parts) for name in runs}
        return weight_tables(ComparedWeights(self.MODULES, [(9, 9)] * 3, runs, {("x", "y"): pair}, 2, base))

    def test_runs(self) -> None:
        """x: ‖ΔW‖² = 25 + 4 + 2 = 31, ‖W0‖ = 11; shares 14/31 and 5/31; drift medians 3° and 4°."""
        row = self.tables().runs.set_index("run").loc["x"]
        assert row["norm"] == pytest.approx(np.sqrt(31))
        assert row["relative_norm"] == pytest.approx(np.sqrt(31) / 11)
        assert (row["principal_left"], row["principal_right"]) == pytest.approx((14 / 31, 5 / 31))
        assert row["projected_rotation"] == pytest.approx(np.sqrt(2 / (2 / 9 * 5)))
        assert (row["drift_min"], row["drift_max"]) == pytest.approx((3, 4))
        assert row["stable_rank"] == pytest.approx((25 / 9 + 1 + 2) / 3)
        assert np.isnan(self.tables().runs.set_index("run").loc["y", "drift_max"])

    def test_pairs(self) -> None:
        """Cosine (10 + 4)/(√31·√33); medians of 10 and 20, of 80 and 20, of 1 and 5, of 2 and 5; means .3 and .7."""
        row = self.tables().pairs.iloc[0]
        assert row["cosine"] == pytest.approx(14 / np.sqrt(31 * 33))
        assert row["orthogonal_share"] == pytest.approx(np.sqrt(1 - 14**2 / (31 * 33)))
        angles = row[["angle_min_left", "angle_max_left", "angle_min_right", "angle_max_right"]].astype(float)
        assert angles.tolist() == pytest.approx([15, 50, 3, 3.5])
        assert (row["u1"], row["v1"]) == pytest.approx((0.3, 0.7))

    def test_layers_and_modules(self) -> None:
        """Layer 0: 14/(√29·√33), median 15°; layer 1 has no direction in y."""
        layers = self.tables().layers.set_index("layer")
        assert layers.loc[0, "cosine"] == pytest.approx(14 / np.sqrt(29 * 33))
        assert layers.loc[0, "angle_min_left"] == pytest.approx(15)
        assert layers.loc[1, ["cosine", "angle_min_left"]].isna().all()
        modules = self.tables().modules.set_index("module")
        assert modules.loc["model.layers.0.k", "cosine"] == pytest.approx(4 / (2 * np.sqrt(8)))
        assert modules.loc["model.layers.0.q", "angles_left"] == pytest.approx([10, 80])
        assert modules.loc["model.layers.0.k", "u1"] == 0.4

    def test_one_run_has_no_pairs(self) -> None:
        runs = {"x": RunGeometry(np.ones((3, 1)), np.zeros((3, 0)))}
        tables = weight_tables(ComparedWeights(self.MODULES, [(9, 9)] * 3, runs, {}, 2))
        assert len(tables.runs) == 1
        assert len(tables.pairs) == len(tables.layers) == len(tables.modules) == 0
        assert "cosine" in tables.pairs.columns


class TestNulls:
    """Two modules of different shapes; x has three directions, y two; top 2."""

    SHAPES = ((30, 50), (20, 80))
    OVERLAP = np.array([7.0, 5.0])
    NORMS = np.sqrt([[14, 3], [5, 25]])

    def tables(self, tmp_path: Path, starts: tuple[str, str] | None) -> WeightTables:
        members = [
            ComparedAdapter(n, tmp_path, n, facts=starts and facts("sft", k, starts[k])) for k, n in enumerate("xy")
        ]
        them = replace(cohort(members, shapes=list(self.SHAPES), ranks=[3, 3]), modules=["a", "b"])
        runs = {
            "x": RunGeometry(np.array([[3.0, 2, 1], [1, 1, 1]]), np.zeros((2, 0))),
            "y": RunGeometry(np.array([[2.0, 1, NAN], [4, 3, NAN]]), np.zeros((2, 0))),
        }
        angles = np.full((2, 2), 0.5)
        pairs = {("x", "y"): PairGeometry(np.zeros(2), self.OVERLAP, angles, angles, angles[0], angles[0])}
        cache = Cache(tmp_path / "cache")
        found = weight_tables(compared_weights(them, runs, pairs, FunctionSpaceResults(), {}, Gradients(), 2, cache))
        again = weight_tables(compared_weights(them, runs, pairs, FunctionSpaceResults(), {}, Gradients(), 2, cache))
        pd.testing.assert_frame_equal(again.pairs, found.pairs)
        return found

    def test_independent(self, tmp_path: Path) -> None:
        found = self.tables(tmp_path, ("i", "j")).pairs.iloc[0]
        squared = self.NORMS**2
        variance = np.sum(squared[0] * squared[1] / np.prod(self.SHAPES, axis=1))
        assert found["cosine_null"] == pytest.approx(1.95996 * np.sqrt(variance / squared.sum(axis=1).prod()), rel=1e-5)
        assert found["u1_null"] == pytest.approx(random_agreement(np.array([30, 20])))
        assert found["v1_null"] == pytest.approx(random_agreement(np.array([50, 80])))
        for side, spaces in (("left", [(20, 2, 2), (30, 2, 2)]), ("right", [(50, 2, 2), (80, 2, 2)])):
            nulls = (found[f"angle_min_{side}_null"], found[f"angle_max_{side}_null"])
            assert nulls == expected_angles(spaces)
        assert found["orthogonal_share_null"] == pytest.approx(np.sqrt(1 - found["cosine_null"] ** 2))

    def test_shared(self, tmp_path: Path) -> None:
        """The right side is random within three dimensions, the left as before."""
        found = self.tables(tmp_path, ("i", "i")).pairs.iloc[0]
        bound = 1.95996 * np.sqrt(np.sum(self.OVERLAP / [30, 20]) / (self.NORMS**2).sum(axis=1).prod())
        assert found["cosine_null"] == pytest.approx(bound, rel=1e-5)
        assert found["v1_null"] == pytest.approx(0.5)  # of the sphere in three dimensions
        assert found["angle_min_right_null"] == expected_angles([(3, 2, 2)] * 2)[0]
        assert found["angle_min_left_null"] == expected_angles([(20, 2, 2), (30, 2, 2)])[0]

    def test_unknown(self, tmp_path: Path) -> None:
        """Of adapters made elsewhere: the bound of the cosine that holds in any case, and nothing on the right side."""
        shared, unknown = (self.tables(tmp_path, starts).pairs.iloc[0] for starts in (("i", "i"), None))
        for name in ("cosine_null", "u1_null", "angle_min_left_null", "angle_max_left_null"):
            assert unknown[name] == shared[name]
        assert unknown[["v1_null", "angle_min_right_null", "angle_max_right_null"]].isna().all()

    def test_one_module(self, tmp_path: Path) -> None:
        found = self.tables(tmp_path, ("i", "j")).modules.set_index("module").loc["b"]
        assert found["cosine_null"] == pytest.approx(1.95996 / np.sqrt(20 * 80), rel=1e-5)
        assert found["angle_min_left_null"] == expected_angles([(20, 2, 2)])[0]


def test_a_square_weight_that_is_kept_transposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's `c_proj` is a square (in, out) matrix: an update along W0's first singular pair lies inside its top 1."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30))
    module = "transformer.h.0.attn.c_proj"
    u, values, vt = np.linalg.svd(model.get_submodule(module).weight.detach().double().numpy().T)
    weights = {
        f"{module}.lora_A.weight": torch.tensor(vt[:1]),
        f"{module}.lora_B.weight": torch.tensor(u[:, :1].copy()),
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1}')
    them = Cohort(
        [ComparedAdapter("x", tmp_path, "x")], [module], [(16, 16)], {"x": [1]}, [], scores_of_runs([]), [], {}
    )
    source = ModelSource("model_path", "gpt2", None, "float32", "cpu", False)
    monkeypatch.setattr(ForwardPasses, "_base", LoadedModel(model, None))
    passes = ForwardPasses(source, {"sha256": "gpt2"}, them, Cache(tmp_path / "cache"), 8)
    base_weights = BaseWeights(passes, them, 1)
    found = base_weights.compared()["x"]
    assert found.base_norms == pytest.approx(np.linalg.norm(values))
    # σ₁ grows by 1, and its vectors stay.
    effects = base_weights.effects(3)["x"]
    assert effects.shape == (1, 3, 4)
    assert effects[0, :2, 0] == pytest.approx([1, 0], abs=1e-5)
    assert np.array_equal(base_weights.effects(3)["x"], effects)
    assert (found.left, found.right, found.both) == pytest.approx((1, 1, 1), abs=1e-5)


def test_tables_added_to_an_analysis_are_all_known_and_may_be_replaced(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {})
    analysis = AnalysisFolder(tmp_path)
    for name, value in (("x", 1), ("y", 2), ("x", 3)):
        analysis.add_table(name, pd.DataFrame({"value": [value]}))
    assert set(read_json(tmp_path / "manifest.json")["tables"]) == {"x.csv", "y.csv"}
    assert [analysis.csv(name) for name in ("x", "y")] == [b"value\n3\n", b"value\n2\n"]
