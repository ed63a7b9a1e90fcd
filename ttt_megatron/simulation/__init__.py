"""A run over many processes in one: what each would build, read, hold and send. Trains nothing."""
