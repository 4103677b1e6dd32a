"""Snapshots in memory and in a directory.

Knows models only as something whose weights are saved and loaded. May import `keras_compat`.
"""
