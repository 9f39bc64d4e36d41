"""@Lockable.locked: a locked method looks like the function under it to every tool, and is never unlocked by one."""

import abc
import asyncio
import functools
import gc
import inspect
import os
import pydoc
import random
import signal
import sys
import types
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ContextDecorator, ExitStack, asynccontextmanager, contextmanager
from operator import call
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest

from coheld import Lockable, LockTimeout, holder, statistics
from coheld.testing.contract.observe import CAPABILITIES, give_all_back, held_elsewhere, is_free
from coheld.testing.support import delays, procs, states

locked: Any = Lockable.locked  # unseen by the type checker, as most of this is meant to be wrong or odd


def work(self: Any, who: str, /, *rest: int, days: int = 1, **more: object) -> tuple[object, ...]:
    """Work under the lock.

    And some more about it.
    """
    owner = holder(self)
    assert owner is not None
    return owner.method, who, rest, days, more


class Bed(Lockable):
    """A thing to lock."""

    work = Lockable.locked(work)

    @Lockable.locked
    def book(self, who: str, days: int = 1, *, free: bool = False) -> str:
        """Book the bed."""
        owner = holder(self)
        return f"{who} {days} {free} {owner.depth if owner else 0}"

    @Lockable.locked(timeout=delays.SHORT)
    def hurry(self, who: str) -> str:
        """Book it soon."""
        return who

    @Lockable.locked
    def size(self) -> int:
        return 7


BED: Any = Bed


# ---- calls -------------------------------------------------------------------------------------------------


def test_arguments_and_results_pass_unchanged() -> None:
    bed = Bed()
    assert bed.book("ann") == "ann 1 False 1"
    assert bed.book("ann", 2, free=True) == "ann 2 True 1"
    assert bed.book(who="ann", days=3) == "ann 3 False 1"
    assert BED.book(*[bed, "ann"], **dict(days=4)) == "ann 4 False 1"  # noqa: C408
    assert bed.work("ann", *range(50), days=2, k=3) == ("work", "ann", (*range(50),), 2, {"k": 3})


def test_what_is_returned_is_the_object_itself() -> None:
    class Same(Lockable):
        @Lockable.locked
        def same(self, thing: object) -> object:
            return thing

    thing = object()
    assert Same().same(thing) is thing


def test_wrong_arguments_are_a_type_error_and_leave_it_free() -> None:
    bed: Any = Bed()
    for args, kwargs in [((), {}), (("a", 1, 2), {}), (("a",), {"what": 1})]:
        with pytest.raises(TypeError, match="book"):
            bed.book(*args, **kwargs)
        assert is_free(bed)


def test_a_call_through_the_class_is_locked_too() -> None:
    bed = Bed()
    assert Bed.book(bed, "ann") == "ann 1 False 1"
    assert call(Bed.book, bed, "ann") == "ann 1 False 1"


def test_a_call_through_the_class_needs_the_instance_first() -> None:
    with pytest.raises(TypeError, match="instance"):
        BED.book()
    with pytest.raises(TypeError, match="instance"):
        BED.book(self=Bed(), who="ann")


def test_a_bound_method_is_one() -> None:
    bed = Bed()
    assert isinstance(bed.book, types.MethodType)
    assert bed.book.__self__ is bed and bed.book.__func__ is BED.book
    assert bed.book == bed.book
    assert weakref.WeakMethod(bed.book)() == bed.book


def test_special_methods_can_be_locked() -> None:
    class Table(Lockable):
        def __init__(self) -> None:
            super().__init__()
            self.rows: dict[str, object] = {}

        @Lockable.locked
        def __setitem__(self, name: str, value: object) -> None:
            self.rows[name] = holder(self)

        @Lockable.locked
        def __len__(self) -> int:
            return len(self.rows)

        @Lockable.locked
        def __call__(self) -> object:
            return holder(self)

    table = Table()
    table["a"] = 1
    assert table.rows["a"] is not None and table() is not None and len(table) == 1
    assert is_free(table)


