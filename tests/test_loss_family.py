"""The family of losses: factors, clusters and first-step classes, in the tables and on the page."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from losslens.analysis.arms import Arm
from losslens.analysis.loss_family import _classes, _compared, cluster_table, factor_table
from losslens.losses import Factors, builtin_losses
from losslens.losses.presentation import manifest_entry
from losslens.measures.clustering import permanova
from losslens.report.sections import loss_family
from losslens.runs.run import runs_of
from losslens.tables.analysis_folder import AnalysisFolder
from tests.conftest import command, script
from tests.test_glance import run
from tests.test_report import MANIFEST

pytestmark = pytest.mark.fast


class _Facts:
    """What the family needs of a manifest."""

    def __init__(self, method: str, options: dict[str, Any], loss: dict[str, Any]) -> None:
        self.method, self.options, self.loss = method, options, loss
        self.identity = {"method": {"name": method, **options}}
        self.settings = {"optim": {"max_steps": 9}}


class _Arm(Arm):
    """An arm with one run, at its conventional rate or not."""

    def __init__(
        self,
        method: str,
        conventional: bool = True,
        rate: float = 1e-3,
        loss: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.facts = _Facts(method, options, loss or {})  # type: ignore[assignment]
        self.members = [object()]  # type: ignore[list-item]
        self._conventional, self._rate = conventional, rate

    at_conventional_rate = property(lambda self: self._conventional)  # type: ignore[assignment]
    learning_rate = property(lambda self: self._rate)  # type: ignore[assignment]

    def name(self, lr: str | None = None) -> str:
        return f"{self.facts.method}{'' if self._conventional else ' matched'}"


@pytest.mark.parametrize("kind", builtin_losses().values(), ids=builtin_losses())
def test_every_loss_declares_its_factors(kind: type) -> None:
    loss = kind(name=next(name for name, known in builtin_losses().items() if known is kind))
    assert isinstance(loss.factors, Factors)
    assert loss.factors.stops
    assert (loss.factors.outcome == "ignored") == (not loss.uses_reward)
    assert manifest_entry(loss)["factors"] == dataclasses.asdict(loss.factors)


def test_factors_follow_the_options() -> None:
    arms = [_Arm("rift"), _Arm("p_alpha", alpha=1.0), _Arm("p_alpha"), _Arm("rift", form="naive")]
    table = factor_table(arms)
    assert list(table["saturation"]) == ["taper", "none", "none", "none"]
    assert list(table["first_step"]) == ["", "π", "", ""]
    assert list(table["bounded"]) == [True, True, True, False]


def test_factors_of_a_loss_outside_the_package_are_those_of_its_manifest() -> None:
    declared = {"outcome": "signed", "gate": "ratio", "stops": "x" * 500, "unknown": 1}
    table = factor_table([_Arm("mine", loss={"factors": declared, "unit": "token"}), _Arm("other")])
    assert list(table["arm"]) == ["mine"]
    assert table.loc[0, "gate"] == "ratio"
    assert table.loc[0, "length"] == ""
    assert len(table.loc[0, "stops"]) == 100


METHODS = ("sft", "rft", "dft", "rift", "p_alpha", "grpo")


def pairs_of(arms: list[str], cosine: Any, pairing: str = "same init") -> pd.DataFrame:
    rows = [
        {"arm_a": a, "arm_b": b, "pairing": pairing, "cosine_relative": cosine(a, b)} for a, b in combinations(arms, 2)
    ]
    return pd.DataFrame(rows)


def factors_of(**gates: str) -> pd.DataFrame:
    rows = [
        {"arm": method, "method": method, "unit": "token", "outcome": "signed", "gate": gate, "saturation": "none",
         "length": "tokens", "stops": "", "bounded": True, "first_step": ""} for method, gate in gates.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


class TestClusters:
    gates = factors_of(**dict(zip(METHODS, ("none", "probability") * 3, strict=True)))

    @staticmethod
    def cosine(a: str, b: str) -> float:
        """.9 within a group of `gates`, .1 between."""
        return 0.9 if METHODS.index(a) % 2 == METHODS.index(b) % 2 else 0.1

    def test_by_hand(self) -> None:
        """Six losses in two groups of three: SS_total = (6·.1 + 9·.9)/6 = 1.45, SS_within = 2·(3·.1)/3 = .2.

        R² = 1.25/1.45, F = 1.25/(.2/4) = 25; of the 20 ways to choose three of six, two are as good: p = .1.
        """
        arms = [_Arm(method) for method in METHODS]
        table = cluster_table(arms, self.gates, pairs_of(list(METHODS), self.cosine))
        assert list(table["factor"]) == ["gate"]  # in the others no two differ
        [row] = table.to_dict("records")
        assert row["groups"] == "none: 3; probability: 3"
        assert row["losses"] == 6
        assert row["explained"] == pytest.approx(1.25 / 1.45)
        assert row["pseudo_f"] == pytest.approx(25)
        assert row["p"] == pytest.approx(0.1, abs=0.02)
        assert row["p_min"] == pytest.approx(0.1)

    def test_one_rate_that_all_have_is_preferred_to_the_conventional_ones(self) -> None:
        """At the matched rate all are alike but for their loss, so that there is a verdict."""
        arms = [*(_Arm(method, rate=1e-4 / (place + 1)) for place, method in enumerate(METHODS)),
                *(_Arm(method, conventional=False) for method in METHODS)]  # fmt: skip
        both = pd.concat([self.gates, self.gates.assign(arm=self.gates["arm"] + " matched")])
        pairs = pairs_of(
            [arm.name() for arm in arms],
            lambda a, b: self.cosine(a.split()[0], b.split()[0]) if " " in a and " " in b else -1.0,
        )
        [row] = cluster_table(arms, both, pairs).to_dict("records")
        assert row["explained"] == pytest.approx(1.25 / 1.45)
        assert row["differ"] == ""

    def test_at_conventional_rates_that_differ_there_is_no_verdict(self) -> None:
        arms = [_Arm(method, rate=1e-3 if place < 4 else 1e-4) for place, method in enumerate(METHODS)]
        table = cluster_table(arms, self.gates, pairs_of(list(METHODS), self.cosine))
        assert list(table["factor"]) == ["gate", "learning_rate"]
        assert set(table["differ"]) == {"learning_rate"}
        assert set(table["verdict"]) == {"settings differ"}

    def test_arms_of_other_settings_are_not_compared(self) -> None:
        """Of seven losses one was trained for fewer steps."""
        names = [*METHODS, "topr"]
        arms = [_Arm(name) for name in names]
        arms[-1].facts.settings = {"optim": {"max_steps": 3}}  # type: ignore[misc]
        gates = pd.concat([self.gates, factors_of(topr="probability")])
        [row] = cluster_table(arms, gates, pairs_of(names, lambda a, b: 0.5)).to_dict("records")
        assert row["losses"] == 6

    def test_of_several_arms_of_a_method_the_plainest_counts(self) -> None:
        plain, other = _Arm("grpo"), _Arm("grpo", bias=1.0)
        assert _compared([other, *(_Arm(method) for method in METHODS[:5]), plain])[-1] is plain

    @pytest.mark.parametrize(
        ("groups", "p_min", "verdict"),
        [
            ("aaabbb", 1 / 10, "too few losses to tell"),
            ("aaabbbb", 1 / 35, "clustered"),
            ("abababa", 1 / 35, "not shown"),
        ],
    )
    def test_a_verdict_needs_groups_that_can_reach_one(self, groups: str, p_min: float, verdict: str) -> None:
        """Three of six can be chosen in 10 ways up to exchange, three of seven in 35: only 1/35 is below .05."""
        names = [*METHODS, "topr"][: len(groups)]
        apart = "aaabbbb"
        pairs = pairs_of(names, lambda a, b: 0.9 if apart[names.index(a)] == apart[names.index(b)] else 0.1)
        [row] = cluster_table(
            [_Arm(name) for name in names], factors_of(**dict(zip(names, groups, strict=True))), pairs
        ).to_dict("records")
        assert row["p_min"] == pytest.approx(p_min)
        assert row["verdict"] == verdict
        assert math.isnan(row["p_holm"]) == (verdict == "too few losses to tell")

    def test_factors_that_cannot_be_shown_do_not_raise_the_others(self) -> None:
        """One loss of seven apart can reach 1/7 at best; were it counted, p of the gate would be twice as large."""
        names = [*METHODS, "topr"]
        both = factors_of(**dict(zip(names, "aaabbbb", strict=True))).assign(outcome=list("abbbbbb"))
        pairs = pairs_of(names, lambda a, b: 0.9 if (names.index(a) < 3) == (names.index(b) < 3) else 0.1)
        table = cluster_table([_Arm(name) for name in names], both, pairs).set_index("factor")
        assert table["verdict"].to_dict() == {"outcome": "too few losses to tell", "gate": "clustered"}
        assert table.loc["gate", "p_holm"] == table.loc["gate", "p"]

    def test_pairs_that_share_their_batches_do_not_count(self) -> None:
        arms = [_Arm(method) for method in METHODS]
        assert cluster_table(arms, self.gates, pairs_of(list(METHODS), self.cosine, "same seeds")).empty

    def test_a_loss_without_cosines_is_left_out(self) -> None:
        """Its update is 0; the others are compared as if it were not there."""
        names = [*METHODS, "topr"]
        gates = pd.concat([self.gates, factors_of(topr="entropy")])
        pairs = pairs_of(names, lambda a, b: math.nan if "topr" in (a, b) else self.cosine(a, b))
        [row] = cluster_table([_Arm(name) for name in names], gates, pairs).to_dict("records")
        assert (row["losses"], row["groups"]) == (6, "none: 3; probability: 3")

    def test_five_losses_are_too_few(self) -> None:
        arms = [_Arm(method) for method in METHODS[:5]]
        assert cluster_table(arms, self.gates[:5], pairs_of(list(METHODS[:5]), self.cosine)).empty


@pytest.fixture
def page(tmp_path: Path):
    """The section of made-up tables."""

    def make(**tables: pd.DataFrame) -> Any:
        (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
        for name, table in tables.items():
            table.to_csv(tmp_path / f"{name}.csv", index=False)
        return loss_family.section(AnalysisFolder(tmp_path))

    return make


def made_up(classes: pd.DataFrame | None = None, clusters: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    runs = pd.DataFrame([run("sft"), run("dft"), run("rft")])
    factors = factors_of(**dict.fromkeys(runs["arm"], "none")).assign(method=["sft", "dft", "rft"])
    training = pd.DataFrame(
        {
            "run": np.repeat(runs["run"], 2),
            "step": [5, 10] * 3,
            "weight_correct": 1.0,
            "weight_incorrect": [1, 1, 0.5, 0.4, 0, 0],
        }
    )
    made = {"runs": runs, "factors": factors, "training": training, "classes": classes, "clusters": clusters}
    return {name: table for name, table in made.items() if table is not None}


def class_rows(cosines: list[float], repeat: float = 0.8) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"first_step": "π", "arm": "dft-conventional", "representative": "sft-conventional", "step": 5 * step,
             "seeds": 2, "cosine": cosine, "repeats": 1, "repeat": repeat} for step, cosine in enumerate(cosines, 1)
        ]
    )  # fmt: skip


class TestPage:
    def leaves(self, page: Any, cosines: list[float], repeat: float = 0.8) -> Any:
        [table] = [t for t in page(**made_up(classes=class_rows(cosines, repeat))).tables if t.file == "classes.csv"]
        return table.rows[0].cells[-1]

    def test_a_loss_leaves_its_class_where_it_stays_less_like_it_than_a_repeat(self, page: Any) -> None:
        section = page(**made_up(classes=class_rows([1.0, 0.9, 0.79, 0.7])))
        [table] = [table for table in section.tables if table.file == "classes.csv"]
        assert [cell.text for cell in table.rows[0].cells] == [
            "DFT", "π", "SFT", "options only", "1.000", "0.700", "0.800", "step 15",
        ]  # fmt: skip
        assert self.leaves(page, [1.0, 0.7, 0.9, 0.7, 0.6]).text == "step 20"

    @pytest.mark.parametrize(
        ("cosines", "said"),
        [
            ([1.0, 0.9, 0.79, 0.85], "step 15"),
            ([1.0, 0.9, 0.79], "step 15"),
            ([1.0, 0.7, 0.9, 0.7], "step 10 and step 20"),
        ],
    )
    def test_one_crossing_is_not_enough(self, page: Any, cosines: list[float], said: str) -> None:
        cell = self.leaves(page, cosines)
        assert (cell.text, cell.below) == ("not within the run", f"below at {said}, not sustained")

    def test_it_may_never_leave_it_or_have_no_repeat(self, page: Any) -> None:
        for repeat, said in ((0.8, "not within the run"), (math.nan, "–")):
            cell = self.leaves(page, [1.0, 0.9], repeat)
            assert (cell.text, cell.below) == (said, "")

    def test_the_weights_are_drawn_for_each_loss(self, page: Any) -> None:
        section = page(**made_up())
        [figure] = section.figures
        lines = {(trace.meta, trace.line.dash): list(trace.y) for trace in figure.plot.data}
        assert len(lines) == 6
        assert lines["dft-conventional", "dash"] == [0.5, 0.4]
        assert lines["rft-conventional", "dash"] == [0, 0]

    @pytest.mark.parametrize(
        ("verdict", "differ", "said"),
        [
            ("clustered", "", "Losses that agree in how they saturate have updates that lie closer together: it exp"),
            ("not shown", "", "For none of the factors that could be tested is it shown that the updates cluster by"),
            ("too few losses to tell", "", "The losses are too few to tell whether their updates cluster by how they"),
            ("settings differ", "learning_rate", "Whether the updates cluster by a factor of the losses cannot be to"),
        ],
    )
    def test_clusters_in_a_sentence(self, page: Any, verdict: str, differ: str, said: str) -> None:
        row = {"factor": "saturation", "losses": 9, "groups": "none: 5; logistic: 4", "pseudo_f": 5.0, "explained": 0.6,
               "expected": 0.2, "p": 0.1, "p_min": 0.01, "p_holm": 0.2}  # fmt: skip
        row |= {"differ": differ, "verdict": verdict}
        [finding] = page(**made_up(clusters=pd.DataFrame([row]))).findings
        assert finding.text.startswith(said)

    def test_without_factors_there_is_no_section(self, page: Any) -> None:
        assert page(runs=pd.DataFrame([run("sft"), run("dft")])) is None


def test_the_representative_of_a_class_is_the_plainest_arm() -> None:
    def arm(name: str, **options: Any) -> Any:
        facts = SimpleNamespace(identity={"method": {"name": name, "version": 1, **options}})
        return SimpleNamespace(
            method=name, name=lambda: f"{name} {options}", members=[1], learning_rate=1e-3, facts=facts,
            distance=lambda other: 0,
        )  # fmt: skip

    arms = [arm("nft"), arm("grpo", bias=0.0, ratio="clip"), arm("grpo", bias=0.0), arm("mine")]
    factors = pd.DataFrame({"arm": [each.name() for each in arms], "first_step": "r − r̄"})
    [(name, members)] = _classes(arms, factors)
    assert name == "r − r̄"
    assert members == [arms[2], arms[1], arms[0], arms[3]]


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three losses with two data orders and a snapshot of every step; DFT and ASFT begin with the same one."""
    folder = tmp_path_factory.mktemp("parted")
    line = ["-m", "method=dft,asft,p_alpha", "seed=0,1", "lr=matched", "data.eval_size=0", "logger=none"]
    line += ["optim.warmup_ratio=0.0", "optim.max_steps=4", "optim.log_steps=1", "optim.save_steps=4"]
    script(*command(folder, *line, "optim.snapshot_steps=1"))
    script("analyze.py", "sweep=main", f"output_dir={folder}", "pairs=none", "logger=none")
    return folder


