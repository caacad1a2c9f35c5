"""Shards of latents made elsewhere, a sample a record, used where they lie through an index."""
