"""Checkpoints in the forms that other engines load: GGUF for llama.cpp, uniform sizes for everything else."""
