"""Everything a user can set."""
