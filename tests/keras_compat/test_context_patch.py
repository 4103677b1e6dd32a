"""A patch only affects the code that activated it, in all threads, and is removed afterwards."""

import threading

import pytest

from snapshot_ensemble.keras_compat.context_patch import ContextPatch


class Greeter:
    def greet(self, mark=""):
        return f"hello{mark}"


class Inheriting(Greeter):
    pass


def by_name(name, original, self, mark=""):
    return f"{original(self, mark)} {name}"


@pytest.mark.parametrize("owner", [Greeter, Inheriting])
def test_a_patch_is_active_only_inside_its_context(owner):
    before = dict(vars(owner))
    patch = ContextPatch(owner, "greet", by_name)
    with patch.active("Ada"):
        assert owner().greet("!") == "hello! Ada"
        with patch.active("Bob"):
            assert owner().greet() == "hello Bob"
        assert owner().greet(mark="?") == "hello? Ada"
    assert owner().greet() == "hello"
    assert dict(vars(owner)) == before


def test_a_patch_is_removed_after_an_exception():
    before = vars(Greeter)["greet"]
    patch = ContextPatch(Greeter, "greet", by_name)
    with pytest.raises(KeyError), patch.active("Ada"):
        raise KeyError
    assert vars(Greeter)["greet"] is before


def test_two_patches_of_one_method_are_nested_and_end_in_any_order():
    before = vars(Greeter)["greet"]
    one = ContextPatch(Greeter, "greet", by_name)
    other = ContextPatch(Greeter, "greet", by_name)
    with one.active("Ada"), other.active("Bob"):
        assert Greeter().greet() == "hello Ada Bob"
        assert (one.value, other.value) == ("Ada", "Bob")
    with other.active("Bob"), one.active("Ada"):
        assert Greeter().greet() == "hello Bob Ada"
    begun, ended = threading.Event(), threading.Event()

    def outlive():
        with other.active("Bob"):
            begun.set()
            ended.wait()
            assert Greeter().greet() == "hello Bob"

    thread = threading.Thread(target=outlive)
    with one.active("Ada"):
        thread.start()
        begun.wait()
    assert Greeter().greet() == "hello"
    ended.set()
    thread.join()
    assert vars(Greeter)["greet"] is before


def test_a_later_patch_by_other_code_stays():
    before = vars(Greeter)["greet"]
    patch = ContextPatch(Greeter, "greet", by_name)
    with patch.active("Ada"):
        ours = Greeter.greet
        Greeter.greet = lambda self: ours(self) + ", indeed"
    try:
        assert Greeter().greet() == "hello, indeed"
    finally:
        Greeter.greet = before


def test_each_thread_has_its_own_value():
    """Each of 20 threads activates the patch 200 times and sees only its own value."""
    before = vars(Greeter)["greet"]
    patch, wrong = ContextPatch(Greeter, "greet", by_name), []
    begin = threading.Barrier(20)

    def greet(number):
        begin.wait()
        for _ in range(200):
            if number % 4 == 0:  # Other code, which runs at the same time.
                wrong.extend(g for g in [Greeter().greet()] if g != "hello")
                continue
            with patch.active(f"number {number}"):
                wrong.extend(g for g in [Greeter().greet()] if g != f"hello number {number}")

    threads = [threading.Thread(target=greet, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert vars(Greeter)["greet"] is before
