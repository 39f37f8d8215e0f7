"""`analyze.py` on a real sweep: every table, what is refused, what is measured again and what is not."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from scipy.linalg import subspace_angles

from losslens.analysis import base_weights, behaviour, forward_passes, greedy_answers, pipeline, weight_space
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort
from losslens.analysis.pairs import choose, find
from losslens.analysis.pipeline import Analysis, analyse
from losslens.config.analysis import AnalyzeConfig
from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json
from losslens.core.hashing import hash_file, hash_json
from losslens.measures import weight_measures
from losslens.measures.forward import observe
from losslens.models.loading import LoadedModel, preserved
from losslens.models.tokens import encode_completion, encode_prompt
from losslens.rollouts.frozen import load_rollouts
from losslens.runs.integrity import record_outcomes
from losslens.runs.run import Run, runs_of
from losslens.updates.folder import open_adapter
from tests.conftest import METHODS, ROOT, cold, command, script

# Few passes: three points, few sequences.
QUICK = [
    "probe_set.problems=12", "connectivity.points=3", "connectivity.midpoint_problems=5", "cka.minibatch=5",
    "rotated_copies=1",
]  # fmt: skip
CONTRACT = {
    "runs": "run method lr rank model seed init_seed norm effective_rank stable_rank benchmark accuracy n "
    "ci_low ci_high",
    "pairs": "run_a run_b cosine u1 v1 angle_min_left angle_max_left angle_min_right angle_max_right orthogonal_share "
    "barrier_chord barrier_mean cka_last cka_min mcnemar_b mcnemar_c mcnemar_p mcnemar_midp "
    "accuracy_diff diff_low diff_high arm_a arm_b pairing cosine_ceiling angle_min_left_repeat cosine_null",
    "arm_pairs": "arm_a arm_b pairing pairs repeats repeat_kind cosine cosine_null cosine_ceiling cosine_relative "
    "cosine_low cosine_high cosine_verdict barrier_chord_repeat accuracy_diff p p_holm detectable_diff "
    "accuracy_verdict",
    "layers": "run_a run_b layer cosine orthogonal_share angle_min_left",
    "connectivity": "run_a run_b alpha loss loss_low loss_high",
    "cka": "run_a run_b layer cka_unbiased n",
    "shifts": "run_a run_b position layer shift_cosine_null shift_cosine",
    "training": "run step loss grad_norm lr",
    "mds": "run x y",
}


def settings(output_dir: Path, *overrides: str, **values: Any) -> AnalyzeConfig:
    """The configuration that `analyze.py` would compose."""
    config = OmegaConf.load(ROOT / "conf" / "analyze.yaml")
    del config["defaults"], config["hydra"]
    config["logger"] = OmegaConf.load(ROOT / "conf" / "logger" / "none.yaml")
    given = OmegaConf.from_dotlist([*QUICK, *overrides])
    plain: Any = OmegaConf.to_container(OmegaConf.merge(config, given))
    return AnalyzeConfig.model_validate({**plain, "output_dir": output_dir, **values})


def of(output_dir: Path, method: str, sweep: str = "main") -> Run:
    [run] = [run for run in runs_of(output_dir, sweep) if run.name.startswith(f"{method}-")]
    return run


def _with_a_row_twice(file: Path) -> bytes:
    table = pq.read_table(file)
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]).replace_schema_metadata(table.schema.metadata), sink)
    return sink.getvalue()


@contextmanager
def edited(file: Path, **changes: Any) -> Iterator[None]:
    """A JSON file with other values in it, for a while."""
    before = file.read_bytes()
    try:
        write_json(file, {**read_json(file), **changes})
        yield
    finally:
        file.write_bytes(before)


@pytest.fixture(scope="module")
def analysis(sweep: Path) -> Analysis:
    """Of the six methods."""
    return analyse(settings(sweep))


def test_gradients_before_step_1_are_in_every_table(sweep: Path, analysis: Analysis, tmp_path: Path) -> None:
    """With each run's update in place of its gradient, whose cosines and nulls are then those of the updates."""

    def find(_: AnalyzeConfig, cohort: Cohort) -> dict[str, Path]:
        folders = {member.name: tmp_path / member.name for member in cohort.members}
        for member in cohort.members:
            folders[member.name].mkdir()
            for part in ("whole", "half"):
                (folders[member.name] / part).symlink_to(member.adapter)
        return folders

    found = analyse(settings(sweep, "pairs=none", "initial_gradients=true"), None, find).tables
    for table in (found.pairs, found.layers, found.modules, found.arm_pairs.query("arm_b != 'base'")):
        assert len(table)
        for end in ("", "_null"):
            assert table[f"gradient_cosine{end}"].to_numpy() == pytest.approx(table[f"cosine{end}"].to_numpy())
    trained = found.runs[found.runs["method"] != "base"]
    assert trained["first_step"].to_numpy() == pytest.approx(1)
    assert analysis.tables.pairs["gradient_cosine"].isna().all()  # unless asked for
    assert analysis.tables.runs["first_step"].isna().all()


