"""plan -> apply -> verify for a recipe: the only room that knows the order."""
