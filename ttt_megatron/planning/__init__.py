"""What a run will need: memory, FLOPs, transfers and time, from its configuration alone."""
