"""LOOKING: runs seen from outside, without owning them and without torch: list, verify, export, diagnose."""
