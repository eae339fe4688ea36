"""How each family of methods writes its blocks."""
