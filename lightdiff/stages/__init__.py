"""One file per command; each `run(settings)` reads top to bottom like the recipe it is."""
