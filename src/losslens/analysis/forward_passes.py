"""Forward passes of adapters on their base, and measures against the base weights; all results are cached."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from losslens.analysis.cache import Arrays, Cache
from losslens.analysis.cohort import Cohort
from losslens.analysis.pairs import Pair
from losslens.analysis.probe_set import TeacherForced
from losslens.analysis.weight_space import initial_key
from losslens.config.analysis import Cka, Connectivity
from losslens.config.data import Data
from losslens.config.evaluation import Evaluation
from losslens.core.errors import InputError, UnavailableError
from losslens.evaluation.outcomes import evaluate
from losslens.measures.base_weights import Principal, PrincipalParts, principal, principal_parts
from losslens.measures.cka import CkaOfPair, Similarities, cka, minibatch_sizes, minibatches_of, similarities
from losslens.measures.connectivity import Curve, SequenceNll, curve
from losslens.measures.forward import Sequences, base_weight, hidden_states, interpolated_model, sequence_losses
from losslens.measures.rotated import against_copies
from losslens.measures.tables import BaseComparison
from losslens.models.limits import limits_of
from losslens.models.loading import LoadedModel, ModelSource, load_model
from losslens.rollouts.sample import held_out_problems, problem_source
from losslens.updates.base import Array
from losslens.updates.folder import open_adapter

Name = TypeVar("Name", bound=Hashable)


class ForwardPasses:
    """Measures adapters on their base. The base is only loaded for results missing from the cache.

    Args:
        source: The source of the base.
        identity: The identity of the base, for cache keys.
        cohort: The adapters.
        cache: Cached results.
        batch_size: Sequences per forward pass.
    """

    def __init__(
        self, source: ModelSource, identity: dict[str, str | None], cohort: Cohort, cache: Cache, batch_size: int
    ) -> None:
        self._source = source
        self._cohort = cohort
        self._cache = cache
        self._batch_size = batch_size
        self._members = cohort.by_name
        # On a GPU, `auto` means a different precision.
        self._identity = [identity, source.dtype, source.device, torch.cuda.is_available()]
        self._identity += [source.attention, source.chat_options]
        # In half precision the batch size may change values.
        self._half = source.dtype in ("bfloat16", "float16") or (source.dtype == "auto" and torch.cuda.is_available())
        self._identity.append(batch_size if self._half else None)

    @property
    def _base(self) -> LoadedModel:
        try:
            return load_model(self._source)
        except InputError as error:
            raise UnavailableError(str(error)) from error

    def against_base(self, top: int) -> dict[str, BaseComparison]:
        """Compares every run with W0."""
        keys = {name: [self._identity, *initial_key(member), top] for name, member in self._members.items()}
        names = [field.name for field in fields(BaseComparison)]
        found = {name: BaseComparison(**known) for name, known in self._known("against_base", keys, names).items()}
        missing = [name for name in keys if name not in found]
        if missing:
            norms = np.empty(len(self._cohort.modules))
            parts: dict[str, list[PrincipalParts]] = {name: [] for name in missing}
            with ExitStack() as stack:
                adapters = {name: stack.enter_context(open_adapter(self._members[name].adapter)) for name in missing}
                folders = {folder for name in missing if (folder := self._members[name].initial)}
                starts = {folder: stack.enter_context(open_adapter(folder)) for folder in folders}
                for m, module in enumerate(_bar(self._cohort.modules, "base weights", "module")):
                    weight = self._principal(module, self._cohort.shapes[m], top)
                    norms[m] = weight.norm
                    spaces = {folder: start[module].input_space() for folder, start in starts.items()}
                    with threadpool_limits(1, "blas"):  # the factors are too thin for one product to use several cores
                        for name, adapter in adapters.items():
                            initial = self._members[name].initial
                            start = spaces[initial] if initial else None
                            parts[name].append(principal_parts(adapter[module], start, weight))
            for name in missing:
                found[name] = BaseComparison.of(norms, parts[name])
                self._cache.save("against_base", keys[name], vars(found[name]))
        return found

    def effects(self, top: int, copies: int) -> dict[str, Array]:
        """Computes the effects of every run on W0 and those of left-rotated copies of it, shape (M, 3, 4) each."""
        keys = {name: [self._identity, member.sha256, top, copies] for name, member in self._members.items()}
        found = {name: known["effects"] for name, known in self._known("effects", keys, ["effects"]).items()}
        missing = [name for name in keys if name not in found]
        if missing:
            modules: dict[str, list[Array]] = {name: [] for name in missing}
            with ExitStack() as stack:
                adapters = {name: stack.enter_context(open_adapter(self._members[name].adapter)) for name in missing}
                for m, module in enumerate(_bar(self._cohort.modules, "rotated copies", "module")):
                    directions = self._principal(module, self._cohort.shapes[m], top)
                    weight = base_weight(self._base.model, module, self._cohort.shapes[m]).double().cpu().numpy()
                    for name, adapter in adapters.items():
                        # The same rotations for all runs.
                        rng = np.random.default_rng(m)
                        modules[name].append(against_copies(adapter[module], weight, directions, copies, rng))
            for name in missing:
                found[name] = np.array(modules[name])
                self._cache.save("effects", keys[name], {"effects": found[name]})
        return found

    def _principal(self, module: str, shape: tuple[int, int], top: int) -> Principal:
        key = [self._identity, module, top]
        known = self._cache.load("principal", key, ["norm", "values", "left", "right"])
        if known is None:
            known = vars(principal(base_weight(self._base.model, module, shape).double().cpu().numpy(), top))
            self._cache.save("principal", key, known)
        if (len(known["left"]), len(known["right"])) != shape:
            raise InputError(f"the adapters do not fit the base: {module} has a different shape there")
        return Principal(float(known["norm"]), known["values"], known["left"], known["right"])

    def curves(self, pairs: Sequence[Pair], sequences: TeacherForced, settings: Connectivity) -> dict[Pair, Curve]:
        """Computes the loss on the straight path between the runs of each pair; endpoints once per run."""
        alphas = np.linspace(0, 1, settings.points)
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        about = [self._identity, sequences.key]
        end_keys = {name: [about, self._members[name].sha256] for name in names}
        line_keys = {
            pair: [about, settings.points, *sorted(self._members[name].sha256 for name in pair)] for pair in pairs
        }
        ends = self._known("losses", end_keys, ["nll", "tokens"])
        lines = self._known("line", line_keys, ["nll"])
        passes = len(end_keys) - len(ends) + (len(line_keys) - len(lines)) * (settings.points - 2)
        with tqdm(desc="connectivity", unit="pass", total=passes, leave=False, disable=not passes) as bar:
            for name in names:
                if name not in ends:
                    [at_end] = self._losses([name], [[1.0]], sequences, bar.update)
                    ends[name] = {"nll": at_end.nll, "tokens": at_end.tokens}
                    self._cache.save("losses", end_keys[name], ends[name])
            for pair in pairs:
                if pair not in lines:
                    # Cached in the order of the hashes, so that (b, a) finds the result of (a, b).
                    weights = [[1 - alpha, alpha] for alpha in alphas[1:-1]]
                    between = self._losses(self._in_order(pair), weights, sequences, bar.update)
                    lines[pair] = {"nll": np.stack([losses.nll for losses in between])}
                    self._cache.save("line", line_keys[pair], lines[pair])
        curves = {}
        for a, b in pairs:
            along = lines[a, b]["nll"] if self._in_order((a, b)) == (a, b) else lines[a, b]["nll"][::-1]
            points = [ends[a]["nll"], *along, ends[b]["nll"]]
            losses = [SequenceNll(nll, ends[a]["tokens"]) for nll in points]
            curves[a, b] = curve(alphas, losses, settings.resamples)
        return curves

    def _known(self, kind: str, keys: Mapping[Name, Any], names: Sequence[str]) -> dict[Name, Arrays]:
        """Loads the cached results for `keys`."""
        loaded = {name: self._cache.load(kind, key, names) for name, key in keys.items()}
        return {name: arrays for name, arrays in loaded.items() if arrays is not None}

    def midpoints(
        self, pairs: Sequence[Pair], problems: int, data: Data, evaluation: Evaluation
    ) -> dict[Pair, pd.Series]:
        """Scores ½ΔW_a + ½ΔW_b greedily on the first held-out problems; True for correct answers, by problem id."""
        batch = evaluation.batch_size if self._half else None
        try:
            source = problem_source(data)
            selected = held_out_problems(data)[:problems]
        except InputError as error:
            raise UnavailableError(str(error)) from error
        about = [self._identity, source.identity("eval"), data.seed, len(selected), evaluation.max_tokens, batch]
        about += [data.eval_offset] if data.eval_offset else []
        found = {}
        for number, pair in enumerate(pairs, 1):
            key = [about, *sorted(self._members[name].sha256 for name in pair)]
            known = self._cache.load("midpoint", key, ["problem_id", "correct"])
            if known is None:
                with ExitStack() as stack:
                    adapters = [stack.enter_context(open_adapter(self._members[name].adapter)) for name in pair]
                    line = interpolated_model(self._base.model, self._cohort.modules, *adapters)
                    model, set_weights = stack.enter_context(line)
                    set_weights([0.5, 0.5])
                    outcomes = evaluate(
                        model,
                        self._base.tokenizer,
                        source.verifier,
                        selected,
                        max_tokens=evaluation.max_tokens,
                        batch_size=evaluation.batch_size,
                        seconds=data.verify_seconds,
                        description=f"midpoint {number} of {len(pairs)}",
                    )
                known = {
                    "problem_id": outcomes["problem_id"].to_numpy(dtype=str),
                    "correct": outcomes["correct"].to_numpy(dtype=bool),
                }
                self._cache.save("midpoint", key, known)
            found[pair] = pd.Series(known["correct"], index=known["problem_id"])
        return found

    def _in_order(self, pair: Pair) -> Pair:
        a, b = sorted(pair, key=lambda name: self._members[name].sha256)
        return (a, b) if self._members[a].sha256 != self._members[b].sha256 else pair

    def _tokens(self, sequences: TeacherForced) -> Sequences:
        """Returns the token ids, after checking that the base can process them."""
        tokens = sequences.tokens(self._base.tokenizer)
        where, rows = str(sequences.frozen.folder / "rollouts.parquet"), sequences.rows.index.tolist()
        limits_of(self._source).require_sequences(where, tokens.prompts, tokens.completions, rows)
        return tokens

    def _losses(
        self,
        names: Sequence[str],
        weights: Sequence[Sequence[float]],
        sequences: TeacherForced,
        done: Callable[[], object],
    ) -> list[SequenceNll]:
        tokens = self._tokens(sequences)
        losses = []
        with ExitStack() as stack:
            adapters = [stack.enter_context(open_adapter(self._members[name].adapter)) for name in names]
            line = interpolated_model(self._base.model, self._cohort.modules, *adapters)
            model, set_weights = stack.enter_context(line)
            for at in weights:
                set_weights(at)
                losses.append(sequence_losses(model, tokens, self._batch_size))
                done()
        return losses

    def ckas(self, pairs: Sequence[Pair], sequences: TeacherForced, settings: Cka) -> dict[Pair, CkaOfPair]:
        """Computes CKA of each pair, and of each of its runs with the base."""
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        about = [self._identity, sequences.key, settings.pooling, settings.minibatch]
        keys: dict[str | None, Any] = {None: [about, None]}  # None is the base
        keys |= {name: [about, self._members[name].sha256] for name in names}
        found = {
            name: Similarities(known["whole"], known["without_outlier"], known["outliers"], int(known["n"]))
            for name, known in self._known("similarities", keys, [f.name for f in fields(Similarities)]).items()
        }
        # The base comes first: it determines the outlier dimensions.
        for name in _bar([name for name in keys if name not in found], "CKA", "model"):
            outliers = None if name is None else found[None].outliers
            found[name] = self._similarities(name, sequences, settings, outliers)
            self._cache.save("similarities", keys[name], vars(found[name]))
        together = {
            **{pair: pair for pair in pairs},
            **{(name, self._cohort.base_name): (name, None) for name in names},
        }
        return {
            pair: CkaOfPair(
                cka(found[a].whole, found[b].whole),
                cka(found[a].without_outlier, found[b].without_outlier),
                found[None].outliers,
                found[None].n,
            )
            for pair, (a, b) in together.items()
        }

    def _similarities(
        self, name: str | None, sequences: TeacherForced, settings: Cka, outliers: np.ndarray | None
    ) -> Similarities:
        tokens = self._tokens(sequences)
        with ExitStack() as stack:
            model: Any = self._base.model
            if name is not None:
                adapter = stack.enter_context(open_adapter(self._members[name].adapter))
                line = interpolated_model(model, self._cohort.modules, adapter)
                model, set_weights = stack.enter_context(line)
                set_weights([1.0])
            features = hidden_states(model, tokens, settings.pooling, self._batch_size)
            sizes = minibatch_sizes(len(tokens.prompts), settings.minibatch)
            return similarities(minibatches_of(features, sizes), outliers)


def _bar(steps: Sequence[Any], phase: str, unit: str) -> Any:
    return tqdm(steps, desc=phase, unit=unit, leave=False, dynamic_ncols=True, disable=not steps)
