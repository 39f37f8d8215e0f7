"""How many faults of each kind are injected: few in `make test`, many in `make faults` (`python -m tests.faults`)."""

from __future__ import annotations

import os
import random

import pytest

from tests.faults.prepared import Prepared

SEED = int(os.environ.get("LOSSLENS_FAULTS_SEED", "21"))


def per_kind(short: int) -> int:
    """Number of faults of a kind: `short` in `make test`, at least LOSSLENS_FAULTS_PER_KIND where that is set.

    Args:
        short: What the tests can afford: a few seconds for all that a file does.
    """
    return max(short, int(os.environ.get("LOSSLENS_FAULTS_PER_KIND", "0")))


def dice(kind: str) -> random.Random:
    """A random generator for a kind of faults, the same in every process: its faults can be injected again."""
    return random.Random(f"{SEED} {kind}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    common = tmp_path_factory.getbasetemp()
    folder = (common.parent if "PYTEST_XDIST_WORKER" in os.environ else common) / "faults"
    folder.mkdir(exist_ok=True)
    return Prepared(folder)
