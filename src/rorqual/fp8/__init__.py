"""Training in FP8 (report §3.3): products whose operands are E4M3 in tiles and blocks."""
