"""Who is compared: finished runs, adapters made elsewhere, and what forbids to compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losslens.errors import InputError
from losslens.evaluation import asked_of
from losslens.files import digest, sha256_of_folder
from losslens.geometry.deltas import open_adapter
from losslens.models import adapter_sha256
from losslens.runs import Run, runs_of

_ADVICE = "they do not compare; put them into different sweeps"


@dataclass(frozen=True)
class Subject:
    """One adapter among those compared.

    Attributes:
        name: What it is called in the tables.
        adapter: Its folder.
        sha256: Hash of its weights and its configuration.
        initial: Folder of the adapter it started from, where that is known and still there.
        run: The run that made it; None for one made elsewhere.
    """

    name: str
    adapter: Path
    sha256: str
    initial: Path | None
    run: Run | None

    @property
    def manifest(self) -> dict[str, Any]:
        """The run's manifest; empty for an adapter made elsewhere."""
        return self.run.manifest if self.run else {}

    @property
    def initial_sha256(self) -> str | None:
        """Hash of the adapter it started from, where that is known."""
        return self.manifest.get("initial_adapter", {}).get("sha256")

    @property
    def seeds(self) -> tuple[int, int] | None:
        """`seed` and `init_seed`; None for one made elsewhere."""
        identity = self.manifest.get("identity")
        return (identity["seed"], identity["init_seed"]) if identity else None

    @property
    def configuration(self) -> str | None:
        """What it shares with its repetitions at other seeds, as a hash; None for one made elsewhere."""
        identity = self.manifest.get("identity")
        return digest({k: v for k, v in identity.items() if k not in ("seed", "init_seed")}, 16) if identity else None


@dataclass(frozen=True)
class Gathered:
    """All that an analysis compares.

    Attributes:
        subjects: The adapters, in the order of the tables.
        modules: Names of the adapted modules, the same in all.
        shapes: (out, in) of each module.
        ranks: Of each subject the ranks of its modules.
        bases: The untrained bases that were scored, by name.
        left_out: Runs that are not completed, with their state.
    """

    subjects: list[Subject]
    modules: list[str]
    shapes: list[tuple[int, int]]
    ranks: dict[str, list[int]]
    bases: dict[str, Run]
    left_out: dict[str, str]


def gather(output_dir: Path, sweeps: Sequence[str], adapters: Mapping[str, Path]) -> Gathered:
    """The finished runs of `sweeps` and the folders in `adapters`.

    Raises:
        InputError: There is nothing to compare; two things do not compare (base, rollouts, modules, shapes, problems
            differ); an adapter is not the one that was trained, or is damaged.
    """
    runs = [run for sweep in sweeps for run in runs_of(output_dir, sweep)]
    names = _names(runs)
    left_out = {names[run]: run.status["state"] for run in runs if run.status["state"] != "completed"}
    finished = [run for run in runs if names[run] not in left_out]
    bases = {names[run]: run for run in finished if run.manifest["method"] == "base"}
    trained = [run for run in finished if names[run] not in bases]
    if sweeps and not trained and not adapters:
        raise InputError(f"no run is completed{f' ({len(left_out)} are not)' if left_out else ''}")
    if not trained and not adapters:
        raise InputError("sweep=null: name adapters={name: folder, …} to compare")
    _require_comparable(trained, list(bases.values()))
    subjects = [_of_run(names[run], run, output_dir) for run in trained]
    taken = {*names.values(), *left_out}
    for name, folder in adapters.items():
        if name in taken:
            raise InputError(f"adapters.{name}: a run is called so already")
        sha256 = sha256_of_folder(folder, ("adapter_model*.safetensors", "adapter_config.json"))
        subjects.append(Subject(name, folder, sha256, None, None))
    return _with_shapes(subjects, bases, left_out)


def _names(runs: Sequence[Run]) -> dict[Run, str]:
    """What each run is called in the tables: its folder, after its sweep's name when there are several sweeps."""
    several = len({run.folder.parent for run in runs}) > 1
    return {run: f"{run.folder.parent.name}/{run.name}" if several else run.name for run in runs}


def _of_run(name: str, run: Run, output_dir: Path) -> Subject:
    manifest = run.manifest
    initial = output_dir / "init" / manifest["initial_adapter"]["folder"]
    return Subject(
        name, run.adapter, digest(run.adapter_hashes, 64), initial if _is_initial(initial, manifest) else None, run
    )


def _is_initial(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether the initial adapter of a run is still in `folder`."""
    try:
        return adapter_sha256(folder) == manifest["initial_adapter"]["sha256"]
    except InputError:
        return False


def _require_comparable(trained: Sequence[Run], bases: Sequence[Run]) -> None:
    """Refuses runs of another base, other rollouts or other problems than the first one's."""
    for run in trained:
        if not run.is_trained():
            raise InputError(f"{run.folder}: no finished adapter in it")
        if run.status.get("adapter_sha256") != run.manifest["adapter_sha256"]:
            raise InputError(f"{run.folder}: the adapter_sha256 in status.json is not that of its adapter")
        for what, value, other in (
            ("base", run.manifest["base"], trained[0].manifest["base"]),
            ("rollouts", run.manifest["rollouts"]["sha256"], trained[0].manifest["rollouts"]["sha256"]),
        ):
            if value != other:
                raise InputError(f"{run.name}: another {what} than {trained[0].name}; {_ADVICE}")
    for run in bases:
        if trained and run.manifest["base"] != trained[0].manifest["base"]:
            raise InputError(f"{run.name}: not the base of {trained[0].name}; {_ADVICE}")
    asked: dict[str, tuple[str, Run]] = {}
    for run in [*bases, *trained]:
        for benchmark in benchmarks_of(run):
            this = asked_of(run.evaluation(benchmark))
            first, other_run = asked.setdefault(benchmark, (this, run))
            if this != first:
                raise InputError(
                    f"{run.name}: scored on other problems of {benchmark} than {other_run.name}, or decoded otherwise; "
                    "score both with the same data and evaluation settings"
                )


def benchmarks_of(run: Run) -> list[str]:
    """The benchmarks that a run was scored on."""
    return sorted(file.stem for file in run.folder.glob("eval/*.parquet"))


def _with_shapes(subjects: list[Subject], bases: dict[str, Run], left_out: dict[str, str]) -> Gathered:
    first = subjects[0]
    ranks = {}
    shapes: dict[str, tuple[int, int]] = {}
    for subject in subjects:
        with open_adapter(subject.adapter) as adapter:
            shapes = shapes or adapter.shapes
            for module in sorted(shapes.keys() ^ adapter.shapes.keys()):
                raise InputError(
                    f"{subject.name}: other modules are adapted than in {first.name} (one of them has {module}, the "
                    "other has not); they do not compare"
                )
            for module, shape in adapter.shapes.items():
                if shape != shapes[module]:
                    raise InputError(
                        f"{subject.name}: {module} is {_times(shape)}, in {first.name} it is {_times(shapes[module])}; "
                        "they do not compare"
                    )
            ranks[subject.name] = list(adapter.ranks.values())
    return Gathered(subjects, list(shapes), list(shapes.values()), ranks, bases, left_out)


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"
