"""Networks only: tensors in, tensors out. Each takes its own settings object, never a stage's."""
