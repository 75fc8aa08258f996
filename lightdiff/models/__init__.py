"""Networks only: tensors in, tensors out. One architecture a file; each takes its own settings, never a stage's.

A further architecture is a file here, with its settings, and a row in `ARCHITECTURES` of `VAEArchitecture` or
`UNetArchitecture` (architectures.py). `original.py` is an example of both.
"""
