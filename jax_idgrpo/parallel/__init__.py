"""The device mesh, its table of shardings, and several processes as one run."""
