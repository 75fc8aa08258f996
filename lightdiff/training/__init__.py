"""The training loop and what it needs: where to compute, averaged weights, progress."""
