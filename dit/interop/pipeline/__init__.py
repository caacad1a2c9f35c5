"""diffusers' DiT in and out: transformers, schedulers, whole pipeline folders."""
