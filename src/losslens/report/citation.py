"""How to cite what a report shows: the software, as CITATION.cff has it, and the study that it makes repeatable."""

from __future__ import annotations

from collections.abc import Sequence

TITLE = "LossLens: what did each reasoning-distillation loss do to the weights?"
STUDY = "Weight-Space Geometry of Offline Reasoning Training"
ARXIV = "2606.23740"
AUTHORS = ("Nikolich, Aleksandr", "Kiselev, Igor", "Platonov, Vladimir", "Romanova, Karina")


def works(version: str) -> list[tuple[str, str, str]]:
    """What to cite, for the version that made the numbers: what it is, its text in a list of references, its BibTeX."""
    said = f", version {version}" if version else ""
    return [
        (
            "this software",
            f"The LossLens authors. {TITLE} Software{said}, 2026.",
            "@software{losslens,\n"
            "  author  = {{The LossLens authors}},\n"
            f"  title   = {{{{{TITLE}}}}},\n"
            + (f"  version = {{{version}}},\n" if version else "")
            + "  year    = {2026},\n"
            "}",
        ),
        (
            "the study",
            f"{_listed(AUTHORS)}. {STUDY}. arXiv:{ARXIV}, 2026.",
            f"@article{{arxiv{ARXIV.replace('.', '')},\n"
            f"  author  = {{{' and '.join(AUTHORS)}}},\n"
            f"  title   = {{{{{STUDY}}}}},\n"
            f"  journal = {{arXiv preprint arXiv:{ARXIV}}},\n"
            "  year    = {2026},\n"
            "}",
        ),
    ]


def _listed(authors: Sequence[str]) -> str:
    """Their names as they are spoken, in one line."""
    *first, last = (" ".join(reversed(author.split(", "))) for author in authors)
    return f"{', '.join(first)} and {last}"
