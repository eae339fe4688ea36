"""One data file a model type."""
