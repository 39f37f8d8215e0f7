"""The tables of an analysis, as report and W&B read them."""
