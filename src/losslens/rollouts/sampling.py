"""Samples rollouts, verifies them and freezes them, unless that was done before."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from omegaconf import DictConfig

from losslens.config import RolloutConfig, build, parse
from losslens.errors import InputError, UnavailableError
from losslens.files import digest
from losslens.models import ModelSource, load_model, model_identity
from losslens.problems import Split
from losslens.provenance import versions
from losslens.rollouts.frozen import FrozenRollouts, counts, find, freeze, load, read_manifest


def rollouts_identity(config: RolloutConfig, split: Split = "train") -> dict[str, Any]:
    """What tells these rollouts from others: their content when a folder is given, else how they are sampled.

    Raises:
        InputError: The writer's model or the folder is not there.
    """
    if config.rollouts.path is not None:
        return {"sha256": read_manifest(Path(config.rollouts.path))["sha256"]}
    writer = _writer(config)
    return {
        **({} if split == "train" else {"split": split}),
        "source": config.data.source,
        "prompts": config.data.train,
        "seed": config.data.seed,
        "writer": model_identity(writer.field, writer.path, writer.revision),
        "sampling": config.rollouts.model_dump(exclude={"path"}),
        "dtype": config.model.dtype,
    }


def frozen_rollouts(config: RolloutConfig, split: Split = "train") -> FrozenRollouts:
    """The rollouts that `config` asks for; sampled, verified and frozen first when they are missing.

    Of several processes that ask at once, one makes them and the others wait.

    Args:
        config: Which problems, who writes, and how; `data.train` prompts.
        split: The problems to draw from.

    Raises:
        InputError: What is on disk is damaged, or the configuration cannot be followed.
    """
    if config.rollouts.path is not None:
        return load(Path(config.rollouts.path))
    parent = config.output_dir / "rollouts"
    parent.mkdir(parents=True, exist_ok=True)
    key = digest(rollouts_identity(config, split), 16)
    with FileLock(parent / ".lock"):
        folder = find(parent, key) or _make(config, split, parent, key)
    return load(folder)


def held_out_rollouts(config: RolloutConfig, problems: int) -> FrozenRollouts:
    """One rollout of each of the first held-out problems, by the policy and with the settings of the training set.

    Raises:
        UnavailableError: The training set came from a folder, or its writer's model is not there.
        InputError: As for `frozen_rollouts`.
    """
    if config.rollouts.path is not None:
        why = f"the rollouts came from {config.rollouts.path}, whose writer cannot be asked"
        raise UnavailableError(f"{why}; give held_out.completions=FOLDER")
    changes = {
        "data": config.data.model_copy(update={"train": problems}),
        "rollouts": config.rollouts.model_copy(update={"k": 1}),
    }
    changed = config.model_copy(update=changes)
    try:
        rollouts_identity(changed, "eval")
    except InputError as error:
        raise UnavailableError(f"{error}; give held_out.completions=FOLDER") from error
    return frozen_rollouts(changed, "eval")


def _writer(config: RolloutConfig) -> ModelSource:
    model = config.model
    if config.rollouts.policy == "base":
        field, path, revision = "model.path", model.path, model.revision
    elif model.teacher is None:
        raise InputError("rollouts.policy=teacher: model.teacher names none; set it, or take rollouts.policy=base")
    else:
        field, path, revision = "model.teacher", model.teacher, model.teacher_revision
    return ModelSource(field, path, revision, model.dtype, model.device, model.trust_remote_code)


def _make(config: RolloutConfig, split: Split, parent: Path, key: str) -> Path:
    from losslens.generation import generate_samples

    source = build("data.source", config.data.source)
    problems = source.problems(split, config.data.train, config.data.seed)
    writer = _writer(config)
    loaded = load_model(writer)
    sampling = config.rollouts
    started = datetime.now(UTC)
    completions = generate_samples(
        loaded.model,
        loaded.tokenizer,
        [problem.prompt for problem in problems],
        samples=sampling.k,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_tokens,
        batch_size=sampling.batch_size,
        seed=sampling.seed,
        description=f"{'rollouts' if split == 'train' else 'held-out completions'} from the {sampling.policy}",
    )
    rows = [
        {
            "problem_id": problem.id,
            "prompt": problem.prompt,
            "completion": completion.text,
            "reward": float(source.verify(problem, completion.text).correct),
            "answer": problem.answer,
            "sample": number,
            "source": sampling.policy,
            "tokens": completion.tokens,
            "finished": completion.finished,
        }
        for problem, group in zip(problems, completions, strict=True)
        for number, completion in enumerate(group)
    ]
    manifest = {
        "keys": [key],
        "policy": sampling.policy,
        "writer": writer.path,
        "identity": rollouts_identity(config, split),
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype),
        "made": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
        "versions": versions(),
    }
    name = config.data.name if split == "train" else f"{config.data.name}-heldout"
    return freeze(pd.DataFrame(rows), parent, name, manifest)


def rollout_job(config: DictConfig) -> None:
    """What `rollout.py` does: finds or makes the rollouts and says what they are like."""
    rollouts = frozen_rollouts(parse(RolloutConfig, config))
    print(rollouts.folder)
    for name, value in counts(rollouts.table).items():
        print(f"  {name.replace('_', ' ')}: {f'{value:.1%}' if isinstance(value, float) else value}")
