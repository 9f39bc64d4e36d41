"""Arenas: the files that anonymous locks live in. Who makes one, who hands out which cell, and when again."""

import copy
import gc
import os
import pickle
import re
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from coheld import Lockable, statistics
from coheld._native import CELL_SIZE
from coheld.process import start_of
from coheld.testing.contract.observe import in_a_thread_of_its_own
from coheld.testing.contract.places import Place, all_in, arenas_of, file_of, place_of, took
from coheld.testing.support import delays, procs

FIRST_CHUNK = 64 * 1024


# ---- one arena for each process ----------------------------------------------------------------------------


def test_one_process_has_one_arena(coheld_dir: Path) -> None:
    objs = [Lockable() for _ in range(1_000)]
    assert len({place_of(obj) for obj in objs}) == 1_000
    assert {file_of(obj) for obj in objs} == {coheld_dir / name for name in all_in(coheld_dir)}
    me = f"arena-{os.getpid()}-{start_of(os.getpid())}-"
    assert re.fullmatch(re.escape(me) + "[0-9a-f]+", file_of(objs[0]).name)


def test_its_cells_do_not_overlap() -> None:
    offsets = sorted(place_of(obj)[1] for obj in [Lockable() for _ in range(1_000)])
    assert min(second - first for first, second in pairwise(offsets)) >= CELL_SIZE


def test_its_pages_are_reserved_in_chunks_that_begin_small() -> None:
    objs = [Lockable()]
    assert _reserved(objs[0]) == os.stat(file_of(objs[0])).st_size == FIRST_CHUNK
    for _ in range(10):
        objs += [Lockable() for _ in range(len(objs))]
        used = max(place_of(obj)[1] for obj in objs) + CELL_SIZE
        assert used <= _reserved(objs[0]) <= max(FIRST_CHUNK, 2 * used)


def _reserved(obj: Lockable) -> int:
    return os.stat(file_of(obj)).st_blocks * 512