def test_builtin_functions_and_other_callables_can_be_locked() -> None:
    class Twice:
        def __call__(self, obj: object, number: int) -> tuple[bool, int]:
            return holder(obj) is not None, 2 * number

    class Table(Lockable, dict[str, int]):
        put = locked(dict.__setitem__)
        twice = locked(Twice())
        add = locked(functools.partial(lambda one, obj, number: one + number, 1))

    table = Table()
    table.put("a", 1)
    assert table == {"a": 1}
    assert Table.twice(table, 4) == (True, 8)
    assert Table.add(table, 4) == 5
    assert is_free(table)


def test_a_method_on_what_is_no_lockable_says_so() -> None:
    class Stranger:
        work = locked(work)

    with pytest.raises(RuntimeError, match="Stranger has locked methods but does not inherit Lockable"):
        Stranger().work("ann")


def test_a_locked_method_can_be_overridden_and_called_by_super() -> None:
    class Bunk(Bed):
        def book(self, who: str, days: int = 1, *, free: bool = False) -> str:
            return "unlocked " + super().book(who, days, free=free)

        @Lockable.locked
        def size(self) -> int:
            return super().size() + 1

    bunk = Bunk()
    assert bunk.book("ann") == "unlocked ann 1 False 1"
    assert bunk.size() == 8


@pytest.mark.parametrize("name", ["x" * 31, "x" * 32, "x" * 33, "Bed." + "ä" * 40, "🔒x" * 20, "日本語" * 10])
def test_a_long_name_is_known_by_its_end(name: str) -> None:
    """There is room for 32 bytes of UTF-8."""

    def look(self: object) -> str:
        owner = holder(self)
        return owner.method if owner else ""

    look.__qualname__ = name
    watched: Any = type("Watched", (Lockable,), {"look": locked(look)})
    shown = watched().look()
    assert name.endswith(shown) and 28 < len(shown.encode()) <= 32


# ---- timeout -----------------------------------------------------------------------------------------------


def book_and_hold(link: procs.Link, bed: "Slow") -> None:
    bed.hold(link)


class Slow(Lockable):
    @Lockable.locked
    def hold(self, link: procs.Link) -> None:
        link.say("holding")
        link.wait_for("go")

    @Lockable.locked(timeout=delays.SHORT)
    def hurry(self) -> str:
        return "done"


@pytest.mark.parametrize("kind", [LockTimeout, TimeoutError])
def test_a_timeout_names_the_owner_and_its_method(kind: type[Exception]) -> None:
    slow = Slow()
    with procs.start(book_and_hold, slow) as worker:
        worker.expect("holding")
        with pytest.raises(kind) as caught:
            slow.hurry()
        worker.tell("go")
    error = caught.value
    assert isinstance(error, LockTimeout) and error.owner is not None
    assert (error.owner.pid, error.owner.method, error.waited) == (worker.pid, "Slow.hold", delays.SHORT)
    assert str(worker.pid) in str(error) and "Slow.hold" in str(error)
    assert slow.hurry() == "done"


def test_the_timeout_can_be_read() -> None:
    assert BED.hurry.timeout == delays.SHORT and BED.book.timeout is None


# ---- what cannot be locked ---------------------------------------------------------------------------------


def plain(self: Any) -> int:
    return 1


def generate(self: object) -> Iterator[int]:
    yield 1


async def generate_async(self: object) -> AsyncIterator[int]:
    yield 1


class GeneratorCall:
    def __call__(self, obj: object) -> Iterator[int]:
        yield 1


REFUSED = {
    "a generator function": (generate, "with obj"),
    "an async generator function": (generate_async, "with obj"),
    "a staticmethod": (staticmethod(work), "method of the object"),
    "a classmethod": (classmethod(work), "method of the object"),
    "a property": (property(plain), "put @property above"),
    "a cached_property": (functools.cached_property(plain), "put @cached_property above"),
    "a partialmethod": (functools.partialmethod(work, "ann"), "partialmethod"),
    "a partial of a generator function": (functools.partial(generate), "with obj"),
    "a bound generator method": (types.MethodType(generate, 1), "with obj"),
    "a callable with a generator": (GeneratorCall(), "with obj"),
    "a context manager function": (contextmanager(generate), "with obj"),
    "an async context manager function": (asynccontextmanager(generate_async), "with obj"),
}


