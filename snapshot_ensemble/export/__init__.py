"""One model to serve: many members as one Keras model, and that model as a file.

May import `inference`, `storage` and `keras_compat`.
"""
