"""The parts of benchmarks.kill_loop: the board that processes share, and what the forked children do."""
