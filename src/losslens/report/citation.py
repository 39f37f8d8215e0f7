"""Citations shown in a report: the software, as in CITATION.cff, and the study that it reproduces."""

from __future__ import annotations

from collections.abc import Sequence

TITLE = "LossLens: what did each reasoning-distillation loss do to the weights?"
STUDY = "Weight-Space Geometry of Offline Reasoning Training"
ARXIV = "2606.23740"
AUTHORS = ("Nikolich, Aleksandr", "Kiselev, Igor", "Platonov, Vladimir", "Romanova, Karina")


def works(version: str) -> list[tuple[str, str, str]]:
    """Returns the kind, reference text and BibTeX of each work to cite, for the version that made the numbers."""
    of_version = f", version {version}" if version else ""
    return [
        (
            "this software",
            f"The LossLens authors. {TITLE} Software{of_version}, 2026.",
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
