"""What looks, compares, evaluates and imports: built on the core, never imported by it."""