def test_threads_of_a_process_share_its_arena_and_no_cell(coheld_dir: Path) -> None:
    made: list[list[Lockable]] = [[] for _ in range(8)]
    barrier = threading.Barrier(8)

    def make(mine: list[Lockable]) -> None:
        barrier.wait(delays.LONG)
        mine += [Lockable() for _ in range(500)]

    threads = [threading.Thread(target=make, args=[mine]) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(delays.LONG)
    assert len({place_of(obj) for mine in made for obj in mine}) == 4_000
    assert len(all_in(coheld_dir)) == 1


# ---- a child makes its own ---------------------------------------------------------------------------------


def make_some(link: procs.Link, inherited: Lockable) -> None:
    link.say(place_of(inherited))
    mine = [Lockable() for _ in range(link.hear())]
    for obj in mine:
        obj.acquire()
    link.say([place_of(obj) for obj in mine])
    link.wait_for("end")


@pytest.mark.parametrize("method", procs.METHODS)
def test_a_child_makes_its_own_arena_at_its_first_new_lock(coheld_dir: Path, method: str) -> None:
    obj = Lockable()
    with procs.start(make_some, obj, method=method) as child:
        child.expect(place_of(obj))
        assert not arenas_of(coheld_dir, child.pid)
        child.tell(300)
        theirs = child.hear()
        mine = [Lockable() for _ in range(300)]
        assert {Path(path).name for path, _ in theirs} == set(arenas_of(coheld_dir, child.pid))
        assert not set(theirs) & {place_of(one) for one in [obj, *mine]}
        assert all(took(one) for one in mine)
        child.tell("end")


def test_a_grandchild_makes_its_own_arena_too() -> None:
    obj = Lockable()

    def parent(link: procs.Link) -> list[Place]:
        mine = Lockable()
        with procs.start(make_some, mine) as child:
            child.expect(place_of(mine))
            child.tell(1)
            places = child.hear()
            child.tell("end")
        return [place_of(mine), *places]

    with procs.start(parent) as child:
        places = [place_of(obj), *child.result()]
    assert len({path for path, _ in places}) == 3


def test_no_cell_is_handed_out_twice_when_parent_and_children_go_on_making_locks() -> None:
    kept = [Lockable() for _ in range(50)]
    del kept[::2]  # cells that parent and children could both take for their own to hand out

    def make(link: procs.Link) -> list[Place]:
        return [place_of(obj) for obj in [Lockable() for _ in range(100)]]

    with procs.start(make) as first, procs.start(make) as second:
        mine = [Lockable() for _ in range(100)]
        theirs = first.result() + second.result()
    assert len({*theirs, *map(place_of, mine), *map(place_of, kept)}) == 100 + 200 + 25


HOOKED = """
import os
os.register_at_fork(after_in_child=lambda: made.append(Lockable()))
from coheld import Lockable
made = []
Lockable()
if pid := os.fork():
    os.waitpid(pid, 0)
    made.append(Lockable())
print(made[0].__lock__.segment.path, made[0].__lock__.offset, flush=True)
"""


def test_a_hook_that_runs_in_the_child_before_ours_makes_its_lock_in_an_arena_of_the_child() -> None:
    """Hooks run in the order of their coming, and this one came before the package."""
    child, parent = procs.run(HOOKED).splitlines()
    assert child.split()[0] != parent.split()[0]


@pytest.mark.hang_limit(180)
def test_a_child_can_make_locks_whatever_the_parents_threads_did_at_the_fork(coheld_dir: Path) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            pickle.loads(pickle.dumps(Lockable(lock_name="churn")))
            [Lockable() for _ in range(20)]

    def make(link: procs.Link) -> bool:
        return took(Lockable()) and took(Lockable(lock_name="churn")) and took(Lockable(lock_name="other"))

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            with procs.start(make) as child:
                assert child.result()
    finally:
        stop.set()
        for thread in threads:
            thread.join(delays.LONG)


# ---- a cell is used again when nobody can have it ----------------------------------------------------------


def _place_of_a_new_one() -> Place:
    gc.collect()
    return place_of(Lockable())


def test_a_cell_is_used_again_when_its_object_is_gone() -> None:
    obj = Lockable()
    place = place_of(obj)
    del obj
    assert _place_of_a_new_one() == place


def test_a_cell_that_is_used_again_has_no_past() -> None:
    obj = Lockable()
    place = place_of(obj)
    for _ in range(3):
        assert took(obj)
    del obj
    gc.collect()
    again = Lockable()
    assert place_of(again) == place
    assert statistics(again).acquisitions == 0 and took(again)


def test_making_and_dropping_locks_takes_no_more_room() -> None:
    first = Lockable()
    for _ in range(20_000):
        Lockable()
    assert os.stat(file_of(first)).st_size == FIRST_CHUNK


def test_a_cell_is_not_used_again_while_a_copy_of_its_object_lives() -> None:
    obj = Lockable()
    place, twin = place_of(obj), copy.copy(obj)
    del obj
    assert _place_of_a_new_one() != place
    del twin
    assert _place_of_a_new_one() == place


@in_a_thread_of_its_own
def test_a_cell_is_not_used_again_when_its_object_was_dropped_while_held() -> None:
    obj = Lockable()
    place = place_of(obj)
    obj.acquire()
    del obj
    assert place not in {place_of(one) for one in [Lockable() for _ in range(300)]}


def test_a_cell_that_was_pickled_is_not_used_again() -> None:
    obj = Lockable()
    place, data = place_of(obj), pickle.dumps(obj)
    del obj
    assert _place_of_a_new_one() != place
    for _ in range(3):  # loaded, and dropped again
        assert place_of(pickle.loads(data)) == place
        assert _place_of_a_new_one() != place


def test_no_two_new_locks_share_a_cell_that_was_loaded_and_dropped_twice() -> None:
    obj = Lockable()
    data = pickle.dumps(obj)
    del obj
    for _ in range(3):
        assert took(pickle.loads(data))
    gc.collect()
    assert len({place_of(one) for one in [Lockable() for _ in range(300)]}) == 300


def keep(link: procs.Link, obj: Lockable) -> None:
    link.say("here")
    with obj:
        link.say("inside")
        link.wait_for("leave")


def test_a_cell_is_not_used_again_if_there_was_a_fork_while_it_lived() -> None:
    obj = Lockable()
    place = place_of(obj)
    with procs.start(keep, obj) as child:
        child.expect("here")
        child.expect("inside")
        del obj
        others = [Lockable() for _ in range(300)]
        assert place not in {place_of(other) for other in others}
        assert all(took(other) for other in others)
        child.tell("leave")
    assert _place_of_a_new_one() != place


def test_a_cell_made_after_a_fork_is_used_again() -> None:
    with procs.start(lambda link: None):
        pass
    obj = Lockable()
    place = place_of(obj)
    del obj
    assert _place_of_a_new_one() == place


def test_a_child_that_drops_what_it_inherited_takes_no_cell_from_its_parent() -> None:
    obj = Lockable()
    place = place_of(obj)
    holders = [obj]

    def drop(link: procs.Link) -> list[Place]:
        holders.clear()
        return [_place_of_a_new_one() for _ in range(3)]

    del obj
    with procs.start(drop) as child:
        assert place not in child.result()
    assert took(holders[0]) and place_of(Lockable()) != place


AT_THE_END = """
import os
import threading
from coheld import Lockable

class Bed(Lockable):
    def __init__(self, write):
        super().__init__()
        self.write, self.itself = write, self  # goes when the modules are taken down

    def __del__(self):
        try:
            self.close()
        except BaseException as error:
            self.write(1, repr(error).encode())

    @Lockable.locked
    def close(self):
        self.write(1, b"closed")

    @Lockable.locked
    def work(self):
        pass

bed = Bed(os.write)
"""


@pytest.mark.parametrize("work", ["", "thread = threading.Thread(target=bed.work); thread.start(); thread.join()"])
def test_whose_first_lock_is_the_last_thing_that_its_process_does_has_it(work: str) -> None:
    assert procs.run(AT_THE_END + work) == "closed"
