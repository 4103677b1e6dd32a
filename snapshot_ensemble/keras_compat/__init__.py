"""The only package that uses private names of Keras and TensorFlow, or patches them.

Each function has a contract test that shows what broke when Keras changes. Imports nothing else
of this package.
"""
