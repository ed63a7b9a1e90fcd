"""Runs, sweeps and benchmarks in one document: what was measured of each, side by side."""
