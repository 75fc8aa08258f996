"""Data: images to tensors, the order of items, cached latents, drawn toy faces."""
