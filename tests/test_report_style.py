"""How losses look: told apart by every reader, with colours and without; and what they are called."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from losslens.losses.presentation import builtin_presentations
from losslens.report import names
from losslens.tables.descriptions import describe, glossary
from losslens.tables.style import METHODS, PlotStyles, colour
from tests.conftest import ROOT

pytestmark = pytest.mark.fast

# Machado, Oliveira and Fernandes 2009, full severity, on linear sRGB.
SEEN = {
    "by most": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def linear(ink: str) -> np.ndarray:
    rgb = np.array([int(ink[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = XYZ @ rgb.clip(0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """CIEDE2000 (Sharma, Wu and Dalal 2005) of two colours in L*a*b*."""
    mean = (np.hypot(*one[1:]) + np.hypot(*other[1:])) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean**7 / (mean**7 + 25**7))
    a, b = np.array([one[1], other[1]]) * stretch, np.array([one[2], other[2]])
    chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
    turn = (hue[1] - hue[0] + 180) % 360 - 180
    d_hue = 2 * np.sqrt(chroma.prod()) * np.sin(np.radians(turn / 2))
    light, grey, where = (one[0] + other[0]) / 2, chroma.mean(), (hue[0] + turn / 2) % 360
    cosines = [np.cos(np.radians(factor * where + shift)) for factor, shift in ((1, -30), (2, 0), (3, 6), (4, -63))]
    weight = 1 + np.dot([-0.17, 0.24, 0.32, -0.2], cosines)
    l_term = (other[0] - one[0]) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    c_term, h_term = (chroma[1] - chroma[0]) / (1 + 0.045 * grey), d_hue / (1 + 0.015 * grey * weight)
    blue = np.radians(60 * np.exp(-(((where - 275) / 25) ** 2)))
    cross = -2 * np.sqrt(grey**7 / (grey**7 + 25**7)) * np.sin(blue) * c_term * h_term
    return float(np.sqrt(l_term**2 + c_term**2 + h_term**2 + cross))


def test_the_difference_of_two_colours_is_that_of_the_paper() -> None:
    """Pairs 1, 7 and 17 of Sharma, Wu and Dalal's table 1."""
    for one, other, wanted in (
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ):
        assert difference(np.array(one), np.array(other)) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("reader", SEEN)
def test_the_colours_of_the_papers_losses_are_told_apart(reader: str) -> None:
    papers = [name for name, known in builtin_presentations().items() if known.place in range(1, 7)]
    assert len(papers) == 6
    seen = {method: lab(np.array(SEEN[reader]) @ linear(colour(method))) for method in papers}
    apart = {(a, b): difference(seen[a], seen[b]) for a, b in itertools.combinations(seen, 2)}
    assert min(apart.values()) > 13, min(apart, key=apart.__getitem__)
    # Those that a reader holds against each other most.
    for pair in (("rift", "dft"), ("grpo", "dpo"), ("sft", "rft"), ("sft", "grpo"), ("rft", "rift")):
        assert apart[pair] > 17, pair


def test_twenty_losses_look_different_without_a_colour_too() -> None:
    """Of one method, of several at several rates, of methods that are not known."""
    for losses in (
        [(f"dpo-{number}", "dpo") for number in range(20)],
        [(method, method) for method in METHODS],
        [(f"{method}-{rate}", method) for rate in "abcd" for method in list(METHODS)[-10:]],
        [(f"own-{number}", f"own-{number}") for number in range(20)],
        [(f"{method}-{number}", method) for method in ("sft", "another") for number in range(20)],
    ):
        looks = PlotStyles(losses)
        found = [looks.of(*loss) for loss in losses]
        assert len({(look.colour, look.dash, look.symbol) for look in found}) == len(losses)
        assert len({look.symbol for look in found}) == len(losses)
        assert len({(look.marker["marker"], look.marker["fillstyle"]) for look in found}) == len(losses)
        assert len({look.sample(line=False) for look in found}) == len(losses)


def test_the_first_loss_of_a_method_looks_the_same_everywhere() -> None:
    many = PlotStyles([*((f"sft-{number}", "sft") for number in range(30)), ("dpo", "dpo")])
    alone = PlotStyles([("dpo", "dpo")])
    assert many.of("dpo", "dpo") == alone.of("dpo", "dpo")
    assert len({PlotStyles().of(method, method).symbol for method in METHODS}) == len(METHODS)


def test_long_names_are_cut_and_stay_different() -> None:
    long = "a_name_of_sixty_letters_for_a_method_that_somebody_wrote_own"
    given = [f"{long} 1e-3 bias={bias}" for bias in (0.0, 0.1, 0.2)] + [f"{long[:30]}{n}{long[30:]}" for n in range(3)]
    found = names.all_cut(["SFT", *given])
    assert found[0] == "SFT"
    assert len(set(found)) == len(found)
    assert max(map(len, found)) <= 28
    assert [name[-4:] for name in found[1:4]] == ["=0.0", "=0.1", "=0.2"]
    assert names.all_cut([given[0], given[0]]) == [found[1]] * 2


def test_what_a_run_is_called() -> None:
    about = {"label": "", "method": "grpo", "learning_rate": 1e-3, "seed": 1.0, "init_seed": 2.0}
    run = pd.Series({"number": 3, "run": "x", **about})
    assert names.run_name(run, inits=False) == "3 GRPO 1e-3 s1"
    assert names.run_name(run, inits=True) == "3 GRPO 1e-3 s1 A2"
    run["label"] = "grpo lr 0.001 bias 0.1 max_steps 20 s1 init 2"
    assert names.run_name(run, inits=True, whole_name=True) == "3 GRPO 1e-3 bias 0.1 max_steps 20 s1 A2"
    theirs = run.copy()
    theirs[["learning_rate", "seed", "init_seed"]] = np.nan
    assert names.run_name(theirs, inits=True) == "3 x"


def test_plain_words_for_each_loss_and_measure() -> None:
    methods, measures = (
        " ".join((ROOT / "docs" / "reference" / page).read_text(encoding="utf-8").split())
        for page in ("losses/index.md", "measures.md")
    )
    for text in (known.summary for known in builtin_presentations().values()):
        assert re.fullmatch(r"[A-Z].+\.", text)
        assert text in methods
    for text in glossary().values():
        assert text in measures
    assert describe("cosine to SFT at the same rate") == glossary()["cosine"]
    assert describe("effective rank") == glossary()["effective rank"]
    assert describe("verdict") == ""