@pytest.mark.parametrize(("fn", "remedy"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("options", [{}, {"timeout": 1}], ids=["plain", "timeout"])
def test_what_would_run_unlocked_is_refused_with_the_remedy(fn: Any, remedy: str, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=remedy):
        locked(**options)(fn) if options else locked(fn)


def passed_through(fn: Any) -> Any:
    """As a decorator does that knows nothing of what it calls."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


def run_to_its_end(fn: Any) -> Any:
    """As a decorator does that makes a plain function of a coroutine function."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with pytest.raises(StopIteration) as end:
            fn(*args, **kwargs).send(None)
        return end.value.value

    return wrapper


async def sleepless(self: object) -> int:
    return 1


@pytest.mark.parametrize("fn", [sleepless, generate, generate_async], ids=lambda fn: str(fn.__name__))
@pytest.mark.parametrize("decorator", [passed_through, functools.cache], ids=lambda it: str(it.__name__))
def test_a_body_that_another_decorator_leaves_for_later_is_refused_when_it_is_called(decorator: Any, fn: Any) -> None:
    method = locked(decorator(fn))
    bed = Lockable()
    with pytest.raises(TypeError, match=f"^{fn.__name__}: .*next to the def"):
        method(bed)
    assert is_free(bed)


def test_a_body_that_another_decorator_runs_is_locked() -> None:
    class Shelf(Lockable):
        @Lockable.locked
        @run_to_its_end
        async def depth(self) -> int:
            owner = holder(self)
            return owner.depth if owner else 0

    assert Shelf().depth() == 1  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("fn", [generate, generate_async], ids=lambda fn: str(fn.__name__))
def test_the_refusal_names_the_function(fn: Any) -> None:
    with pytest.raises(TypeError, match=f"^{fn.__name__} "):
        locked(fn)


# ---- how it looks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "__name__",
        "__qualname__",
        "__module__",
        "__doc__",
        "__annotations__",
        "__code__",
        "__defaults__",
        "__kwdefaults__",
        "__closure__",
        "__globals__",
    ],
)
@pytest.mark.parametrize("bound", [False, True], ids=["method", "bound"])
def test_it_has_what_the_function_has(name: str, bound: bool) -> None:
    method = Bed().work if bound else BED.work
    assert getattr(method, name) == getattr(work, name)


def test_it_leads_to_the_function() -> None:
    assert BED.work.__wrapped__ is work and inspect.unwrap(BED.work) is work
    assert inspect.getsource(BED.work) == inspect.getsource(work)
    assert inspect.getdoc(BED.work) == inspect.getdoc(work)
    assert "Bed.book" in repr(BED.book)


def test_its_signature_is_the_functions() -> None:
    assert inspect.signature(BED.work) == inspect.signature(work)
    assert str(inspect.signature(Bed().book)) == "(who: str, days: int = 1, *, free: bool = False) -> str"
    assert inspect.get_annotations(BED.book) == {"who": str, "days": int, "free": bool, "return": str}


def test_a_signature_that_was_set_by_hand_is_kept() -> None:
    def odd(self: object, *args: object) -> None:
        pass

    signature = inspect.signature(lambda self, one, two: None)
    odd.__signature__ = signature  # type: ignore[attr-defined]
    assert inspect.signature(locked(odd)) == signature


def test_the_closure_is_the_functions() -> None:
    class Inner(Bed):
        @Lockable.locked
        def size(self) -> int:
            return super().size()

    method: Any = Inner.size
    assert [cell.cell_contents for cell in method.__closure__] == [Inner]


if sys.version_info >= (3, 12):

    def test_its_type_parameters_are_the_functions() -> None:
        scope: dict[str, Any] = {}
        exec("def first[T](self, things: list[T]) -> T: return things[0]", scope)
        assert locked(scope["first"]).__type_params__ == scope["first"].__type_params__ != ()


