"""Configuration schemas of the entry scripts, and how options are parsed."""
