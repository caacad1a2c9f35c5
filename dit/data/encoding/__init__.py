"""Images to shards of latents, by any number of ranks."""
