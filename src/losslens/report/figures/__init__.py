"""Figures for papers, from the tables of an analysis: as vectors and as pixels, one file a figure."""
