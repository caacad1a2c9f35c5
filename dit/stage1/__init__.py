"""Stage 1: training the autoencoder whose latents the diffusion model learns."""
