"""The test suites of gpumove, and the real servers they run against."""
