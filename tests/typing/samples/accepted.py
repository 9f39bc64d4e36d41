"""What a user writes, and the types that the checker must see. It is never run; no line may be complained of."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, ParamSpec, Protocol, TypeVar, assert_type

from coheld import (
    CoheldError,
    Lockable,
    LockTimeout,
    NotOwnerError,
    Owner,
    Statistics,
    holder,
    shared,
    snapshot,
    statistics,
    wait_for,
)

T = TypeVar("T")
P = ParamSpec("P")


class Testbed(Lockable):
    def __init__(self, size: int) -> None:
        super().__init__(lock_name="lab/bed-1", lock_backend="shm:")
        self.size = size

    @Lockable.locked
    def book(self, who: str, /, days: int = 1, *, free: bool = False) -> list[str]:
        return [who] * days if free else self.hurry(who)

    @Lockable.locked(timeout=2.5)
    def hurry(self, who: str) -> list[str]:
        return [who]

    @Lockable.locked(timeout=None)
    def wait(self) -> None: ...

    @Lockable.locked
    def choose(self, things: Iterable[T]) -> T:
        return next(iter(things))

    @property
    @Lockable.locked
    def length(self) -> int:
        return self.size

    @functools.cached_property
    @Lockable.locked
    def width(self) -> float:
        return 2.0

    def __create__(self) -> None: ...

    def __recover__(self, dead: Owner) -> None: ...


bed = Testbed(2)
assert_type(bed.book("ann", days=2, free=True), list[str])
assert_type(Testbed.book(bed, "ann"), list[str])
assert_type(bed.hurry("ann"), list[str])
assert_type(bed.choose([1, 2]), int)
assert_type(bed.choose("text"), str)
assert_type(bed.length, int)
assert_type(bed.width, float)

# acquire, release, with
assert_type(bed.acquire(), bool)
assert_type(bed.acquire(False), bool)
assert_type(bed.acquire(True, 1), bool)
assert_type(bed.acquire(blocking=True, timeout=0.5), bool)
assert_type(bed.acquire(block=False, timeout=None), bool)
bed.release()
with bed as same:
    assert_type(same, Testbed)
with Lockable(lock_name="gpu-0") as gpu:
    assert_type(gpu, Lockable)
with bed.__lock__ as lock:
    assert_type(lock.acquire(timeout=1.0), bool)
    lock.release()


def after_with() -> int:
    """`with` lets exceptions pass, so that this returns in every case."""
    with bed:
        return 1


# questions
assert_type(holder(bed), Owner | None)
assert_type(statistics(bed), Statistics)
assert_type(statistics(bed).acquisitions, int)
if owner := holder(bed):
    assert_type(owner.pid, int)
    assert_type(owner.method, str)
    assert_type(owner.since, float)
    assert_type(owner.alive(), bool)

# errors
try:
    bed.hurry("ann")
except LockTimeout as error:
    assert_type(error.owner, Owner | None)
    assert_type(error.waited, float | None)
    assert_type(error.resource, str | None)
    timed_out: TimeoutError = error
except NotOwnerError as error:
    asserted: AssertionError = error
    run_time: RuntimeError = error
    ours: CoheldError = error


# beside other bases
class Shape(ABC):
    @abstractmethod
    def area(self) -> int: ...


class Square(Lockable, Shape):
    @Lockable.locked
    def area(self) -> int:
        return 1


class Half(Lockable, ABC):
    @Lockable.locked
    @abstractmethod
    def area(self) -> int: ...


class Whole(Half):
    @Lockable.locked
    def area(self) -> int:
        return 2


class Measured(Protocol):
    def area(self) -> int: ...


class Box(Lockable, Generic[T]):
    def __init__(self, content: T) -> None:
        super().__init__()
        self.content = content

    @Lockable.locked
    def get(self) -> T:
        return self.content


class Table(Lockable, dict[str, int]):
    @Lockable.locked
    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value)


class Number(Lockable, int): ...


@dataclass
class Data(Lockable):
    x: int

    def __post_init__(self) -> None:
        super().__init__()

    @Lockable.locked
    def get(self) -> int:
        return self.x


measured: list[Measured] = [Square(), Whole()]
assert_type(Box("text").get(), str)
assert_type(Data(x=1).get(), int)
assert_type(Table({"a": 1})["a"], int)
number: int = Number(7)


# handed on
def call(method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return method(*args, **kwargs)


assert_type(call(bed.book, "ann", days=2), list[str])
assert_type(functools.partial(bed.hurry, "ann")(), list[str])


# shared state
class Shelf(Lockable, max_state=1 << 20):
    count: int = shared(0)
    owner: str | None = shared(None)
    items: list[str] = shared(default_factory=list)
    index: dict[str, list[int]] = shared(default_factory=dict)

    def __create__(self) -> None:
        self.count = 1

    @Lockable.locked(when=lambda self: self.items, timeout=1.0)
    def take(self) -> str:
        self.count -= 1
        return self.items.pop(0)

    @Lockable.locked(atomic=True)
    def put(self, item: str, *places: int) -> None:
        self.items.append(item)
        self.index.setdefault(item, []).extend(places)

    @Lockable.locked
    def wait(self) -> list[str]:
        return wait_for(self, lambda: self.items, timeout=1)


shelf = Shelf()
assert_type(shelf.count, int)
assert_type(shelf.owner, str | None)
assert_type(shelf.items, list[str])
assert_type(shelf.take(), str)
assert_type(shelf.wait(), list[str])
shelf.put("item", 1, 2)
print(snapshot(shelf).count)
