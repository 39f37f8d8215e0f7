"""From finished runs to tables: who is compared, what is measured (once, and kept), what it sums up to."""
