"""Kinds of models and data, and what each method must give for them, taken from Keras alone."""
