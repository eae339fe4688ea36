"""Safetensors checkpoints: read piece by piece, written part by part, resumed after a kill. No model here."""
