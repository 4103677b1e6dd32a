"""Arrays in files, read while other threads parse Python."""

import ast
import contextlib
import threading

import numpy as np
import pytest

from snapshot_ensemble.storage.array_files import array_headers, read_arrays


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.arange(6.0).reshape(2, 3), b=np.asarray(3))
    return tmp_path / "arrays.npz"


@pytest.mark.parametrize("failures", [0, 1, 7])
def test_a_parser_that_fails_by_another_thread_is_asked_again(path, failures, monkeypatch):
    left, original = [failures], ast.literal_eval

    def literal_eval(text):
        if left[0]:
            left[0] -= 1
            raise SystemError("AST constructor recursion depth mismatch (before=51, after=44)")
        return original(text)

    monkeypatch.setattr(ast, "literal_eval", literal_eval)
    assert array_headers(path) == {"a": ((2, 3), np.dtype("float64")), "b": ((), np.dtype("int64"))}
    left[0] = failures
    np.testing.assert_equal(read_arrays(path), {"a": np.arange(6.0).reshape(2, 3), "b": 3})


def test_a_parser_that_always_fails_is_not_asked_forever(path, monkeypatch):
    def literal_eval(text):
        raise SystemError("AST constructor recursion depth mismatch (before=51, after=44)")

    monkeypatch.setattr(ast, "literal_eval", literal_eval)
    with pytest.raises(SystemError):
        array_headers(path)
    with pytest.raises(SystemError):
        read_arrays(path)


def test_while_other_threads_parse(path):
    ended = threading.Event()

    def parse():
        while not ended.is_set():
            with contextlib.suppress(SystemError):  # These threads disturb each other, too.
                ast.parse("f(x)[1] + (2, {3: [4, 5]})\n" * 50)

    threads = [threading.Thread(target=parse) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert set(read_arrays(path)) == set(array_headers(path)) == {"a", "b"}
    finally:
        ended.set()
        for thread in threads:
            thread.join()
