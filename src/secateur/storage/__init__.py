"""Weights in fewer bytes: formats of single tensors, what packs a checkpoint, and how transformers loads it."""
