"""The class that most tests of shared state use."""

from coheld import Lockable, shared


class Shelf(Lockable):
    count: int = shared(0)
    label: str = shared("")
    items: list[str] = shared(default_factory=list)
    index: dict[str, list[int]] = shared(default_factory=dict)
    marks: set[str] = shared(default_factory=set)

    @Lockable.locked
    def put(self, item: str) -> None:
        self.items.append(item)
        self.count += 1

    @Lockable.locked
    def fail(self, item: str) -> None:
        self.put(item)
        raise KeyError(item)

    @Lockable.locked(atomic=True)
    def put_or_nothing(self, item: str, fail: bool = True) -> None:
        self.put(item)
        self.index.setdefault(item, []).append(1)
        self.marks.add(item)
        if fail:
            raise KeyError(item)

    @Lockable.locked(when=lambda self: self.items, timeout=20)
    def take(self) -> str:
        self.count -= 1
        return self.items.pop(0)

    @Lockable.locked(when=lambda self: len(self.items) < 3, timeout=20)
    def put_bounded(self, item: str) -> None:
        self.put(item)
