"""The only place for private names and patches of Keras and TensorFlow.

Each function is named after what it does, and has a contract test that says what broke when Keras
changes. Imports nothing else of this package.
"""
