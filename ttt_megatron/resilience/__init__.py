"""What befalls a run, written down, and starting it again. Knows no torch."""
