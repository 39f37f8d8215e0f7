"""Preparation of a run: its base, the source of its rows, its initial adapter and its manifest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losslens.config.training import TrainConfig
from losslens.core import provenance
from losslens.core.files import write_json
from losslens.core.notices import print_once
from losslens.losses.on_policy import OnPolicy
from losslens.losses.presentation import manifest_entry
from losslens.models.adapters import adapter_fingerprint, initial_adapter
from losslens.models.loading import load_model, source_of
from losslens.rollouts.frozen import FrozenRollouts, count_rollouts, load_rollouts
from losslens.rollouts.quality import require_rewards, require_usable, rollout_quality
from losslens.rollouts.sample import frozen_rollouts, problem_source, training_problems
from losslens.runs.integrity import run_fingerprint
from losslens.runs.prompts import prompts_sha256, write_prompts
from losslens.runs.reference_adapters import describe_references, resolve_references
from losslens.runs.run import Run
from losslens.runs.spec import RunSpec

if TYPE_CHECKING:
    import pandas as pd

    from losslens.losses import Loss
    from losslens.models.loading import LoadedModel
    from losslens.training.run import TrainingPlan
    from losslens.training.source import FrozenSource, OnPolicySource


@dataclass(frozen=True)
class Prepared:
    """Inputs of the training of a run.

    Attributes:
        rollouts: Folder of the frozen rollouts; None for an on-policy method.
    """

    plan: TrainingPlan
    base: LoadedModel
    source: FrozenSource | OnPolicySource
    rollouts: Path | None
    references: dict[str, Path]
    steps: int


def prepare(spec: RunSpec, run: Run) -> Prepared:
    """Creates the rollouts and the initial adapter if they are missing, and writes the run's manifest."""
    config = spec.config
    started = datetime.now(UTC)
    run.set_state("running")
    base, source, rollouts, facts = _own_samples(spec) if spec.method.own_samples else _frozen(spec)
    if spec.method.own_samples:
        from losslens.training.source import OnPolicySource

        assert isinstance(source, OnPolicySource)
        facts["prompts_sha256"] = write_prompts(run, [(problem.id, problem.prompt) for problem in source.problems])
    steps = config.optim.steps(source.epoch_length)
    run.set_state("running", step=0, max_steps=steps)
    initial = _initial_adapter(spec, base)
    precision = {"dtype": str(base.model.dtype), "device": base.model.device.type}
    plan = _plan(spec, initial)
    before = run.manifest if (run.folder / "manifest.json").exists() else {}
    before = before if isinstance(before, dict) else {}
    if before and before.get("precision") != precision:
        # A run must not be resumed in another precision.
        run.remove_checkpoints()
    manifest: dict[str, Any] = {
        "run": run.name,
        "method": spec.method.name,
        "options": spec.method.options,
        "loss": manifest_entry(spec.method),
        "conventional_lr_scale": spec.method.conventional_lr_scale,
        "learning_rate": plan.learning_rate,
        "config": config.model_dump(mode="json"),
        "identity": spec.identity,
        **facts,
        "base": spec.base,
        "initial_adapter": initial and {"folder": initial.name, "sha256": adapter_fingerprint(initial)},
        "precision": precision,
        **provenance.describe_environment(),
        "started": started.isoformat(timespec="seconds"),
        "outcomes": before.get("outcomes") or {},
    }
    plan = replace(plan, identity=run_fingerprint(manifest))
    references = resolve_references(config.weight_tracking.references, run, initial, manifest)
    manifest["references"] = describe_references(references)
    write_json(run.folder / "manifest.json", manifest, sealed=True)
    return Prepared(plan, base, source, rollouts, references, steps)


def prepare_to_join(
    spec: RunSpec, rollouts: Path | None, initial: Path | None
) -> tuple[TrainingPlan, LoadedModel, FrozenSource | OnPolicySource]:
    """Plan, base and source in a process that is not the main one, of what the main process has prepared."""
    source: FrozenSource | OnPolicySource
    if rollouts is None:
        base, source, _, _ = _own_samples(spec)
    else:
        from losslens.training.batches import tokenise_frozen

        base = load_model(source_of(spec.config.model))
        source = _source(spec, base, tokenise_frozen(load_rollouts(rollouts), base.tokenizer))
    return _plan(spec, initial), base, source


