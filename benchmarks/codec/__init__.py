"""The parts of benchmarks.codecs: text, model, regimes, states on disk, codecs, timing, targets."""
