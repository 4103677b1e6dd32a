"""A patch of a class that only affects the code that activated it."""

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any


class _Place:
    """A method or function that patches replace: all of them by one wrapper.

    With a wrapper for each patch, two that end in another order than they began, in two threads,
    would leave one of them behind.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        # The replacements in the present context with their values, the innermost first.
        self.active: contextvars.ContextVar[_Active] = contextvars.ContextVar(name, default=())
        self._lock = threading.Lock()
        self._users = 0
        self._inherited = False
        self._original: Any = None
        self._patched: Any = None

    def install(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._inherited = self._name not in vars(self._owner)
            self._original = getattr(self._owner, self._name)
            self._patched = self._wrapper(self._original)
            setattr(self._owner, self._name, self._patched)

    def remove(self) -> None:
        with self._lock:
            self._users -= 1
            # If other code has patched the method since, its patch calls this one: both must stay.
            if self._users or vars(self._owner).get(self._name) is not self._patched:
                return
            if self._inherited:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self._original)

    def _wrapper(self, original: Any) -> Any:
        active = self.active

        def call(rest: _Active, *args: Any, **kwargs: Any) -> Any:
            if not rest:
                return original(*args, **kwargs)
            patch, value = rest[-1]
            return patch.replacement(value, functools.partial(call, rest[:-1]), *args, **kwargs)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return call(active.get(), *args, **kwargs)

        return wrapper


_Active = tuple[tuple["ContextPatch", Any], ...]
_places: dict[tuple[int, str], _Place] = {}


class ContextPatch:
    """Replaces a method of a class or a function of a module, but only in the caller's context.

    The class or module is patched while at least one caller needs it, and is restored afterwards.
    Other threads, and code in the same thread after `active()` has ended, still get the original
    method: the patch checks a `ContextVar`, which starts empty in each thread.

    Example:

    >>> class Greeter:
    ...     def greet(self):
    ...         return "hello"
    >>> def greet_by_name(name, original, self):
    ...     return f"{original(self)} {name}"
    >>> patch = ContextPatch(Greeter, "greet", greet_by_name)
    >>> with patch.active("you"):
    ...     Greeter().greet()
    'hello you'
    >>> Greeter().greet()
    'hello'

    Args:
        owner: The class or module.
        name: The method's or function's name.
        replacement: Called as `replacement(value, original, *args, **kwargs)`, where `value` is the
            argument of `active`, and the first of `args` is the instance if it is a method.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.replacement = replacement
        # A place keeps its owner alive, so that its `id` stays its own.
        self._place = _places.setdefault((id(owner), name), _Place(owner, name))

    @contextlib.contextmanager
    def active(self, value: Any) -> Iterator[None]:
        """Activates the replacement in this context; `value` must not be `None`."""
        place = self._place
        place.install()
        try:
            others = (pair for pair in place.active.get() if pair[0] is not self)
            token = place.active.set((*others, (self, value)))
            try:
                yield
            finally:
                place.active.reset(token)
        finally:
            place.remove()

    @property
    def value(self) -> Any:
        """The argument of `active` in this context; None outside of one."""
        return next((value for patch, value in self._place.active.get() if patch is self), None)