def _frozen(spec: RunSpec) -> tuple[LoadedModel, FrozenSource, Path, dict[str, Any]]:
    """Base, source and folder of the frozen rollouts, and what the manifest says of them; creates them if missing."""
    config = spec.config
    rollouts = frozen_rollouts(config)
    _print_quality(rollouts)
    require_rewards(rollouts, spec.loss, config.train_on)
    _note_other_benchmark(config, rollouts)
    _note_unbounded(spec.loss)
    from losslens.models.limits import limits_of
    from losslens.models.tokens import decode
    from losslens.training.batches import filter_rollouts, tokenise_frozen

    base = load_model(source_of(config.model))
    tokenised = tokenise_frozen(rollouts, base.tokenizer)
    usable = filter_rollouts(tokenised, config.train_on)
    processed = tokenised if "reference" in spec.loss.needs else usable  # the base may score all rollouts
    ids = processed["prompt_ids"].tolist(), processed["completion_ids"].tolist()
    file = str(rollouts.folder / "rollouts.parquet")
    limits_of(source_of(config.model)).require_sequences(file, *ids, rows=processed.index.tolist())
    source = _source(spec, base, tokenised)
    source.require_sampler(rollouts)
    require_usable(rollouts, config.rollouts, spec.loss.uses_reward and not spec.loss.any_reward)
    facts = {
        "rollouts": {"folder": rollouts.folder.name, "sha256": rollouts.sha256, **count_rollouts(rollouts.table)},
        "trained_on": count_rollouts(usable),
        "prompts_sha256": prompts_sha256(rollouts.table),
        "prompt_example": decode(base.tokenizer, tokenised["prompt_ids"].iloc[0]),
    }
    return base, source, rollouts.folder, facts


def _own_samples(spec: RunSpec) -> tuple[LoadedModel, OnPolicySource, None, dict[str, Any]]:
    """Base and source of an on-policy method, and what the manifest says of its samples: there are no rollouts yet."""
    from losslens.models.tokens import decode, encode_prompt
    from losslens.training.source import OnPolicySource

    config, method = spec.config, spec.method
    assert isinstance(method, OnPolicy)
    _, problems = training_problems(config, method.name)
    # The teacher first, since only the last model stays cached.
    teacher = load_model(spec.teacher) if method.needs_teacher else None
    base = load_model(source_of(config.model))
    source = OnPolicySource(
        method=method,
        problems=problems.problems("train", config.data.train_size, config.data.seed),
        verifier=problems.verifier,
        verify_seconds=config.data.verify_seconds,
        max_tokens=spec.max_tokens,
        teacher=teacher,
    )
    facts = {
        "rollouts": None,
        "trained_on": {"own_samples": True, "prompts": len(source.problems)},
        "prompt_example": decode(base.tokenizer, encode_prompt(base.tokenizer, source.problems[0].prompt)),
    }
    return base, source, None, facts


def _source(spec: RunSpec, base: LoadedModel, tokenised: pd.DataFrame) -> FrozenSource:
    from losslens.training.reference import ReferenceCache
    from losslens.training.source import FrozenSource

    about = {"base": spec.base, "dtype": str(base.model.dtype), "device": base.model.device.type}
    reference, config = ReferenceCache(spec.config.output_dir / "references", about), spec.config
    return FrozenSource(tokenised, spec.loss, config.optim, config.seed, config.train_on, reference)


def _initial_adapter(spec: RunSpec, base: LoadedModel) -> Path | None:
    """Folder of the initial adapter; None for full fine-tuning, which starts from the base's own weights."""
    config = spec.config
    if spec.lora is None or config.init_seed is None:
        count = sum(weight.numel() for weight in base.model.parameters())
        print_once(
            f"adapter=none: training all {count / 1e6:,.1f}M weights, which takes {16 * count / 1e9:,.2f} GB beside "
            "the base (float32 weights, gradients and AdamW's moments); lora_rank, model.target_modules and "
            "init_seed have no effect"
        )
        return None
    return initial_adapter(config.output_dir, spec.base, base.model, spec.lora, config.init_seed)


def _plan(spec: RunSpec, initial: Path | None) -> TrainingPlan:
    from losslens.training.run import TrainingPlan

    return TrainingPlan(
        method=spec.method,
        learning_rate=spec.learning_rate,
        lora=spec.lora,
        initial_adapter=initial,
        optim=spec.config.optim,
        seed=spec.config.seed,
    )


def _print_quality(rollouts: FrozenRollouts) -> None:
    lines = [f"  {name}: {value}" for name, value in rollout_quality(rollouts).items()]
    print_once("\n".join([str(rollouts.folder), *lines]))


def _note_other_benchmark(config: TrainConfig, rollouts: FrozenRollouts) -> None:
    """Prints a note if rollouts from `rollouts.path` are of another problem source than the default benchmark."""
    identity = rollouts.manifest.get("identity")
    source = identity.get("source") if isinstance(identity, dict) else None
    if config.rollouts.path is None or config.benchmark or config.data.eval_size == 0 or not isinstance(source, dict):
        return
    if source != problem_source(config.data).identity("train"):
        print_once(
            f"rollouts.path={config.rollouts.path}: these rollouts answer problems of another source than "
            f"data={config.data.name}, on whose held-out problems the runs are scored; choose another benchmark with "
            "benchmark=…, or none with data.eval_size=0"
        )


def _note_unbounded(loss: Loss) -> None:
    if not loss.bounded:
        print_once(
            f"method={loss.name}: unbounded below with these options: training can lower rollouts without end; watch "
            "train/logps/correct and train/logps/incorrect"
        )
