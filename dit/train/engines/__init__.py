"""What applies updates: plain torch on one process, DeepSpeed's ZeRO on many."""
