"""Build the device mesh, shard arrays, and coordinate the processes of a run."""
