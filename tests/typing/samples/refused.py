"""What must not pass the checker: every comment silences one complaint; one that silences none is an error."""

from coheld import Lockable, holder, shared, statistics


class Testbed(Lockable):
    @Lockable.locked
    def book(self, who: str, days: int = 1) -> str:
        return who * days

    @Lockable.locked(timeout=2.5)
    def hurry(self, who: str) -> int:
        return len(who)


bed = Testbed()

# a locked method has the types of its function
bed.book()  # type: ignore[call-arg]
bed.book(7)  # type: ignore[arg-type]
bed.book("ann", days="two")  # type: ignore[arg-type]
bed.book("ann", nobody=True)  # type: ignore[call-arg]
booked: int = bed.book("ann")  # type: ignore[assignment]
bed.hurry(7)  # type: ignore[arg-type]
hurried: str = bed.hurry("ann")  # type: ignore[assignment]
bed.cook("ann")  # type: ignore[attr-defined]

# the decorator
Lockable.locked()  # type: ignore[call-overload]
Lockable.locked(7)  # type: ignore[call-overload]
Lockable.locked(timeout="soon")  # type: ignore[call-overload]
Lockable.locked(print, timeout=1.0)  # type: ignore[call-overload]
Lockable.locked(wait=1.0)  # type: ignore[call-overload]

# acquire
bed.acquire(True, "soon")  # type: ignore[arg-type]
bed.acquire(wait=True)  # type: ignore[call-arg]
bed.release(1)  # type: ignore[call-arg]

# the lock's own arguments
Lockable(lock_name=7)  # type: ignore[arg-type]
Lockable(lock_backend=7)  # type: ignore[arg-type]

# the questions are values
pid = holder(bed).pid  # type: ignore[union-attr]
statistics(bed).acquisitions = 1  # type: ignore[misc]


# shared state
class Shelf(Lockable):
    wrong: int = shared("text")  # type: ignore[assignment]
    count: int = shared(0)


Shelf().count = "text"  # type: ignore[assignment]
Lockable.locked(when=1)  # type: ignore[call-overload]
Lockable.locked(atomic="yes")  # type: ignore[call-overload]
shared()  # type: ignore[call-overload]
