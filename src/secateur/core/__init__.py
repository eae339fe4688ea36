"""The vocabulary of the house: patterns, statistics, selection, errors. Tensors only: no model, no file."""
