"""Is a move worth it: what it would take and cost, from what the run has measured and from dated tables. No torch."""
