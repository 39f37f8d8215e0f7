"""Forward passes of adapters on their base; all results are cached."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from losslens.analysis.cache import Arrays, Cache
from losslens.analysis.cohort import Cohort, Point
from losslens.analysis.pairs import Pair
from losslens.analysis.probe_set import TeacherForced
from losslens.config.analysis import Cka, Connectivity
from losslens.core.errors import InputError, UnavailableError
from losslens.measures.behaviour import Observation
from losslens.measures.cka import CkaOfPair, Similarities, cka, minibatch_sizes, minibatches_of, similarities
from losslens.measures.connectivity import Curve, SequenceNll, curve
from losslens.measures.forward import Batch, Sequences, base_weight, interpolated_model, observe, sequence_losses
from losslens.measures.kept_tokens import EXACT_UP_TO, LIKELIEST
from losslens.models.full_model import between_models
from losslens.models.limits import limits_of
from losslens.models.loading import LoadedModel, ModelSource, load_model
from losslens.updates.base import Array, Updates

Name = TypeVar("Name", bound=Hashable)
SetWeights = Callable[[Sequence[float]], None]
# What decides which tokens are kept, for cache keys.
KEPT_TOKENS = [LIKELIEST, EXACT_UP_TO]
# The arrays of each kind of entry that one pass fills.
_OBSERVED: dict[str, list[str]] = {
    "similarities": [field.name for field in fields(Similarities)],
    "losses": ["nll", "tokens"],
    "outputs": ["log_probs"],
    "states": ["states"],
    "kept": ["tokens"],
}


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
        self.cache = cache
        self.batch_size = batch_size
        self._members = cohort.by_name
        # On a GPU, `auto` means a different precision.
        self.identity = [identity, source.dtype, source.device, torch.cuda.is_available()]
        self.identity += [source.attention, source.chat_options]
        # In half precision the batch size may change values.
        self.half_precision = source.dtype in ("bfloat16", "float16") or (
            source.dtype == "auto" and torch.cuda.is_available()
        )
        self.identity.append(batch_size if self.half_precision else None)

    @property
    def _base(self) -> LoadedModel:
        try:
            return load_model(self._source)
        except InputError as error:
            raise UnavailableError(str(error)) from error

    @property
    def modules(self) -> Sequence[str]:
        """Names of the adapted modules."""
        return self._cohort.modules

    @property
    def positions(self) -> int | None:
        """Maximum sequence length of the base in tokens; None if unlimited or unknown."""
        return limits_of(self._source).positions

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base."""
        return self._base.tokenizer

    def sha256(self, name: str) -> str:
        """Returns the hash of a run's adapter."""
        return self._members[name].sha256

    def point(self, name: str) -> Point:
        """Returns the weights of a run."""
        return self._members[name].point

    def base_weight(self, module: str, shape: tuple[int, int]) -> Array:
        """Returns W0 of a module in float64, shape (out, in)."""
        weight: Array = base_weight(self._base.model, module, shape).double().cpu().numpy()
        return weight

    def curves(self, pairs: Sequence[Pair], sequences: TeacherForced, settings: Connectivity) -> dict[Pair, Curve]:
        """Computes the loss on the straight path between the runs of each pair; endpoints once per run."""
        alphas = np.linspace(0, 1, settings.points)
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        about = [self.identity, sequences.key]
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
                    ends[name] = self._end(name, end_keys[name], sequences, bar.update)
            for pair in pairs:
                if pair not in lines:
                    # Cached in the order of the hashes, so that (b, a) finds the result of (a, b).
                    weights = [[1 - alpha, alpha] for alpha in alphas[1:-1]]
                    between = self._losses(self._in_order(pair), weights, sequences, bar.update)
                    found = {"nll": [losses.nll for losses in between]}
                    lines[pair] = self.cache.save("line", line_keys[pair], found)
        curves = {}
        for a, b in pairs:
            along = lines[a, b]["nll"] if self._in_order((a, b)) == (a, b) else lines[a, b]["nll"][::-1]
            points = [ends[a]["nll"], *along, ends[b]["nll"]]
            losses = [SequenceNll(nll, ends[a]["tokens"]) for nll in points]
            curves[a, b] = curve(alphas, losses, settings.resamples)
        return curves

    def losses_at_end(self, name: str, sequences: TeacherForced) -> None:
        """Measures the loss of a run, unless that was done before; cached for `curves`."""
        key = [[self.identity, sequences.key], self._members[name].sha256]
        if not self._known("losses", {name: key}, ["nll", "tokens"]):
            self._end(name, key, sequences, lambda: None)

    def _end(self, name: str, key: Any, sequences: TeacherForced, done: Callable[[], object]) -> Arrays:
        [at_end] = self._losses([name], [[1.0]], sequences, done)
        return self.cache.save("losses", key, {"nll": at_end.nll, "tokens": at_end.tokens})

    def _known(self, kind: str, keys: Mapping[Name, Any], names: Sequence[str]) -> dict[Name, Arrays]:
        """Loads the cached results for `keys`."""
        loaded = {name: self.cache.load(kind, key, names) for name, key in keys.items()}
        return {name: arrays for name, arrays in loaded.items() if arrays is not None}

    def _in_order(self, pair: Pair) -> Pair:
        a, b = sorted(pair, key=lambda name: self._members[name].sha256)
        return (a, b) if self._members[a].sha256 != self._members[b].sha256 else pair

    def tokens(self, sequences: TeacherForced) -> Sequences:
        """Returns the token ids, after checking that the base can process them."""
        tokens = sequences.tokens(self._base.tokenizer)
        self.require(str(sequences.frozen.folder / "rollouts.parquet"), tokens, sequences.rows.index.tolist())
        return tokens

    def require(self, where: str, tokens: Sequences, rows: Sequence[int] | None = None) -> None:
        """Checks that the base can process the sequences of `where`, whose rows have these numbers."""
        limits_of(self._source).require_sequences(where, tokens.prompts, tokens.completions, rows)

    def _losses(
        self,
        names: Sequence[str],
        weights: Sequence[Sequence[float]],
        sequences: TeacherForced,
        done: Callable[[], object],
    ) -> list[SequenceNll]:
        tokens = self.tokens(sequences)
        losses = []
        with ExitStack() as stack:
            model, set_weights = stack.enter_context(self.between(names))
            for at in weights:
                set_weights(at)
                losses.append(sequence_losses(model, tokens, self.batch_size))
                done()
        return losses

    def observe(self, names: Sequence[str], sequences: TeacherForced, settings: Cka) -> None:
        """Runs the base and each of `names` once over the sequences; all that measures need of a pass is cached."""
        every: tuple[str | None, ...] = (None, *names)
        missing = [
            name for name in every if any(self._load(kind, name, sequences, settings) is None for kind in _OBSERVED)
        ]
        # The base comes first: it determines the outlier dimensions and the tokens that are kept.
        for name in bar(missing, "forward passes", "model"):
            self._observe(name, sequences, settings)

    def _observe(self, name: str | None, sequences: TeacherForced, settings: Cka) -> None:
        tokens = self.tokens(sequences)
        outliers, kept = None, None
        if name is not None:
            outliers = self._loaded("similarities", None, sequences, settings)["outliers"]
            kept = self.kept(sequences, settings)
        batches: list[Batch] = []
        with self.model(name) as model:

            def features() -> Iterator[np.ndarray]:
                for batch in observe(model, tokens, self.batch_size, settings.pooling, kept):
                    assert batch.features is not None
                    batches.append(replace(batch, features=None))
                    yield batch.features

            sizes = minibatch_sizes(len(tokens.prompts), settings.minibatch)
            found = similarities(minibatches_of(features(), sizes), outliers)
        observation = joined(batches)
        lengths = np.array([len(ids) for ids in tokens.completions])
        entries = {
            "similarities": vars(found),
            "losses": {"nll": np.concatenate([batch.nll for batch in batches]), "tokens": lengths},
            "outputs": {"log_probs": observation.log_probs},
            "states": {"states": observation.states},
        }
        if name is None:
            entries["kept"] = {"tokens": np.concatenate([batch.tokens for batch in batches])}
        for kind, arrays in entries.items():
            self.cache.save(kind, self._key(kind, name, sequences, settings), arrays)

    @contextmanager
    def model(self, name: str | None) -> Iterator[Any]:
        """Yields the base (None), or the base with the update of a run."""
        if name is None:
            yield self._base.model
        else:
            with self.between([name]) as (model, set_weights):
                set_weights([1.0])
                yield model

    @contextmanager
    def between(self, names: Sequence[str]) -> Iterator[tuple[Any, SetWeights]]:
        """Yields the base and a function that adds the updates of runs to it, each times a weight.

        A whole model moves all weights of the base, including those that are not among the compared modules.
        """
        places = [self._members[name].point for name in names]
        whole = [place.is_whole for place in places]
        with ExitStack() as stack:
            models = [place.folder for place in places if place.is_whole]
            adapters = [stack.enter_context(place.open()) for place in places if not place.is_whole]
            model = self._base.model
            setters: list[tuple[bool, SetWeights]] = []
            if models:
                model, set_models = stack.enter_context(between_models(model, models))
                setters.append((True, set_models))
            if adapters:
                model, set_updates = stack.enter_context(self.with_updates(*adapters))
                setters.append((False, set_updates))

            def set_weights(weights: Sequence[float]) -> None:
                for kind, setter in setters:
                    setter([weight for weight, is_whole in zip(weights, whole, strict=True) if is_whole is kind])

            yield model, set_weights

    def with_updates(self, *updates: Updates) -> AbstractContextManager[tuple[Any, SetWeights]]:
        """Adds weighted updates to the base, as `interpolated_model`."""
        return interpolated_model(self._base.model, self.modules, *updates)

    def _key(self, kind: str, name: str | None, sequences: TeacherForced, settings: Cka) -> Any:
        sha256 = None if name is None else self._members[name].sha256
        about: list[Any] = [self.identity, sequences.key]
        about += {"similarities": [settings.pooling, settings.minibatch], "losses": []}.get(kind, KEPT_TOKENS)
        return [about, sha256]

    def _load(self, kind: str, name: str | None, sequences: TeacherForced, settings: Cka) -> Arrays | None:
        if kind == "kept" and name is not None:
            return {}
        return self.cache.load(kind, self._key(kind, name, sequences, settings), _OBSERVED[kind])

    def _loaded(self, kind: str, name: str | None, sequences: TeacherForced, settings: Cka) -> Arrays:
        found = self._load(kind, name, sequences, settings)
        if found is None:
            raise InputError(f"{self.cache.folder}: what was just measured cannot be read")
        return found

    def kept(self, sequences: TeacherForced, settings: Cka) -> np.ndarray:
        """Returns the tokens that the base keeps at each scored position, after `observe`."""
        return self._loaded("kept", None, sequences, settings)["tokens"]

    def observation(self, name: str | None, sequences: TeacherForced, settings: Cka) -> Observation:
        """Returns what a run (None: the base) does on the sequences, after `observe`."""
        outputs, states = (self._loaded(kind, name, sequences, settings) for kind in ("outputs", "states"))
        return Observation(outputs["log_probs"], states["states"])

    def sequence_nll(self, name: str | None, sequences: TeacherForced, settings: Cka) -> SequenceNll:
        """Returns the loss of a run (None: the base) on the sequences, after `observe`."""
        known = self._loaded("losses", name, sequences, settings)
        return SequenceNll(known["nll"], known["tokens"])

    def ckas(self, pairs: Sequence[Pair], sequences: TeacherForced, settings: Cka) -> dict[Pair, CkaOfPair]:
        """Computes CKA of each pair, and of each of its runs with the base, after `observe`."""
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        found = {}
        for name in (None, *names):
            known = self._loaded("similarities", name, sequences, settings)
            found[name] = Similarities(known["whole"], known["without_outlier"], known["outliers"], int(known["n"]))
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


def joined(batches: Sequence[Batch]) -> Observation:
    """Joins the batches of one pass."""
    states = [batch.states for batch in batches if batch.states is not None]
    return Observation(np.concatenate([batch.log_probs for batch in batches]), np.concatenate(states, axis=2))


def bar(steps: Sequence[Any], phase: str, unit: str) -> Any:
    """Shows progress over `steps`."""
    return tqdm(steps, desc=phase, unit=unit, leave=False, dynamic_ncols=True, disable=not steps)
