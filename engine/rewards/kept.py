"""Models in memory: equal settings share one, and it stays as long as somebody holds it.

A host that runs nodes for hours would fill its memory with every model that was ever tried. So it gives each reward on
its links a ``Place`` and scores within ``holding(place)``; when it drops the reward, the models go, unless another
place holds them too. Without a host the process itself holds them until it ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

T = TypeVar("T")


class Place:
    """Whoever has it has the models that were used within ``holding`` it, and those of its ``parts``."""

    def __init__(self, *parts: "Place"):
        self.parts = parts
        self.models: dict[Any, Any] = {}
        self.shared: WeakKeyDictionary[Place, Place] = WeakKeyDictionary()

    def shared_with(self, other: "Place | None") -> "Place":
        """The place for models that are used for both: it goes when one of them goes. None: this one."""
        return self if other is None else self.shared.setdefault(other, Place())


PROCESS = Place()
HOLDERS = [PROCESS]
"""The last one holds what is used. One list for all threads: a host runs one node at a time, and what a node starts in
the background must find the node's place."""


@contextmanager
def holding(place: Place) -> Iterator[None]:
    """Have ``place`` hold all models that are used meanwhile, loaded now or earlier."""
    HOLDERS.append(place)
    try:
        yield
    finally:
        HOLDERS.pop()


class Loads(NamedTuple):
    """How often a loader did its work."""

    misses: int


class Kept(Generic[T]):
    """A decorator for loaders, instead of ``functools.cache``, which would hold everything for ever.

    Arguments must be hashable, and what is loaded must allow weak references. Safe in several threads: who asks for
    what another one is loading waits for it. What a failure raises is raised anew next time.
    """

    def __init__(self, load: Callable[..., T]):
        update_wrapper(self, load)
        self.load, self.lock, self.misses = load, Lock(), 0
        self.alive: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()

    def __call__(self, *settings: Any) -> T:
        """What was loaded with these arguments before and is still held, else a new one; held from now on."""
        with self.lock:
            found = self.alive.get(settings)
            if found is None:
                found = self.alive[settings] = self.load(*settings)
                self.misses += 1
        HOLDERS[-1].models[self, settings] = found
        return found

    def cache_info(self) -> Loads:
        """As of ``functools.cache``."""
        return Loads(self.misses)

    def cache_clear(self) -> None:
        """Load anew from now on, and let the process go of what it holds."""
        with self.lock:
            self.alive.clear()
            self.misses = 0
        for key in [key for key in PROCESS.models if key[0] is self]:
            del PROCESS.models[key]
