"""One suite for all back ends: whoever adds a store runs it here."""