def test_attributes_can_be_set_read_and_deleted() -> None:
    def noted(self: object) -> None:
        pass

    noted.before = 1  # type: ignore[attr-defined]
    method = locked(noted)
    method.after = [2]
    assert method.before == 1 and method.__dict__["after"] == [2]
    assert vars(method)["before"] == 1 and not hasattr(noted, "after")
    method.before = 3
    assert noted.before == 1  # type: ignore[attr-defined]
    del method.after
    with pytest.raises(AttributeError):
        _ = method.after

    class Noted(Lockable):
        noted = method

    bound: Any = Noted().noted
    assert bound.before == 3
    with pytest.raises(AttributeError):
        bound.other = 1  # as on every bound method


def test_it_has_no_attributes_of_its_own_invention() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = BED.book.no_such_thing
    assert not hasattr(BED.book, "__isabstractmethod__")


def test_it_never_says_that_it_is_a_function() -> None:
    assert BED.book.__class__ is type(BED.book) is not types.FunctionType
    assert not inspect.isfunction(BED.book) and not isinstance(BED.book, types.FunctionType)
    assert callable(BED.book) and inspect.isroutine(BED.book) and inspect.ismethod(Bed().book)


def test_it_is_no_coroutine_function() -> None:
    for method in (BED.book, Bed().book, BED.hurry):
        assert not inspect.iscoroutinefunction(method)
        assert not inspect.isgeneratorfunction(method) and not inspect.isasyncgenfunction(method)


def test_it_is_collected_with_its_class() -> None:
    class Short(Lockable):
        @Lockable.locked
        def me(self) -> type:
            return __class__  # type: ignore[name-defined,no-any-return]

    gone = weakref.ref(Short.__dict__["me"])
    del Short
    # Without the GIL, what other threads have given up of it may be counted a little later.
    states.wait_until(lambda: gc.collect() < 0 or gone() is None, "it is collected")


# ---- help, pydoc, Sphinx -----------------------------------------------------------------------------------


def test_help_shows_signature_and_text() -> None:
    page = pydoc.render_doc(Bed, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    assert "book(self, who: str, days: int = 1, *, free: bool = False) -> str" in page
    assert "Book the bed." in page and "hurry(self, who: str) -> str" in page


def test_help_of_a_method() -> None:
    for method in (BED.book, Bed().book):
        page = pydoc.plain(pydoc.render_doc(method))
        assert "who: str, days: int = 1, *, free: bool = False) -> str" in page
        assert "Book the bed." in page


SPHINX_MODULE = '''
"""Beds."""

from coheld import Lockable


class Bed(Lockable):
    """A thing to lock."""

    @Lockable.locked
    def book(self, who: str, days: int = 1) -> str:
        """Book the bed."""
        return who

    @Lockable.locked(timeout=1)
    def hurry(self) -> None:
        """Book it soon."""

    @property
    @Lockable.locked
    def size(self) -> int:
        """How long it is."""
        return 2
'''


def test_sphinx_documents_it(tmp_path: Path) -> None:
    (tmp_path / "beds.py").write_text(SPHINX_MODULE)
    (tmp_path / "conf.py").write_text("extensions = ['sphinx.ext.autodoc']\n")
    (tmp_path / "index.rst").write_text("Beds\n====\n\n.. automodule:: beds\n   :members:\n")
    out = tmp_path / "out"
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "text", "-d", str(tmp_path / "trees")]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    with procs.command([*build, str(tmp_path), str(out)], env={**os.environ, "PYTHONPATH": path}) as sphinx:
        sphinx.end(timeout=delays.HANG)
    text = " ".join((out / "index.txt").read_text().split())
    assert "book(who: str, days: int = 1) -> str Book the bed." in text
    assert "hurry() -> None Book it soon." in text
    assert "property size: int How long it is." in text


# ---- what works with methods -------------------------------------------------------------------------------


class Furniture(abc.ABC):
    @abc.abstractmethod
    def below(self) -> str: ...

    @abc.abstractmethod
    def above(self) -> str: ...


