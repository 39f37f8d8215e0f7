"""Identity of runs: what changes it, and what must not."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import Field
from pydantic.fields import FieldInfo

from losslens.config.base import Section
from losslens.config.identity import formerly, identity_options
from losslens.config.parse import parse
from losslens.config.training import LearningRate, Optim, TrainConfig
from losslens.core.errors import InputError
from losslens.core.files import write_json
from losslens.losses import builtin_losses
from losslens.losses.dpo import Dpo
from losslens.losses.sft import Sft
from losslens.runs.run import Run, base_run, runs_of
from losslens.runs.spec import RunSpec
from tests.conftest import ROOT, TINY


@functools.cache
def config(*overrides: str) -> TrainConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(TrainConfig, compose("train", list(overrides)))


def run(*overrides: str) -> Run:
    return RunSpec.of(config(*overrides)).run


def identity(*overrides: str) -> str:
    return run(*overrides).name.rpartition("-")[2]


def test_the_folder_says_what_it_is() -> None:
    assert run().folder.parent == Path("outputs/main")
    assert run("method=dpo", "lr=matched", "lora_rank=r16", "seed=3").name.startswith("dpo-matched-r16-tiny-s3-")


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=/elsewhere",
        "sweep=other",
        "logger=none",
        "optim.micro_batch=8",
        "optim.log_steps=1",
        "optim.save_steps=10",
        "optim.gradient_checkpointing=true",
        "evaluation.batch_size=1",
        "data.eval_size=10",
        "data.name=renamed",
        "model.name=renamed",
        "lora_rank.alpha=16",  # what it is anyway: twice the rank
        "model.target_modules=[v_proj,o_proj,q_proj,k_proj]",
        "lr=matched",  # for a pointwise method the same rate
    ],
)
def test_unrelated_options_do_not_change_the_identity(override: str) -> None:
    assert identity(override) == identity()


# Of every value of train.py's configuration: another one that makes another adapter, or None where there is none.
DECIDES: dict[str, str | None] = {
    "model.path": f"{TINY / 'teacher'} model.teacher={TINY / 'teacher'}",
    "model.name": None, "model.revision": None, "model.package": None,  # for a model of the hub
    "model.teacher": str(TINY / "student"), "model.teacher_revision": None,
    "model.target_modules": "[q_proj]", "model.default_lr": "2e-3", "model.dtype": "bfloat16", "model.device": None,
    "model.attention": None, "model.chat_options": "{thinking: false}", "model.trust_remote_code": None,
    "data.name": None, "data.source._target_": None, "data.source.task": "basic_arithmetic data.source.difficulty={}",
    "data.source.difficulty.min_terms": "2", "data.source.difficulty.max_terms": "7",
    "data.source.difficulty.min_digits": "1 data.source.difficulty.max_digits=2",
    "data.source.difficulty.max_digits": "2", "data.source.template": "'Q: {question}'",
    "data.source.reads": "last_word", "data.source.pretrain_share": "0.5",
    "data.train_size": "10", "data.eval_size": None, "data.seed": "1", "data.verify_seconds": "20",
    "rollouts.engine": "openai rollouts.server.model=x", "rollouts.policy": "base", "rollouts.samples_per_prompt": "2",
    "rollouts.temperature": "0.5", "rollouts.top_p": "0.9", "rollouts.max_tokens": "32", "rollouts.seed": "1",
    "rollouts.batch_size": "16", "rollouts.path": None,  # by its content: below
    "rollouts.accept": None, "rollouts.server": None,  # of rollouts.engine=openai: tests/test_server.py
    "method._target_": None, "method.name": None,  # all losses and their options: below
    "method.ratio": None, "method.epsilon_high": None, "method.ratio_max": None, "method.behaviour": None,
    "lr.name": None, "lr.peak": "2e-3", "lr.factor": "0.5",
    "adapter": "none", "lora_rank.r": "4", "lora_rank.alpha": "8", "lora_rank.dropout": "0.1",
    "logger": None, "weight_tracking": None, "resources": None, "evaluation": None, "output_dir": None, "sweep": None,
    "seed": "1", "init_seed": "1", "train_on": "mixed_groups",
    "optim.max_steps": "1", "optim.epochs": "2", "optim.batch_size": "16", "optim.micro_batch": None,
    "optim.scheduler": "linear", "optim.warmup_ratio": "0", "optim.weight_decay": "0", "optim.max_grad_norm": "0.5",
    "optim.gradient_checkpointing": None, "optim.log_steps": None, "optim.save_steps": None,
    "optim.snapshot_steps": None, "optim.max_step_minutes": None,
}  # fmt: skip


def test_every_value_of_the_configuration_is_accounted_for() -> None:
    """Whoever adds one says here whether it decides the adapter."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(compose("train"), resolve=True)
    assert isinstance(values, dict)
    named = {
        next((name for name in DECIDES if key == name or key.startswith(f"{name}.")), key)
        for key in _keys(values)
        if key != "benchmark"
    }
    assert named == DECIDES.keys()


