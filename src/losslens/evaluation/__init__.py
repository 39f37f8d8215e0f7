"""Answers to held-out problems, and what they show."""
