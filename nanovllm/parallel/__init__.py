"""Several processes as one engine: the workers and the group of ranks."""