def _keys(values: dict[Any, Any], before: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


@pytest.mark.parametrize("name", [name for name, value in DECIDES.items() if value is not None])
def test_any_value_that_decides_the_adapter_decides_the_identity(name: str) -> None:
    value = str(DECIDES[name])
    overrides = [f"{name}={value}"] if value[0] in "'{" else f"{name}={value}".split()
    assert identity(*overrides) != identity()


@pytest.mark.parametrize("name", sorted(builtin_losses()))
def test_every_option_of_a_loss_is_in_the_identity_when_it_is_not_at_its_default(name: str) -> None:
    kind = builtin_losses()[name]
    assert kind(name=name).identity == {"name": name, "version": 1}
    for option, field in kind.model_fields.items():
        if option == "name":
            continue
        other, others = _another(field), _ONLY_WITH.get(option, {})
        mark = formerly(kind).get(option)  # the words of an identity stay
        written = {mark.name: mark.values.get(other, other)} if mark else {option: other}
        assert kind(**{"name": name, option: other, **others}).identity == {
            "name": name, "version": 1, **written, **others,
        }  # fmt: skip
        assert kind(**{"name": name, option: field.default}).identity == {"name": name, "version": 1}


# Options that only another one allows.
_ONLY_WITH: dict[str, dict[str, Any]] = {"label_smoothing": {"loss_type": "robust"}}


def _another(field: FieldInfo) -> Any:
    """A value that is not the default."""
    choices = get_args(field.annotation)
    if float in choices:
        return 0.25
    if choices:
        return next(choice for choice in choices if choice != field.default)
    return not field.default if isinstance(field.default, bool) else field.default * 0.3 + 0.1 * (field.default >= 0)


def test_a_new_option_at_its_default_keeps_identities() -> None:
    class NewOptim(Optim):
        nesterov: bool = False

    class NewDpo(Dpo):
        margin: float = 0.0

    values = config().optim.model_dump()
    assert identity_options(NewOptim(**values)) == identity_options(Optim(**values))
    assert identity_options(NewOptim(**values, nesterov=True)) != identity_options(Optim(**values))
    assert NewDpo(name="dpo", beta=0.3).identity == Dpo(name="dpo", beta=0.3).identity
    assert NewDpo(name="dpo", margin=1).identity != Dpo(name="dpo").identity


def test_options_of_any_type_change_the_identity() -> None:
    class Schedule(Section):
        kind: str = "linear"
        power: float = 1.0

    class Loss(Sft):
        schedule: Schedule = Schedule()
        only: frozenset[str] = frozenset()
        limit: float | bool = False
        beta: float = Field(default=1.0, alias="strength")  # called otherwise before

    def identity_of(**options: Any) -> dict[str, Any]:
        return {
            name: value
            for name, value in Loss(name="sft", **options).identity.items()
            if name not in ("name", "version")
        }

    assert identity_of() == {}
    assert identity_of(schedule={"kind": "cosine"}) == {"schedule": {"kind": "cosine", "power": 1.0}}
    assert identity_of(only=["b", "c", "a"]) == {"only": ["a", "b", "c"]}
    assert identity_of(limit=0.0) == {"limit": 0.0}  # not False, though equal to it
    assert identity_of(beta=2) == identity_of(strength=2) == {"strength": 2.0}
    assert Loss(name="sft", beta=2).options["strength"] == 2.0


def test_a_loss_is_known_by_its_name_wherever_its_class_is(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = ModuleType("losses_elsewhere")
    elsewhere.Sft = Sft  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, elsewhere.__name__, elsewhere)
    assert identity("method._target_=losses_elsewhere.Sft") == identity()
    monkeypatch.setattr(Sft, "version", 2)  # it means another adapter now
    assert identity("method=sft") != identity("method=rft")
    assert RunSpec.of(config()).identity["method"] == {"name": "sft", "version": 2}


def test_a_loss_outside_the_package() -> None:
    own = RunSpec.of(config("method._target_=tests.own_loss.Half", "method.name=half", "+method.floor=1"))
    assert own.identity["method"] == {"name": "half", "version": 1, "floor": 1.0}
    assert own.run.name.startswith("half-conventional-")
    assert own.learning_rate == 2e-4  # it declares a fifth of SFT's
    with pytest.raises(InputError, match=r"^method\.ratio: Extra inputs are not permitted, got 'clip'$"):
        RunSpec.of(config("method._target_=tests.own_loss.Half", "method.name=half", "method.ratio=clip"))
    with pytest.raises(InputError, match=r"^method\.name=sft: the name of a built-in loss; \w+ needs another name$"):
        RunSpec.of(config("method._target_=tests.slow_method.Impostor"))
    with pytest.raises(InputError, match=r"^method\._target_: dict is not a subclass of losslens\.losses\.Loss$"):
        RunSpec.of(config("method._target_=builtins.dict"))


def test_the_form_of_an_identity() -> None:
    """The example in docs/reference/identity.md, computed without LossLens."""
    page = (ROOT / "docs" / "reference" / "identity.md").read_text(encoding="utf-8")
    shown = json.loads(page.partition("```json")[2].partition("```")[0])
    spec = RunSpec.of(config("method=grpo", "method.bias=0.2"))
    assert json.loads(json.dumps(spec.identity)) == shown
    text = json.dumps(shown, sort_keys=True, separators=(",", ":"))
    assert spec.run.name == f"grpo-conventional-r8-tiny-s42-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    assert spec.run.name in page


def test_a_methods_options_are_part_of_the_identity() -> None:
    assert len({identity("method=grpo", f"method.bias={bias}") for bias in (0.0, 0.1, 0.2)}) == 3
    assert identity("method=dpo", "lr=matched") != identity("method=dpo")


def test_a_model_is_known_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    shutil.copytree(TINY / "student", tmp_path / "copy")
    assert identity(f"model.path={tmp_path / 'copy'}", f"model.teacher={TINY / 'teacher'}") == identity()


def test_rollouts_that_are_given_are_known_by_their_content(frozen: Path, tmp_path: Path) -> None:
    shutil.copytree(frozen, tmp_path / "copy")
    assert identity(f"rollouts.path={tmp_path / 'copy'}") == identity(f"rollouts.path={frozen}") != identity()


def test_learning_rates() -> None:
    """As `lr=conventional` each loss has its own: losses that weigh SFT's tokens have SFT's."""

    def rates(*overrides: str) -> dict[str, float]:
        lr = config("lr.peak=0.5", *overrides).lr
        return {name: lr.of(kind.conventional_lr_scale) for name, kind in builtin_losses().items()}

    tenths = ("a_star_po", "cal_dpo", "dpo", "ipo", "kto", "orpo", "rpo", "simpo")
    fifths = {"nft": 0.1, "redi": 0.1, "topr": 0.1}
    assert {name: rate for name, rate in rates().items() if rate != 0.5} == {**dict.fromkeys(tenths, 0.05), **fifths}
    assert set(rates("lr=matched").values()) == {0.5}
    assert set(rates("lr.factor=0.2").values()) == {0.1}
    assert RunSpec.of(config("method=kto")).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("pairwise", "factors", "factor", "scale"),
    [
        (False, (1.0, 0.1), None, 1.0),  # KTO among them, which was trained at SFT's rate
        (True, (1.0, 0.1), None, 0.1),
        (True, (10.0, 10.0), 10.0, 0.1),
        (False, (0.5, 0.1), 0.5, 1.0),
        (True, (0.5, 0.2), 0.2, 0.1),
    ],
)
def test_manifests_from_when_there_were_two_factors(
    pairwise: bool, factors: tuple[float, float], factor: float | None, scale: float, tmp_path: Path
) -> None:
    lr = {"name": "mine", "base": 1e-3, "pointwise_factor": factors[0], "pairwise_factor": factors[1]}
    write_json(tmp_path / "manifest.json", {"pairwise": pairwise, "config": {"lr": lr, "seed": 1}, "run": "x"})
    manifest = Run(tmp_path).manifest
    assert manifest["config"] == {"lr": {"name": "mine", "peak": 1e-3, "factor": factor}, "seed": 1}
    assert (manifest["conventional_lr_scale"], manifest["run"]) == (scale, "x")
    rate = LearningRate(**manifest["config"]["lr"]).of(scale)
    assert rate == pytest.approx(1e-3 * factors[pairwise])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora_rank.r=0", "lora_rank.r: "),
        ("lora_rank.r=x", "lora_rank.r: "),
        ("lr.peak=-1", "lr.peak: "),
        ("lr.peak=inf", "lr.peak: "),
        ("lr.factor=0", "lr.factor: "),
        ("+lr.pairwise_factor=1", "lr.pairwise_factor: called lr.factor now"),
        ("optim.max_steps=0", "optim.max_steps: "),
        ("optim.save_steps=7", "optim: log_steps=5 does not divide save_steps=7"),
        (
            "optim.micro_batch=0",
            "optim.micro_batch: Input should be 'auto', or Input should be greater than or equal to 1",
        ),
        ("optim.micro_batch=5", "optim: micro_batch=5 does not divide batch_size=32"),
        ("rollouts.temperature=0", "rollouts.temperature: "),
        ("rollouts.policy=other", "rollouts.policy: "),
        ("sweep=../up", "sweep: "),
        ("seed=-1", "seed: "),
        ("data.train_size=0", "data.train_size: "),
        ("model.path=/no/such/folder", "model.path=/no/such/folder: no such folder"),
        ("rollouts.path=/no/such/folder", "/no/such/folder/manifest.json: no such file"),
        ("method._target_=losslens.nothing", "method._target_: "),
        ("+method.extra=1", "method.extra: "),
    ],
)
def test_bad_values_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        run(override)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("grpo", "bias_scope=some"),
        ("grpo", "kl_coef=-1"),
        ("dpo", "beta=0"),
        ("dpo", "pairs=two"),
        ("rft", "incorrect=keep"),
    ],
)
def test_bad_options_of_a_method_are_refused_by_name(method: str, option: str) -> None:
    with pytest.raises(InputError, match=f"method.{option.partition('=')[0]}"):
        run(f"method={method}", f"method.{option}")


def test_a_sweeps_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sweep=main: no such sweep"):
        runs_of(tmp_path, "main")
    for name, state in (("b", "completed"), ("a", "failed"), ("base-x", "completed")):
        Run(tmp_path / "main" / name).set_state(state)
    (tmp_path / "main" / "analysis").mkdir()
    assert [(r.name, r.status["state"]) for r in runs_of(tmp_path, "main")] == [
        ("base-x", "completed"),
        ("a", "failed"),
        ("b", "completed"),
    ]
    assert base_run(tmp_path / "main", config().model).name.startswith("base-tiny-")


def _hold(folder: Path) -> tuple[float, float]:
    with Run(folder).lock():
        entered = time.monotonic()
        time.sleep(0.3)
        return entered, time.monotonic()


def test_a_run_is_locked_by_one_process_at_a_time(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = sorted(pool.map(_hold, [tmp_path / "run"] * 2, chunksize=1))
    assert first[1] <= second[0]