class Abstract(Lockable, Furniture):
    @Lockable.locked
    @abc.abstractmethod
    def below(self) -> str:
        return "from below"

    @abc.abstractmethod
    @Lockable.locked
    def above(self) -> str:
        return f"from above {holder(self) is not None}"


class Concrete(Abstract):
    @Lockable.locked
    def below(self) -> str:
        return super().below()

    @Lockable.locked
    def above(self) -> str:
        return super().above()


def test_abstract_methods_in_both_orders() -> None:
    assert Abstract.__abstractmethods__ == {"below", "above"}
    assert inspect.isabstract(Abstract)
    abstract: Any = Abstract
    with pytest.raises(TypeError, match="abstract"):
        abstract()
    assert Concrete.__abstractmethods__ == frozenset()
    assert (Concrete().below(), Concrete().above()) == ("from below", "from above True")


def test_a_property_and_a_cached_property_above_it() -> None:
    class Shelf(Lockable):
        reads = 0

        @property
        @Lockable.locked
        def now(self) -> bool:
            return holder(self) is not None

        @functools.cached_property
        @Lockable.locked
        def once(self) -> bool:
            self.reads += 1
            return holder(self) is not None

    shelf = Shelf()
    assert shelf.now and shelf.once and shelf.once and shelf.reads == 1
    assert is_free(shelf)


def test_a_property_with_a_locked_setter() -> None:
    class Shelf(Lockable):
        def __init__(self) -> None:
            super().__init__()
            self._books: list[tuple[str, bool]] = []

        @property
        @Lockable.locked
        def books(self) -> Any:
            return self._books

        @books.setter
        @Lockable.locked
        def books(self, book: str) -> None:
            self._books.append((book, holder(self) is not None))

    shelf: Any = Shelf()
    shelf.books = "Dune"
    assert shelf.books == [("Dune", True)] and is_free(shelf)


def test_partialmethod_over_it() -> None:
    class Shelf(Bed):
        ann = functools.partialmethod(BED.book, "ann", free=True)

    shelf = Shelf()
    assert shelf.ann(3) == "ann 3 True 1"
    assert str(inspect.signature(shelf.ann)) == "(days: int = 1, *, free: bool = True) -> str"


def test_partial_over_a_bound_method() -> None:
    assert functools.partial(Bed().book, "ann")(days=2) == "ann 2 False 1"


