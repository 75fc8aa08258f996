"""Several processes: what a launcher has told each, starting them on one machine, and what they exchange."""
