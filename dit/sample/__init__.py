"""Sampling: a denoiser made of a network, guidance around it, grids of times and the solvers.

The files of solvers and guidances are imported here, so that their registries are full wherever any of
`dit.sample` is.
"""

from dit.sample import adaptive, ancestral, cfg_zero, correct, langevin, multistep, runge_kutta, sde

__all__ = ["adaptive", "ancestral", "cfg_zero", "correct", "langevin", "multistep", "runge_kutta", "sde"]
