"""Training a pruned model: data, steps, report."""
