"""Seeding for a while: all generators go on afterwards as if nothing had been drawn."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapshot_ensemble.keras_compat.random_seed import global_seed, seeded


def seed(number):
    keras.backend.clear_session(free_memory=False)  # Some versions keep the global generator.
    keras.utils.set_random_seed(number)


def draws():
    numbers = [random.random(), np.random.rand(), float(keras.random.uniform(()))]  # noqa: NPY002
    shuffled = tf.data.Dataset.range(20).shuffle(20)
    return [*numbers, float(tf.random.uniform(())), *(int(i) for i in shuffled)]


def draws_and_fails():
    draws()
    raise KeyError


def test_inside_it_is_as_keras_seeds():
    seed(5)
    expected = draws()
    seed(6)
    with seeded(5):
        assert draws() == expected


def test_afterwards_the_generators_go_on():
    seed(6)
    expected = [draws(), draws()]
    seed(6)
    actual = [draws()]
    with pytest.raises(KeyError), seeded(5):
        draws_and_fails()
    assert [*actual, draws()] == expected


def test_a_global_generator_that_was_not_made_yet_is_not_made():
    seed(6)
    expected = draws()
    seed(6)
    assert global_seed() is None
    with seeded(5):
        draws()
    assert global_seed() is None
    assert draws() == expected


def test_tensorflow_has_no_seed_afterwards_if_it_had_none():
    tf.random.set_seed(None)
    with seeded(5):
        pass
    first = draws()[3]
    with seeded(5):
        pass
    assert draws()[3] != first
