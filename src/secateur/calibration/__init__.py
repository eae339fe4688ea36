"""Text in, statistics out: windows of tokens, blocks one at a time, what their matrices multiply."""