def test_another_decorator_above_and_below() -> None:
    def twice(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def wrapper(*args: Any) -> list[Any]:
            return [fn(*args), fn(*args)]

        return wrapper

    class Shelf(Lockable):
        @twice
        @Lockable.locked
        def above(self) -> bool:
            """Above."""
            return holder(self) is not None

        @Lockable.locked
        @twice
        def below(self) -> bool:
            """Below."""
            return holder(self) is not None

    shelf: Any = Shelf()
    assert shelf.above() == [True, True] == shelf.below()
    assert (shelf.above.__doc__, shelf.below.__name__) == ("Above.", "below")


def test_a_context_manager_that_decorates_is_a_decorator_like_others() -> None:
    entered = []

    class Noting(ContextDecorator):
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    class Shelf(Lockable):
        @Lockable.locked
        @Noting()
        def report(self) -> bool:
            return holder(self) is not None

    assert Shelf().report() and entered == ["in", "out"]


def test_a_context_manager_that_takes_the_lock_holds_it_until_it_is_left() -> None:
    """What the refusal of a generator function advises."""

    class Shelf(Lockable):
        @contextmanager
        def session(self) -> Iterator[str]:
            with self:
                yield "in session"

    shelf = Shelf()
    with shelf.session() as said:
        assert said == "in session" and not is_free(shelf)
    assert is_free(shelf)


def test_locking_twice_is_two_levels() -> None:
    class Shelf(Lockable):
        @Lockable.locked
        @Lockable.locked
        def depth(self) -> int:
            owner = holder(self)
            return owner.depth if owner else 0

    assert Shelf().depth() == 2


def test_singledispatchmethod_over_it() -> None:
    class Shelf(Lockable):
        @functools.singledispatchmethod
        def put(self, thing: object) -> str:
            return "a thing"

        @put.register
        @Lockable.locked
        def _(self, thing: int) -> str:
            return f"a number {holder(self) is not None}"

    assert (Shelf().put("x"), Shelf().put(1)) == ("a thing", "a number True")


def test_a_cache_above_it() -> None:
    class Shelf(Lockable):
        calls = 0

        @functools.lru_cache  # noqa: B019
        @Lockable.locked
        def find(self, name: str) -> str:
            self.calls += 1
            return name.upper()

    shelf = Shelf()
    assert [shelf.find("a"), shelf.find("a")] == ["A", "A"] and shelf.calls == 1


@attrs.define
class Frame(Bed):
    """attrs makes the class anew, to give it slots, and must find the closure of super() to mend it."""

    height: int = 3

    def __attrs_post_init__(self) -> None:
        super().__init__()

    @Lockable.locked
    def size(self) -> int:
        return super().size() * self.height


def test_attrs_finds_the_closure_of_super() -> None:
    assert Frame(height=2).size() == 14
    method: Any = Frame.size
    assert [cell.cell_contents for cell in method.__closure__] == [Frame]


def test_autospec_of_an_object_knows_the_signature() -> None:
    bed = mock.create_autospec(Bed())
    bed.book.return_value = "mocked"
    assert bed.book("ann", days=3) == "mocked"
    bed.book.assert_called_once_with("ann", days=3)
    with pytest.raises(TypeError):
        bed.book("ann", 1, 2)
    with pytest.raises(TypeError):
        bed.book(nobody="ann")


def test_autospec_of_a_class_knows_the_methods() -> None:
    bed = mock.create_autospec(Bed)()
    bed.book.return_value = "mocked"
    assert bed.book("ann", days=3) == "mocked"
    bed.book.assert_called_once_with("ann", days=3)
    assert bed.acquire.called is False
    with pytest.raises(AttributeError):
        _ = bed.cook


def test_autospec_of_a_method_knows_the_signature() -> None:
    bed = Bed()
    with mock.patch.object(bed, "book", autospec=True, return_value="mocked") as mocked:
        assert bed.book("ann") == "mocked"
        mocked.assert_called_once_with("ann")
        with pytest.raises(TypeError):
            mocked("ann", nobody=1)
    assert bed.book("ann") == "ann 1 False 1"


def test_patch_replaces_and_restores_it() -> None:
    bed = Bed()
    with mock.patch.object(Bed, "book", wraps=bed.book) as spied:
        assert bed.book("bob") == "bob 1 False 1"
        spied.assert_called_once_with("bob")
    assert bed.book("ann") == "ann 1 False 1" and isinstance(bed.book, types.MethodType)


def test_a_thread_of_asyncio_runs_it() -> None:
    bed = Bed()

    async def main() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(bed.book, name) for name in "abc"))

    assert asyncio.run(main()) == ["a 1 False 1", "b 1 False 1", "c 1 False 1"]
    assert is_free(bed)


# ---- interrupts: a signal whose handler raises never leaves the lock held ----------------------------------


class Interrupt(Exception):
    """Raised by the handler of the storm, at any place that Python lets it."""


ROUNDS = 4000


