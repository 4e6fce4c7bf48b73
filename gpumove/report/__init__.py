"""What a run has done so far, read from its stores: a page, a status, and nothing written there. No torch."""
