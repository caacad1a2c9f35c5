"""Ablations: named changes of one training config, compared at equal FLOPs."""
