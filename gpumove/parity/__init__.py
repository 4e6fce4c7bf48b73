"""Is it the same job? What is recorded of every step and machine, and what comes of comparing it."""
