"""Figures for papers, drawn from the tables of an analysis as PDF and PNG; one module per figure."""
