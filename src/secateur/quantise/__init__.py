"""Weights in a few bits: grids, rounding that makes up for itself, and what goes where. Tensors only."""
