"""From shards to batches: which sample stands where, and how it gets there."""
