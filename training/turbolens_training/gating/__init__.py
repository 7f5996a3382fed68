"""Training of learned region gates on a frozen model (MaskAttn-SDXL, arXiv 2509.15357)."""
