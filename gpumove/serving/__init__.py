"""Named pointers to checkpoints: published, followed, and gated by the output probe."""
