"""Sampling: a denoiser made of a network, guidance around it, grids of times and the solvers."""
