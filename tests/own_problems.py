"""A source of problems of one's own."""

from __future__ import annotations

from losslens.problems.reasoning_gym import ReasoningGym


class Own(ReasoningGym):
    """As reasoning-gym's, by another name."""
