"""Runs that differ in a few settings: read from a file, run one by one, put into one table."""