class TestTables:
    @pytest.mark.parametrize("name", CONTRACT)
    def test_the_contracts_columns(self, name: str, analysis: Analysis) -> None:
        table = getattr(analysis.tables, name)
        assert set(CONTRACT[name].split()) <= set(table.columns)
        assert not table[CONTRACT[name].split()[-1]].isna().all()

    def test_sizes_and_cosines_are_the_dense_ones(self, sweep: Path, analysis: Analysis) -> None:
        """Flattened; accuracies are those of the stored outcomes."""
        runs, pairs = analysis.tables.runs, analysis.tables.pairs
        assert len(runs) == 7
        assert len(pairs) == 15
        dense = {}
        for run in runs_of(sweep, "main"):
            row = runs[runs["run"] == run.name].iloc[0]
            outcomes = pd.read_parquet(run.evaluation("arithmetic"))
            assert row["accuracy"] == outcomes["correct"].mean()
            assert row["ci_low"] < row["accuracy"] + 1e-9
            assert row["n"] == 40
            if row["method"] == "base":
                assert np.isnan(row["norm"])
                assert pd.isna(row["base_diff"])
                continue
            weights = {k: v.astype(np.float64) for k, v in load_file(run.adapter / "adapter_model.safetensors").items()}
            names = sorted(name for name in weights if "lora_A" in name)
            deltas = [2 * weights[name.replace("lora_A", "lora_B")] @ weights[name] for name in names]
            dense[run.name] = np.concatenate([delta.ravel() for delta in deltas])
            assert row["norm"] == pytest.approx(np.linalg.norm(dense[run.name]), rel=1e-10)
            values = [np.linalg.svd(delta, compute_uv=False)[:8] for delta in deltas]
            entropy = [-np.sum(v / v.sum() * np.log(v / v.sum())) for v in values]
            assert row["effective_rank"] == pytest.approx(np.mean(np.exp(entropy)), rel=1e-8)
            assert row["stable_rank"] == pytest.approx(np.mean([np.sum(v**2) / v[0] ** 2 for v in values]), rel=1e-8)
        for _, pair in pairs.iterrows():
            a, b = dense[pair["run_a"]], dense[pair["run_b"]]
            assert pair["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-10)
            assert pair["orthogonal_share"] ** 2 + pair["cosine"] ** 2 == pytest.approx(1)
            assert pair["mcnemar_b"] - pair["mcnemar_c"] == pytest.approx(40 * pair["accuracy_diff"])
        arms = analysis.tables.arm_pairs.set_index(["arm_a", "arm_b"])
        named = dict(zip(runs["run"], runs["arm"], strict=True))
        for _, pair in pairs.iterrows():  # of one run each: the arms' test is McNemar's of their runs
            row = arms.loc[tuple(sorted((named[pair["run_a"]], named[pair["run_b"]])))]
            assert (row["cosine"], row["p"]) == (pair["cosine"], pytest.approx(pair["mcnemar_p"]))
            assert (row["pairing"], row["cosine_verdict"]) == ("same seeds", "too few seeds")
        said = {"better", "worse", "equivalent", "cannot say"}
        assert set(arms["accuracy_verdict"].dropna()) <= said
        assert len(arms["p_holm"].dropna()) == 15 + 6  # of every two, and of each and the base, in one family

    def test_layers_and_modules(self, sweep: Path, analysis: Analysis) -> None:
        layers, modules = analysis.tables.layers, analysis.tables.modules
        assert len(layers) == 15 * 5
        assert len(modules) == 15 * 20
        row = modules.iloc[0]
        weights = [
            load_file(sweep / "main" / row[run] / "adapter" / "adapter_model.safetensors") for run in ("run_a", "run_b")
        ]
        key = f"base_model.model.{row['module']}.lora_"
        deltas = [w[f"{key}B.weight"].astype(np.float64) @ w[f"{key}A.weight"] for w in weights]
        left = [np.linalg.svd(delta)[0][:, :8] for delta in deltas]
        assert np.allclose(row["angles_left"][:8], np.degrees(subspace_angles(*left)[::-1]), atol=1e-6)
        size = np.linalg.norm(deltas[0]) * np.linalg.norm(deltas[1])
        assert row["cosine"] == pytest.approx(np.sum(deltas[0] * deltas[1]) / size, abs=1e-10)

    def test_against_base_and_initial_adapter(self, sweep: Path, analysis: Analysis, base: LoadedModel) -> None:
        """‖W0‖ of the loaded base; the drift of A against the initial adapter, densely, in one module."""
        run = of(sweep, "sft")
        rows = analysis.tables.run_modules
        row = rows[rows["run"] == run.name].iloc[7]
        weight = base.model.get_submodule(row["module"]).weight.detach().double().numpy()
        assert row["relative_norm"] == pytest.approx(row["norm"] / np.linalg.norm(weight))
        key = f"base_model.model.{row['module']}.lora_A.weight"
        start = sweep / "init" / run.manifest["initial_adapter"]["folder"]
        a, a0 = (load_file(f / "adapter_model.safetensors")[key].astype(float).T for f in (run.adapter, start))
        assert np.allclose(row["drift"], np.degrees(subspace_angles(a, a0)[::-1]), atol=1e-6)
        assert row["drift_max"] == row["drift"][-1]
        whole = analysis.tables.runs.set_index("run").loc[run.name]
        norms = [np.linalg.norm(base.model.get_submodule(m).weight.detach().double()) for m in analysis.cohort.modules]
        assert whole["relative_norm"] == pytest.approx(whole["norm"] / np.linalg.norm(norms))
        own = rows[rows["run"] == run.name]
        for side in ("principal_left", "principal_right"):
            expected = np.sum(own[side] * own["norm"] ** 2) / np.sum(own["norm"] ** 2)
            assert whole[side] == pytest.approx(expected)
            assert 0 < whole[f"{side}_null"] < 1
        u = np.linalg.svd(weight)[0][:, :10]
        b = load_file(run.adapter / "adapter_model.safetensors")[key.replace("lora_A", "lora_B")].astype(float)
        inside, full = np.linalg.norm(u.T @ b @ a.T), np.linalg.norm(b @ a.T)
        assert row["principal_left"] == pytest.approx((inside / full) ** 2, abs=1e-5)

    def test_connectivity_is_the_loss_of_the_models(self, sweep: Path, analysis: Analysis, base: LoadedModel) -> None:
        """The endpoints' losses from PEFT's own models on the frozen completions that the manifest names."""
        facts = analysis.facts["probe_set"]
        frozen = load_rollouts(sweep / "rollouts" / facts["folder"])
        assert frozen.sha256 == facts["sha256"]
        right = frozen.table[frozen.table["reward"] > 0]
        assert len(right) == facts["sequences"] >= 4
        training = load_rollouts(sweep / "rollouts" / of(sweep, "sft").manifest["rollouts"]["folder"])
        assert not set(training.table["problem_id"]) & set(right["problem_id"])
        curves = analysis.tables.connectivity
        assert len(curves) == 15 * 3
        for method in ("sft", "dpo"):
            run = of(sweep, method)
            nll = tokens = 0
            with preserved(base.model), torch.no_grad():
                model = PeftModel.from_pretrained(base.model, run.adapter).eval()
                for row in right.itertuples():
                    prompt = encode_prompt(base.tokenizer, row.prompt)
                    completion = encode_completion(base.tokenizer, row.completion, row.finished)
                    scores = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
                    nll -= sum(float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(completion))
                    tokens += len(completion)
            first = curves[(curves["run_a"] == run.name) & (curves["alpha"] == 0)]["loss"]
            last = curves[(curves["run_b"] == run.name) & (curves["alpha"] == 1)]["loss"]
            assert np.allclose([*first, *last], nll / tokens, rtol=1e-5)
        pairs = analysis.tables.pairs.set_index(["run_a", "run_b"])
        for names, curve in curves.groupby(["run_a", "run_b"]):
            start, middle, end = curve["loss"]
            assert pairs.loc[names, "barrier_chord"] == pytest.approx(max(0, middle - (start + end) / 2))
            assert pairs.loc[names, "barrier_mean"] == pytest.approx(max(start, middle, end) - (start + end) / 2)
        assert (pairs["accuracy_mid_n"] == 5).all()
        assert pairs["accuracy_mid"].between(0, 1).all()

    def test_cka_of_every_hidden_state(self, analysis: Analysis) -> None:
        table = analysis.tables.cka
        assert len(table) == (15 + 6) * 6  # pairs, and runs against the base; embeddings and five layers
        assert (table["n"] == analysis.facts["probe_set"]["sequences"]).all()
        assert table[table["layer"] == -1]["cka_unbiased"].tolist() == pytest.approx([1] * 21)
        assert table["cka_unbiased"].between(0.5, 1 + 1e-9).all()
        pairs = analysis.tables.pairs.set_index(["run_a", "run_b"])
        for names, values in table.groupby(["run_a", "run_b"]):
            if names in pairs.index:
                assert pairs.loc[names, "cka_last"] == values["cka_unbiased"].iloc[-1]
                assert pairs.loc[names, "cka_min"] == values["cka_unbiased"].min()

    def test_repeats_stand_beside_the_values(self, sweep: Path) -> None:
        """SFT at another order shares A, at another `init_seed` it does not; other losses have no other seed."""
        script(*command(sweep, "-m", "seed=42,1", "init_seed=42,1", "sweep=seeds", "logger=none"))
        found = analyse(settings(sweep, "pairs=none", sweep=["main", "seeds"]))
        tables = found.tables
        [twice] = [name for name, why in found.left_out.items() if "the same run as main/sft" in why]
        assert twice.startswith("seeds/sft")
        assert len(tables.pairs) == 9 * 8 / 2
        repeats = tables.repeats.set_index("repeat_kind")
        assert repeats["pairs"].to_dict() == {"order": 2, "start": 2, "order and start": 2}
        assert repeats.loc["order", "cosine"] > repeats.loc["start", "cosine"]
        assert tables.repeats["cka_last"].isna().all()  # pairs=none
        pairs = tables.pairs
        sft = (pairs["arm_a"] == "sft-conventional") & (pairs["arm_b"] == "sft-conventional")
        assert pairs[sft]["pairing"].value_counts().to_dict() == {"same init": 2, "same order": 2, "other": 2}
        rift = pairs[(pairs["arm_a"] == "rift-conventional") & (pairs["arm_b"] == "sft-conventional")]
        assert sorted(rift["pairing"]) == ["other", "same init", "same order", "same seeds"]
        assert pairs["cosine_ceiling"].isna().all()  # RIFT has no repeat
        row = tables.arm_pairs.set_index(["arm_a", "arm_b"]).loc[("rift-conventional", "sft-conventional")]
        assert row["pairing"] == "same init"
        assert row["cosine"] == rift.set_index("pairing").loc["same init", "cosine"]
        assert row["cosine_verdict"] == "too few seeds"
        own = tables.arm_pairs.set_index(["arm_a", "arm_b"]).loc[("sft-conventional", "sft-conventional")]
        assert own["cosine"] == pytest.approx(repeats.loc["order", "cosine"])
        assert tables.arms.set_index("arm").loc["sft-conventional", "cosine_repeat"] == own["cosine"]
        nulls = [f"{m.name}_null" for m in weight_measures() if m.has_null and not m.name.startswith("gradient_")]
        assert not pairs[nulls].isna().any().any()
        assert pairs["angle_min_left_null"].between(45, 90).all()
        # With a shared A of rank 8 all top-8 right subspaces are the same one, whatever the loss.
        one_a = pairs["pairing"].isin(["same seeds", "same init"])
        assert (pairs.loc[one_a, "angle_min_right_null"] < 1e-3).all()
        assert pairs.loc[~one_a, "angle_min_right_null"].between(45, 90).all()
        shared, apart = (pairs[sft & kind]["cosine_null"] for kind in (one_a, ~one_a))
        assert shared.min() > 2 * apart.max()
        modules = tables.modules[~tables.modules["run_b"].isin(pairs[one_a]["run_b"])]
        bound = modules[modules["module"] == "model.layers.0.self_attn.k_proj"]["cosine_null"]
        assert np.allclose(bound, 1.96 / np.sqrt(64 * 128), rtol=1e-4)
        assert tables.seeds["seeds"].tolist() == [4]
        assert tables.seeds["accuracy_min"][0] <= tables.seeds["accuracy_mean"][0] <= tables.seeds["accuracy_max"][0]
        ours = tables.runs[tables.runs["method"] == "sft"]
        assert tables.seeds["accuracy_std"][0] == pytest.approx(np.std(ours["accuracy"], ddof=1))
        # The reference is the SFT run that starts as the others do.
        assert found.facts["reference"] == f"main/{of(sweep, 'sft').name}"


def counting(function: Any, seen: list) -> Any:
    """The function, which notes each of its calls."""
    return lambda *arguments, **options: (seen.append(1), function(*arguments, **options))[1]


class TestNothingTwice:
    def test_one_more_run_is_all_that_is_measured(self, sweep: Path, analysis: Analysis, monkeypatch: Any) -> None:
        """A seventh run: one run and six pairs in factor space, its own passes, six lines; then nothing at all."""
        seen: dict[str, list] = {"compare": [], "passes": [], "probe set": [], "off task and copies": []}
        compare, losses = weight_space.compare, forward_passes.ForwardPasses._losses
        modules = [(forward_passes, "probe set"), (behaviour, "off task and copies")]

        def count_compare(adapters: Any, modules: Any, **options: Any) -> Any:
            seen["compare"].append((len(adapters), options["fresh"]))
            return compare(adapters, modules, **options)

        def count_losses(self: Any, names: Any, weights: Any, *rest: Any) -> Any:
            seen["passes"].append((len(names), len(weights)))
            return losses(self, names, weights, *rest)

        monkeypatch.setattr(weight_space, "compare", count_compare)
        monkeypatch.setattr(forward_passes.ForwardPasses, "_losses", count_losses)
        for module, what in modules:
            monkeypatch.setattr(module, "observe", counting(observe, seen[what]))
        again = analyse(settings(sweep))
        assert not any(seen.values())
        for name in ("pairs", "connectivity", "cka", "runs"):
            pd.testing.assert_frame_equal(getattr(again.tables, name), getattr(analysis.tables, name))
        other = sweep / "other_adapter"
        shutil.copytree(of(sweep, "sft").adapter, other, dirs_exist_ok=True)
        weights = load_torch(other / "adapter_model.safetensors")
        save_file({k: 0.5 * v if "lora_B" in k else v for k, v in weights.items()}, other / "adapter_model.safetensors")
        config = settings(sweep, adapters={"half": other}, pairs="all")
        more = analyse(config)
        assert seen["compare"] == [(7, 1)]
        assert seen["passes"] == [(2, 1)] * 6
        # One pass over the probe set for CKA, loss, outputs and activations, and one over the off-task text. Of the
        # copy two over the probe set, at the update's norm and at its KL, and one over the off-task text.
        assert len(seen["probe set"]) == 1
        assert len(seen["off task and copies"]) == 1 + 3
        pair = more.tables.pairs[more.tables.pairs["run_a"] == of(sweep, "sft").name]
        assert pair["run_b"].tolist() == ["half"]
        assert pair["cosine"].tolist() == pytest.approx([1], abs=1e-12)
        row = more.tables.runs.set_index("run").loc["half"]
        assert row["norm"] == pytest.approx(0.5 * more.tables.runs.set_index("run").loc[of(sweep, "sft").name, "norm"])
        assert pd.isna(row["accuracy"])
        assert pair["mcnemar_p"].isna().all()
        # The other pairs are what they were.
        old = more.tables.pairs[more.tables.pairs["run_b"] != "half"].reset_index(drop=True)
        for column in ("cosine", "angle_min_left", "barrier_chord", "cka_last", "mcnemar_p"):
            assert np.allclose(old[column], analysis.tables.pairs[column], rtol=1e-12)
        shutil.rmtree(other)

    @pytest.mark.parametrize(
        ("override", "again"),
        [
            ("num_directions=3", {"compare"}),
            ("spectrum_copies=2", {"against_copies"}),
            ("cka.pooling=last", {"similarities"}),
            ("cka.minibatch=4", {"similarities"}),
            ("connectivity.points=5", {"losses"}),
            ("connectivity.loss=answer", {"losses"}),
            ("connectivity.midpoint_problems=4", {"midpoints"}),
            ("connectivity.resamples=200", set()),
            ("probe_set.problems=11", {"losses", "similarities"}),
        ],
    )
    def test_what_a_setting_decides_is_measured_again(
        self, override: str, again: set[str], sweep: Path, analysis: Analysis, monkeypatch: Any
    ) -> None:
        """The first time, and not the second."""
        seen: list[str] = []

        def counted(name: str, function: Any) -> Any:
            return lambda *arguments, **options: (seen.append(name), function(*arguments, **options))[1]

        monkeypatch.setattr(weight_space, "compare", counted("compare", weight_space.compare))
        monkeypatch.setattr(base_weights, "against_copies", counted("against_copies", base_weights.against_copies))
        monkeypatch.setattr(forward_passes, "sequence_losses", counted("losses", forward_passes.sequence_losses))
        monkeypatch.setattr(forward_passes, "similarities", counted("similarities", forward_passes.similarities))
        monkeypatch.setattr(greedy_answers, "evaluate", counted("midpoints", greedy_answers.evaluate))
        config = settings(sweep, override, pairs=[["sft", "dpo"]])
        shutil.rmtree(sweep / "cache.before", ignore_errors=True)
        shutil.copytree(sweep / "cache", sweep / "cache.before")
        try:
            found = analyse(config)
            assert set(seen) == again
            seen.clear()
            pd.testing.assert_frame_equal(analyse(config).tables.pairs, found.tables.pairs)
            assert not seen
        finally:
            shutil.rmtree(sweep / "cache")
            (sweep / "cache.before").rename(sweep / "cache")
        if override == "cka.pooling=last":
            # The last token is the same in every sequence: its embeddings have no similarity, the layers do.
            embeddings = found.tables.cka[found.tables.cka["layer"] == -1]
            assert embeddings["cka_unbiased"].isna().all()
            assert found.tables.pairs["cka_min"].notna().sum() == 1

    def test_a_line_is_the_same_from_either_end(self, sweep: Path, tmp_path: Path, monkeypatch: Any) -> None:
        """With the names exchanged nothing is measured, and the curve is the reverse."""
        [frozen] = list((sweep / "rollouts").glob("arithmetic-heldout-*"))[:1]
        base = of(sweep, "sft").manifest["config"]["model"]["path"]
        sft, dpo = of(sweep, "sft").adapter, of(sweep, "dpo").adapter
        overrides = [f"probe_set.completions={frozen}", "connectivity.points=5"]
        first = analyse(settings(tmp_path, *overrides, sweep=None, adapters={"a": sft, "b": dpo}, model_path=base))
        monkeypatch.setattr(forward_passes, "sequence_losses", None)
        second = analyse(settings(tmp_path, *overrides, sweep=None, adapters={"a": dpo, "b": sft}, model_path=base))
        forward, backward = first.tables.connectivity["loss"], second.tables.connectivity["loss"]
        assert forward.tolist() == backward.tolist()[::-1]
        assert forward[0] != forward[4]
        assert first.tables.pairs["barrier_mean"][0] == pytest.approx(second.tables.pairs["barrier_mean"][0])
        # The base stands under its own name, and no adapter may take it.
        assert set(first.tables.cka["run_b"]) == {"b", "base"}
        with pytest.raises(InputError, match=r"adapters\.base: the name is already taken by a run or the base"):
            analyse(settings(tmp_path, sweep=None, adapters={"base": sft}))

    def test_the_midpoint_is_half_of_each(
        self, sweep: Path, base: LoadedModel, tmp_path: Path, monkeypatch: Any
    ) -> None:
        """The model that answers at ½ has the logits of the base with ½ΔW_a + ½ΔW_b; the base chooses the outliers."""
        ids, logits, outliers = torch.arange(5, 25)[None], [], []
        evaluate, similar = greedy_answers.evaluate, forward_passes.similarities

        def watched(model: Any, *arguments: Any, **options: Any) -> Any:
            with torch.no_grad():
                logits.append(model(ids).logits)
            return evaluate(model, *arguments, **options)

        def noted(features: Any, chosen: Any) -> Any:
            outliers.append(chosen)
            return similar(features, chosen)

        monkeypatch.setattr(greedy_answers, "evaluate", watched)
        monkeypatch.setattr(forward_passes, "similarities", noted)
        monkeypatch.setattr(pipeline, "Cache", lambda folder: Cache(tmp_path))
        found = analyse(settings(sweep, pairs=[["sft", "dpo"]]))
        assert outliers[0] is None
        table = found.tables.cka.drop_duplicates("layer")
        for chosen in outliers[1:]:
            assert chosen.tolist() == table["outlier_dimension"].tolist()
        weights = [load_torch(of(sweep, m).adapter / "adapter_model.safetensors") for m in ("sft", "dpo")]
        with preserved(base.model), torch.no_grad():
            before = {}
            for module in found.cohort.modules:
                weight = base.model.get_submodule(module).weight
                before[module] = weight.clone()
                for w in weights:
                    key = f"base_model.model.{module}.lora_"
                    weight += 0.5 * 2 * w[f"{key}B.weight"] @ w[f"{key}A.weight"]
            expected = base.model(ids).logits
            for module, weight in before.items():
                base.model.get_submodule(module).weight.copy_(weight)
        assert torch.allclose(logits[0], expected, atol=1e-5)

    def test_copies_answer_at_the_runs_kl(
        self, sweep: Path, base: LoadedModel, tmp_path: Path, monkeypatch: Any
    ) -> None:
        """A copy is the base with factor·ΔW' of the rotated update ΔW'; each answers once, for the null of flips."""
        ids, logits, made = torch.arange(5, 25)[None], [], []
        evaluate, copy = greedy_answers.evaluate, behaviour.BehaviourPasses._copy

        def watched(model: Any, *arguments: Any, **options: Any) -> Any:
            with torch.no_grad():
                logits.append(model(ids).logits)
            return evaluate(model, *arguments, **options)

        def noted(self: Any, name: str, draw: int) -> Any:
            made.append((name, draw, copy(self, name, draw)))
            return made[-1][-1]

        monkeypatch.setattr(greedy_answers, "evaluate", watched)
        monkeypatch.setattr(behaviour.BehaviourPasses, "_copy", noted)
        monkeypatch.setattr(behaviour, "_KL_TOLERANCE", 1e-9)  # so that what is further off is told
        monkeypatch.setattr(pipeline, "Cache", lambda folder: Cache(tmp_path))
        overrides = ["rotated_copies=2", "answer_copies=2", "connectivity.midpoint_problems=0"]
        config = settings(sweep, *overrides, pairs=[["sft", "dpo"]])
        found = analyse(config)
        assert len(logits) == len(made) == 4
        pairs = found.tables.pairs
        [measured] = pairs.index[pairs["output_cosine"].notna()]
        assert pairs.index[pairs["kappa_null"].notna()].tolist() == [measured]
        # Undefined where a copy changes no answer, which is so of few problems on some processors.
        assert set(pairs.index[pairs["flips_null"].notna()]) <= {measured}
        name, draw, arrays = made[0]
        share = float(arrays["scaled_kl"]) / found.tables.runs.set_index("run").loc[name, "kl"]
        assert 0 < abs(share - 1) < 0.01
        said = found.left_out[f"equal KL of the copies of {name}"]
        assert said == "a copy has 1 times the run's KL"
        run = next(run for run in runs_of(sweep, "main") if run.name == name)
        rng = np.random.default_rng([int(found.cohort.by_name[name].sha256[:16], 16), draw])
        with preserved(base.model), torch.no_grad(), open_adapter(run.adapter) as adapter:
            rotated = {module: adapter[module].left_rotated(rng).dense() for module in found.cohort.modules}
            before = {module: base.model.get_submodule(module).weight.clone() for module in rotated}
            for module, update in rotated.items():
                base.model.get_submodule(module).weight += torch.tensor(float(arrays["factor"]) * update).float()
            expected = base.model(ids).logits
            for module, weight in before.items():
                base.model.get_submodule(module).weight.copy_(weight)
        assert torch.allclose(logits[0], expected, atol=1e-4)
        pd.testing.assert_frame_equal(analyse(config).tables.pairs, pairs)
        assert len(logits) == 4

    def test_a_damaged_cache_is_measured_again(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        assert cache.load("kind", [1], ["x"]) is None
        cache.save("kind", [1], {"x": np.arange(3.0)})
        assert cache.load("kind", [1], ["x"])["x"].tolist() == [0, 1, 2]  # type: ignore[index]
        assert cache.load("kind", [1], ["x", "y"]) is None
        assert cache.load("kind", [2], ["x"]) is None
        assert cache.load("other", [1], ["x"]) is None
        [file] = tmp_path.rglob("*.npz")
        content = file.read_bytes()
        for damaged in (content[:100], b"", content.replace(b"\x00\x00\xf0\x3f", b"\x00\x00\xf1\x3f")):
            file.write_bytes(damaged)
            assert cache.load("kind", [1], ["x"]) is None
        np.savez(file, x=np.array([{}], dtype=object))
        assert cache.load("kind", [1], ["x"]) is None  # nothing is unpickled


class TestChoosingPairs:
    NAMES = ("dpo-1", "grpo-1", "rft-1", "sft-1", "sft-2")

    def test_all_up_to_eight(self) -> None:
        assert len(choose(self.NAMES, None, "sft-1").pairs) == 10
        nine = [f"run{n}" for n in range(9)]
        chosen = choose(nine, None, "run3")
        assert len(chosen.pairs) == 8
        assert all("run3" in pair for pair in chosen.pairs)
        assert "pairs=all measures all 36" in chosen.left_out
        assert len(choose(nine, "all", "run3").pairs) == 36

    def test_reference_none_and_lists(self) -> None:
        assert choose(self.NAMES, "reference", "rft-1").pairs == [
            ("dpo-1", "rft-1"), ("grpo-1", "rft-1"), ("rft-1", "sft-1"), ("rft-1", "sft-2"),
        ]  # fmt: skip
        assert choose(self.NAMES, "none", "rft-1").pairs == []
        chosen = choose(self.NAMES, [["sft-2", "dpo"], ["grpo", "rft"]], "rft-1")
        assert chosen.pairs == [("dpo-1", "sft-2"), ("grpo-1", "rft-1")]
        assert chosen.left_out

    def test_names_that_mean_no_run_or_several(self) -> None:
        with pytest.raises(InputError, match="pairs: sft is ambiguous: sft-1, sft-2"):
            choose(self.NAMES, [["sft", "dpo"]], "rft-1")
        with pytest.raises(InputError, match="reference: ppo matches none of dpo-1"):
            find("reference", "ppo", self.NAMES)
        with pytest.raises(InputError, match="pairs: dpo-1 is paired with itself"):
            choose(self.NAMES, [["dpo", "dpo-1"]], "rft-1")
        assert find("pairs", "sft", ["a/rft-1", "a/sft-1"]) == "a/sft-1"

    def test_the_family_of_holm(self, sweep: Path, analysis: Analysis) -> None:
        few = analyse(settings(sweep, "holm_family=reference", "pairs=none"))
        corrected = few.tables.arm_pairs[few.tables.arm_pairs["p_holm"].notna()]
        assert len(corrected) == 6 + 5
        either = corrected[["arm_a", "arm_b"]].isin(["sft-conventional", "base"]).any(axis=1)
        assert either.all()
        assert few.facts["holm_family"] == {"pairs": "reference", "tests": 11}
        assert analysis.facts["holm_family"] == {"pairs": "all", "tests": 21}
        assert few.tables.pairs["cka_last"].isna().all()
        assert "pairs=none" in few.left_out.values()


class TestRefused:
    def test_runs_that_are_not_completed_are_left_out_and_said(self, sweep: Path) -> None:
        sft = of(sweep, "sft")
        with edited(sft.folder / "status.json", state="failed"):
            analysis = analyse(settings(sweep, "pairs=none"))
        assert analysis.left_out[sft.name] == "failed, not completed"
        assert sft.name not in set(analysis.tables.runs["run"])
        assert len(analysis.tables.pairs) == 10

    def test_a_completed_run_without_its_adapter(self, sweep: Path) -> None:
        run = of(sweep, "rft")
        run.adapter.rename(run.folder / "away")
        try:
            with pytest.raises(InputError, match=f"{run.name}: no finished adapter"):
                analyse(settings(sweep))
        finally:
            (run.folder / "away").rename(run.adapter)

    def test_an_adapter_that_was_changed(self, sweep: Path) -> None:
        run = of(sweep, "sft")
        with edited(run.adapter / "adapter_config.json", lora_alpha=32):
            for name, *arguments in (
                ["analyze.py", f"output_dir={sweep}"],
                [
                    "evaluate.py",
                    "benchmark=arithmetic_long",
                    "benchmark.arithmetic_long.eval_size=20",
                    f"output_dir={sweep}",
                ],
                command(sweep, "method=sft"),
            ):
                outcome = script(name, *arguments, check=2)
                assert "the adapter has changed since training" in outcome.stderr
                assert run.name in outcome.stderr
        with (
            edited(run.folder / "status.json", adapter_sha256="0"),
            pytest.raises(InputError, match=f"{run.name}/status.json: the adapter_sha256 in status.json"),
        ):
            analyse(settings(sweep))

    def test_runs_of_another_base_or_rollouts(self, sweep: Path) -> None:
        script(*command(sweep, "data.seed=1", "sweep=other", "logger=none"))
        with pytest.raises(InputError, match="different rollouts than"):
            analyse(settings(sweep, sweep=["main", "other"]))
        # A run of another base has another identity, and another name.
        run, base = of(sweep, "rft"), {"sha256": "0"}
        identity = {**run.manifest["identity"], "base": base}
        other = run.folder.with_name(f"{run.name.rpartition('-')[0]}-{hash_json(identity, 8)}")
        shutil.copytree(run.folder, other)
        with (
            edited(other / "manifest.json", base=base, identity=identity, run=other.name),
            pytest.raises(InputError, match=f"{other.name}: different base than"),
        ):
            analyse(settings(sweep))
        shutil.rmtree(other)

    def test_runs_scored_on_other_problems(self, sweep: Path) -> None:
        """Scores that do not compare are not compared; the weights are."""
        script(*command(sweep, "method=rft", "seed=5", "data.eval_size=20", "sweep=fewer", "logger=none"))
        both = analyse(settings(sweep, "pairs=none", sweep=["main", "fewer"]))
        assert both.left_out["accuracy of pairs"].startswith("there is no benchmark on which all runs were scored")
        assert both.tables.pairs["accuracy_diff"].isna().all()
        assert both.tables.pairs["cosine"].notna().all()
        runs = both.tables.runs.set_index("run")["benchmark"]
        assert set(runs[runs.index.str.startswith("main/")]) <= {"arithmetic", "arithmetic_long"}
        assert runs[runs.index.str.startswith("fewer/")].str.fullmatch("arithmetic-[0-9a-f]{8}").all()
        with pytest.raises(InputError, match="not scored on no_such"):
            analyse(settings(sweep, "primary_benchmark=no_such"))

    def test_damaged_files(self, sweep: Path) -> None:
        """Outcomes of another adapter, outcomes cut short, a manifest without what is needed: each in one line."""
        sft, dpo = of(sweep, "sft"), of(sweep, "dpo")
        for file, content, message in (
            (sft.evaluation("arithmetic"), dpo.evaluation("arithmetic").read_bytes(), "not the answers of sft"),
            (sft.evaluation("arithmetic"), b"PAR1", "not a readable parquet file"),
            (sft.evaluation("arithmetic"), _with_a_row_twice(sft.evaluation("arithmetic")), "same sample .* twice"),
            (sft.folder / "manifest.json", b"[]", r"manifest\.json: not a JSON object"),
        ):
            before, manifest = file.read_bytes(), (sft.folder / "manifest.json").read_bytes()
            try:
                file.write_bytes(content)
                if file.suffix == ".parquet":  # by its hash it would be refused as it is
                    record_outcomes(sft.folder, file)
                with pytest.raises(InputError, match=message):
                    analyse(settings(sweep, "pairs=none"))
            finally:
                (sft.folder / "manifest.json").write_bytes(manifest)
                file.write_bytes(before)
        nameless = {**sft.manifest["config"], "data": {}}
        with (
            edited(sft.folder / "manifest.json", config=nameless),
            pytest.raises(InputError, match=r"manifest.json: config.data.name: Field required"),
        ):
            analyse(settings(sweep))
        manifest = {k: v for k, v in sft.manifest.items() if k != "rollouts"}
        before = (sft.folder / "manifest.json").read_bytes()
        try:
            write_json(sft.folder / "manifest.json", manifest)
            with pytest.raises(InputError, match=r"manifest.json: rollouts: Field required"):
                analyse(settings(sweep))
        finally:
            (sft.folder / "manifest.json").write_bytes(before)

    def test_what_is_left_out_is_said(self, sweep: Path, tmp_path: Path) -> None:
        """A run without a status, and an initial adapter that is gone."""
        copy = tmp_path / "outputs"
        shutil.copytree(sweep / "main", copy / "main")
        [rft] = copy.glob("main/rft-*")
        (rft / "status.json").unlink()
        shutil.rmtree(next(copy.glob("main/base-*")))
        found = analyse(settings(copy, "pairs=none"))
        assert found.left_out[rft.name] == "no status.json"
        assert found.left_out["comparison with the base on arithmetic"] == "the base was not scored on it"
        assert found.tables.runs["base_diff"].isna().all()
        assert sum(name.startswith("drift of A in ") for name in found.left_out) == 5
        assert found.tables.runs["drift_max"].isna().all()

    def test_completions_that_were_trained_on(self, sweep: Path) -> None:
        folder = sweep / "rollouts" / of(sweep, "sft").manifest["rollouts"]["folder"]
        with pytest.raises(InputError, match=r"probe_set\.completions=.*: the runs were trained on 60 of its problems"):
            analyse(settings(sweep, f"probe_set.completions={folder}"))
        with pytest.raises(InputError, match=r"probe_set\.completions=/nowhere: no such folder"):
            analyse(settings(sweep, "probe_set.completions=/nowhere"))

    def test_other_target_modules(self, sweep: Path) -> None:
        script(*command(sweep, "model.target_modules=[q_proj]", "sweep=targets", "logger=none"))
        with pytest.raises(InputError, match="adapts different modules than"):
            analyse(settings(sweep, sweep=["main", "targets"]))

    def test_adapters_made_elsewhere(self, sweep: Path, tmp_path: Path) -> None:
        """Another shape, a value that is not finite, a name that is taken, no adapter: each in one line."""
        weights = load_torch(of(sweep, "sft").adapter / "adapter_model.safetensors")
        key = next(key for key in weights if "lora_A" in key)

        def made(name: str, **changes: torch.Tensor) -> Path:
            shutil.copytree(of(sweep, "sft").adapter, tmp_path / name)
            save_file({**weights, **changes}, tmp_path / name / "adapter_model.safetensors")
            return tmp_path / name

        wide = made("wide", **{key: torch.zeros(8, 5)})
        broken = made("broken", **{key: torch.full_like(weights[key], float("nan"))})
        taken = of(sweep, "sft").name
        for adapters, message in (
            ({"wide": wide}, r"wide: .* is 64 × 5, but 64 × 128 in dft-\S+"),
            ({"broken": broken}, f"{broken}: .* contains non-finite values"),
            ({taken: broken}, f"adapters.{taken}: the name is already taken by a run or the base"),
            ({"gone": tmp_path / "gone"}, "gone: no such folder"),
        ):
            with pytest.raises(InputError, match=message):
                analyse(settings(sweep, "pairs=none", adapters=adapters))
        with pytest.raises(InputError, match="give adapters="):
            analyse(settings(sweep, sweep=None))

    def test_an_untrained_adapter_has_no_direction(self, sweep: Path, tmp_path: Path) -> None:
        """B = 0: empty cells in the files, and no warning on the way."""
        start = sweep / "init" / of(sweep, "sft").manifest["initial_adapter"]["folder"]
        adapters = f"adapters={{untrained: {start}, sft: {of(sweep, 'sft').adapter}}}"
        outcome = script("analyze.py", "sweep=null", adapters, f"output_dir={tmp_path}")
        assert "Warning" not in outcome.stderr
        assert "give model_path=" in outcome.stdout
        folder = tmp_path / "adapters" / "analysis"
        pairs = pd.read_csv(folder / "pairs.csv")
        alone = script("analyze.py", "sweep=null", f"adapters={{untrained: {start}}}", f"output_dir={tmp_path}/alone")
        assert "Warning" not in alone.stderr
        assert len(pd.read_csv(tmp_path / "alone" / "adapters" / "analysis" / "pairs.csv")) == 0
        columns = ["cosine", "u1", "v1", "angle_min_left", "angle_max_right", "orthogonal_share"]
        assert pairs.loc[0, columns].isna().all()
        runs = pd.read_csv(folder / "runs.csv").set_index("run")
        assert runs.loc["untrained", "norm"] == 0
        assert "direction of untrained: its update is 0" in outcome.stdout
        assert runs.loc["untrained", ["effective_rank", "stable_rank"]].isna().all()
        assert runs.loc["sft", "norm"] > 0
        assert "nan" not in (folder / "pairs.csv").read_text().lower()


class TestTheBase:
    def test_a_base_that_is_gone_is_said(self, sweep: Path, tmp_path: Path) -> None:
        """The tables that need no base are written; `model_path` says where it is now, and another base is refused."""
        copy = tmp_path / "outputs"
        shutil.copytree(sweep / "main", copy / "main")
        for manifest in copy.glob("main/*/manifest.json"):
            content = read_json(manifest)
            content["config"]["model"]["path"] = str(tmp_path / "gone")
            write_json(manifest, content)
        without = analyse(settings(copy))
        assert without.tables.pairs["cosine"].notna().all()
        assert without.tables.pairs["cka_last"].isna().all()
        assert without.tables.runs["relative_norm"].isna().all()
        assert any("no such folder" in why for why in without.left_out.values())
        model = of(sweep, "sft").manifest["config"]["model"]["path"]
        found = analyse(settings(copy, "pairs=none", model_path=model))
        assert found.tables.runs.drop_duplicates("run")["relative_norm"].notna().sum() == 6
        with pytest.raises(InputError, match="not the base that the runs were trained on"):
            analyse(settings(copy, model_path=str(Path(model).parent / "teacher")))

    def test_rollouts_from_a_folder_need_completions(self, sweep: Path, tmp_path: Path) -> None:
        folder = sweep / "rollouts" / of(sweep, "sft").manifest["rollouts"]["folder"]
        copy = tmp_path / "outputs"
        shutil.copytree(sweep / "main", copy / "main")
        for manifest in copy.glob("main/*/manifest.json"):
            content = read_json(manifest)
            if "rollouts" in content:
                content["config"]["rollouts"]["path"] = str(folder)
                write_json(manifest, content)
        analysis = analyse(settings(copy))
        assert any("probe_set.completions" in why for why in analysis.left_out.values())
        assert analysis.tables.pairs["cka_last"].isna().all()
        frozen = min((sweep / "rollouts").glob("arithmetic-heldout-*"))
        given = analyse(settings(copy, f"probe_set.completions={frozen}", pairs=[["sft", "dpo"]]))
        assert given.tables.pairs["cka_last"].notna().sum() == 1

    def test_the_answer_alone(self, sweep: Path, base: LoadedModel) -> None:
        """The paper's form: the bare reference answer right after the prompt."""
        found = analyse(settings(sweep, "connectivity.loss=answer", pairs=[["sft", "dpo"]]))
        curve = found.tables.connectivity
        assert len(curve) == 3
        frozen = load_rollouts(sweep / "rollouts" / found.facts["probe_set"]["folder"])
        right = frozen.table[frozen.table["reward"] > 0]
        run = of(sweep, "dpo")
        nll = tokens = 0
        with preserved(base.model), torch.no_grad():
            model = PeftModel.from_pretrained(base.model, run.adapter).eval()
            for row in right.itertuples():
                prompt = encode_prompt(base.tokenizer, row.prompt)
                answer = base.tokenizer(row.answer, add_special_tokens=False)["input_ids"]
                scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                nll -= sum(float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
                tokens += len(answer)
        end = curve["loss"].iloc[0 if curve["run_a"].iloc[0] == run.name else -1]
        assert end == pytest.approx(nll / tokens, rel=1e-5)


def test_the_command_writes_everything(sweep: Path) -> None:
    outcome = cold("analyze.py", f"output_dir={sweep}", *QUICK)
    folder = sweep / "main" / "analysis"
    assert outcome.stdout.endswith(f"{folder / 'report.html'}\n")
    assert {file.name for file in folder.iterdir()} == {
        "runs.csv", "pairs.csv", "layers.csv", "connectivity.csv", "cka.csv", "arm_pairs.csv",
        "repeats.csv", "seeds.csv", "arms.csv", "trajectories.csv", "training.csv", "tuning.csv", "tuning_pairs.csv",
        "mds.csv", "shifts.csv", "factors.csv", "clusters.csv", "classes.csv", "interventions.csv", "modules.parquet",
        "run_modules.parquet",
        "manifest.json", "report.html", "figures", "tables.md", "tables.tex", "wandb",
    }  # fmt: skip
    names = ("cosines", "accuracies", "norms", "angles", "connectivity")
    assert {file.name for file in (folder / "figures").iterdir()} == {f"{n}.{k}" for n in names for k in ("pdf", "png")}
    assert "At a glance" in (folder / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["probe_set"]["sha256"]
    tables = [file for file in folder.iterdir() if file.suffix in (".csv", ".parquet")]
    assert manifest["tables"] == {file.name: hash_file(file) for file in tables}
    assert len(manifest["adapters"]) == len(manifest["origins"]["runs"]) == 6
    assert manifest["command"].startswith(f"python analyze.py output_dir={sweep}")
    [trained_by] = manifest["origins"]["commands"]
    assert "method=sft,rft,dft,rift,grpo,dpo" in trained_by
    assert 0 < manifest["mds"]["variance_kept"] <= 1
    assert set(pd.read_csv(folder / "runs.csv")["arm"].dropna()) == {
        f"{method}-conventional" for method in METHODS.partition("=")[2].split(",")
    }
    assert manifest["settings"]["connectivity"]["points"] == 3
    assert pd.read_csv(folder / "pairs.csv")["barrier_chord"].notna().all()
    cold("evaluate.py", "benchmark=arithmetic_long", "benchmark.arithmetic_long.eval_size=20", f"output_dir={sweep}")
    script("analyze.py", f"output_dir={sweep}", *QUICK, "primary_benchmark=arithmetic_long", "pairs=[[sft,dpo]]")
    pairs = pd.read_csv(folder / "pairs.csv")
    assert pairs["accuracy_mid_a"].notna().all()  # also of the pairs that are not listed, which were measured before
    assert (pairs["mcnemar_b"] + pairs["mcnemar_c"] <= 20).all()
    bad = script("analyze.py", f"output_dir={sweep}", "pairs=[[sft,nosuch]]", check=2)
    assert "pairs: nosuch matches none of" in bad.stderr
    assert script("analyze.py", f"output_dir={sweep}", "cka.minibatch=3", check=2).stderr.count("\n") == 1
