"""``gpumove run``: a parent of torchrun that turns notices into requests, and what became of them into exit codes."""
