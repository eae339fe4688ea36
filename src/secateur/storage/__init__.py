"""Weights in fewer bytes: formats of tensors, and what packs a checkpoint."""