@pytest.mark.slow
def test_classes_of_real_runs_are_compared_at_each_snapshot(parted: Path) -> None:
    """Against the dense updates; at the first step the two are one loss, and not with another data order."""
    table = pd.read_csv(parted / "main" / "analysis" / "classes.csv")
    assert table["first_step"].unique().tolist() == ["π"]  # p_alpha is DFT at α = 1 only
    assert (set(table["arm"]), set(table["representative"])) == ({"asft-matched"}, {"dft-matched"})
    assert table["step"].tolist() == [1, 2, 3, 4]
    assert (table["seeds"] == 2).all()
    assert (table["repeats"] == 1).all()
    runs = {(run.manifest["method"], run.manifest["config"]["seed"]): run for run in runs_of(parted, "main")}

    def update(method: str, seed: int, step: int) -> np.ndarray:
        run = runs[method, seed]
        weights = load_file((run.snapshots.get(step) or run).adapter / "adapter_model.safetensors")
        layers = [name.removesuffix("lora_A.weight") for name in weights if name.endswith("lora_A.weight")]
        products = [weights[f"{layer}lora_B.weight"] @ weights[f"{layer}lora_A.weight"] for layer in layers]
        return np.concatenate([np.ravel(product) for product in products]).astype(np.float64)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for row in table.itertuples():
        pairs = [(update("dft", seed, row.step), update("asft", seed, row.step)) for seed in (0, 1)]
        assert row.cosine == pytest.approx(np.mean([cosine(*pair) for pair in pairs]), abs=1e-5)
        own = cosine(update("dft", 0, row.step), update("dft", 1, row.step))
        assert row.repeat == pytest.approx(own, abs=1e-5)
    first, last = table.iloc[0], table.iloc[-1]
    assert first["cosine"] > 0.999 > 0.9 > first["repeat"]
    assert last["cosine"] < first["cosine"]
    assert "First-step classes" in (parted / "main" / "analysis" / "report.html").read_text(encoding="utf-8")


def test_permanova_is_what_the_table_holds() -> None:
    arms = [_Arm(method) for method in METHODS]
    pairs = pairs_of(list(METHODS), TestClusters.cosine)
    distances = np.sqrt([[0 if a == b else 1 - TestClusters.cosine(a, b) for b in METHODS] for a in METHODS])
    found = permanova(distances, ["none", "probability"] * 3)
    [row] = cluster_table(arms, TestClusters.gates, pairs).to_dict("records")
    assert (row["p"], row["expected"]) == (found.p, found.expected)
