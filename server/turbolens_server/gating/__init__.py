"""Learned region gates: which tokens of the text each position of a cross-attention may hear (arXiv 2509.15357)."""
