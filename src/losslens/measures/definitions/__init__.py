"""The measures: each module holds functions and the entries (`MEASURES`) that name and define them."""
