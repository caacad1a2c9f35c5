"""Images to latents and back, and how latents are normalised."""
