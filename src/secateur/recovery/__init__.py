"""What mends a pruned model: LoRA, training of all weights, distillation, least squares."""
