"""MLflow: what a run's figures, settings and results are followed by.

A run writes what is to be logged into a journal in its folder (`journal`, `recorder`); another
thread, or a later command, uploads it (`uploader`). Training never speaks to a store itself, so a
store that is slow, away, or never there at all costs it nothing, and nothing is lost with a process
that is killed.
"""
