"""The traffic plane: what stands between a program and the shards."""
