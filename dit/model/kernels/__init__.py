"""Fused kernels of a block's memory-bound parts, each with a plain reference, and the key that chooses them."""
