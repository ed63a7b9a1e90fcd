"""Measures kernels, inner steps, meta steps and latencies against their floors and baselines.

A section is a list of *groups*; a group is cases over the same tensors, timed in turn, so that
their ratios hold on a machine whose speed varies.
"""
