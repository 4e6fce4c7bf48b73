"""BYTES: the records, packs and codecs of the format, as pure functions. No I/O, no clock, no torch."""
