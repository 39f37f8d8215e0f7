"""Evaluation on held-out problems: generation of answers, their verification, and statistics."""
