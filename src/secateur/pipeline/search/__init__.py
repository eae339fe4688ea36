"""A supernet of pruned candidates and the search through it."""
