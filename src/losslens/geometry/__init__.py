"""Measures of weight updates, of whatever kind. All arithmetic is float64."""
