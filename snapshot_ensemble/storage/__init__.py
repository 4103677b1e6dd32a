"""Snapshots in memory and in a directory.

The storage saves and loads the weights of models; it does not run them. May import `keras_compat`.
"""
