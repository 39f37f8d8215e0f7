"""All that one command does: a job, a sweep."""
