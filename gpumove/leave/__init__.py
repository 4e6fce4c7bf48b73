"""Leaving on a notice: the agreement of all ranks on a step, and what is done with the time that is left."""
