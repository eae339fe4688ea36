"""Weights in fewer bytes: formats of tensors, what packs a checkpoint, and how transformers loads it."""
