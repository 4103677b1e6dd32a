"""Export: all members merged into one Keras model, and that model as a file for serving.

May import `inference`, `storage` and `keras_compat`.
"""
