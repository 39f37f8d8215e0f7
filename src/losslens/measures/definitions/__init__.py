"""The measures: each file has its functions, and the entries that say what they are called and what they mean."""