class Storm:
    """One signal per round, at a random moment of it; its handler raises."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._armed = False
        self.raised = 0

    def _handler(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            self.raised += 1
            raise Interrupt

    @contextmanager
    def blowing(self) -> Iterator["Storm"]:
        before = signal.signal(signal.SIGALRM, self._handler)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def interrupt(self, calls: Callable[[], object]) -> None:
        """Repeat the calls until the signal comes; again and again, should what it raised be lost somewhere."""
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._rng.uniform(1e-6, 200e-6), 1e-3)
            while True:
                calls()
        except Interrupt:
            pass
        self._armed = False


class Target(Lockable):
    """What the storm blows over."""

    @Lockable.locked
    def one(self) -> None:
        pass

    @Lockable.locked
    def two(self) -> None:
        self.one()

    @Lockable.locked
    def three(self) -> None:
        with self:
            self.two()

    @Lockable.locked
    def long(self) -> int:
        return sum(range(50))


def under_with(target: Target) -> None:
    with target:
        pass


def under_two_withs(target: Target) -> None:
    with target, target.__lock__:
        target.one()


def in_c(target: Target) -> None:
    """acquire, release, driven by C: no bytecode of a test lies between the two, where an interrupt would land."""
    calls: Any = [target.acquire, target.release] * 20
    deque(map(call, calls), maxlen=0)


CALLS = {
    "with": under_with,
    "with twice": under_two_withs,
    "a locked call": Target.one,
    "nested locked calls": Target.three,
    "a longer locked call": Target.long,
}
WAITS = CALLS | {"acquire and release": in_c}


def storm_over(target: Target, calls: Callable[[Target], object], rng: random.Random, rounds: int) -> None:
    me = os.getpid()
    with Storm(rng).blowing() as storm:
        for number in range(rounds):
            storm.interrupt(functools.partial(calls, target))
            if not CAPABILITIES.uninterruptible_entry:
                give_all_back(target)
            owner = holder(target)
            assert owner is None or owner.pid != me, f"round {number} left it held: {owner}"
        assert storm.raised >= rounds


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_an_interrupt_never_leaves_it_held(calls: Callable[[Target], object], rng: random.Random) -> None:
    target = Target()
    storm_over(target, calls, rng, ROUNDS)
    assert is_free(target)


def contend(link: procs.Link, target: Target) -> None:
    link.say("here")
    while not link._connection.poll():
        for _ in range(100):
            with target:
                sum(range(300))


@pytest.mark.parametrize("calls", WAITS.values(), ids=WAITS)
def test_an_interrupt_of_a_wait_never_leaves_it_held(calls: Callable[[Target], object], rng: random.Random) -> None:
    target = Target()
    with procs.start(contend, target) as worker:
        worker.expect("here")
        storm_over(target, calls, rng, ROUNDS // 4)
        worker.tell("enough")
    assert is_free(target) and statistics(target).contended > 0


def test_a_handler_that_returns_disturbs_nothing(rng: random.Random) -> None:
    target, signals = Target(), []
    before = signal.signal(signal.SIGALRM, lambda *_: signals.append(1))
    signal.setitimer(signal.ITIMER_REAL, 50e-6, 50e-6)
    try:
        while len(signals) < 1000:
            target.three()
            with target:
                target.long()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert is_free(target)


@contextmanager
def handled(handler: Callable[[], object]) -> Iterator[None]:
    """A signal calls the handler once, soon."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, delays.SHORT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_handler_may_use_the_lock_that_its_thread_waits_for() -> None:
    target, held = Target(), ExitStack()
    held.enter_context(held_elsewhere(target))
    seen = []

    def use() -> None:
        assert not target.acquire(blocking=False)
        held.close()
        with target:
            seen.append(holder(target))

    with held, handled(use):
        assert target.acquire(timeout=delays.LONG)
    assert len(seen) == 1
    target.release()
    assert is_free(target)


def test_a_handler_may_keep_the_lock_that_its_thread_waits_for() -> None:
    target, held = Target(), ExitStack()
    held.enter_context(held_elsewhere(target))

    def keep() -> None:
        held.close()
        assert target.acquire(timeout=delays.LONG)

    with held, handled(keep):
        assert target.acquire(timeout=delays.LONG)
    owner = holder(target)
    assert owner is not None and owner.depth == 2
    target.release()
    assert holder(target) is not None and not is_free(target)
    target.release()
    assert holder(target) is None and is_free(target)


def test_a_body_that_raises_anything_leaves_it_free() -> None:
    class Odd(Lockable):
        @Lockable.locked
        def fail(self, error: BaseException) -> None:
            raise error

    odd = Odd()
    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError, StopIteration):
        with pytest.raises(kind):
            odd.fail(kind())
        assert is_free(odd)


def test_endless_recursion_leaves_it_free() -> None:
    class Endless(Lockable):
        @Lockable.locked
        def again(self) -> None:
            self.again()

    endless = Endless()
    with pytest.raises(RecursionError):
        endless.again()
    assert is_free(endless)
