"""What holders and waiters of locks on a server find when hosts, the server, or what is between them fails.

A host here is a process with a COHELD_DIR of its own, so that nothing but the server connects them.
"""

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis

import coheld
from coheld import BackendError, IncompatibleError, LeaseLostError, Lockable, native, shared
from coheld.backends.redis import Place, RedisServer
from coheld.backends.store import Ask, Change, Granted, Known, number_of
from coheld.testing.support import delays, procs, states
from engines import servers
from engines.proxy import Proxy

LEASE = 1.5 * delays.SCALE  # a quarter of it is how long an answer is waited for, on a busy machine as well


# ---- hosts ---------------------------------------------------------------------------------------------------


class Counter(Lockable):
    value: int = shared(0)
    made: int = shared(0)

    def __create__(self) -> None:
        self.made += 1

    @Lockable.locked
    def add(self) -> int:
        self.value += 1
        return self.value

    @Lockable.locked(when=lambda counter: counter.value >= 1)
    def take(self) -> float:
        self.value -= 1
        return time.monotonic()

    @Lockable.locked
    def take_after_a_wait(self) -> float:
        coheld.wait_for(self, lambda: self.value >= 1)
        self.value -= 1
        return time.monotonic()

    @Lockable.locked
    def put(self) -> float:
        self.value += 1
        return time.monotonic()

    @Lockable.locked
    def write_slowly(self, value: int, link: procs.Link) -> None:
        self.value = value
        link.say("inside")
        link.wait_for("go on")


class Plain(Lockable):
    value: int = shared(0)

    @Lockable.locked
    def write(self, value: int) -> None:
        self.value = value


def plain(_: object, url: str) -> Plain:
    return Plain(lock_name="plain", lock_backend=url)


def held_and_pickled(_: object, url: str) -> bytes:
    """What its lock guards was not looked at meanwhile."""
    held = plain(_, url)
    with native.lock_of(held):
        pass
    return pickle.dumps(held)


LOG: list[str] = []
HEARD: list[str] = []
ACTS: dict[str, Callable[..., Any]] = {
    "add": Counter.add,
    "take": Counter.take,
    "take after a wait": Counter.take_after_a_wait,
    "put": Counter.put,
    "acquire": lambda counter, timeout=None: counter.acquire(timeout=timeout),
    "release": Counter.release,
    "write": lambda counter, value: setattr(counter, "value", value),
    "value": lambda counter: counter.value,
    "made": lambda counter: counter.made,
    "token": coheld.token,
    "lost": coheld.lost,
    "ensure": coheld.ensure_held,
    "looks": lambda counter: [
        repr(counter),
        repr(native.lock_of(counter)),
        str(pickle.dumps(counter)),
        str(vars(counter)),
    ],
    "write_plain": lambda _, url, value: plain(_, url).write(value),
    "pickled": held_and_pickled,
    "semaphore": lambda _, url: coheld.Semaphore(1, name="permits", backend=url),
    "other": lambda _, url: Other(lock_name="counter", lock_backend=url).add(),
    "unpickled": lambda _: "UNPICKLED" in subprocess.check_output("env", text=True),
    "log": lambda _: LOG,
    "heard": lambda _: HEARD,
}


class Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOG.append(record.getMessage())


def host(link: procs.Link, directory: Path, url: str) -> None:
    """Does what it is told with the counter there, and says what came of it."""
    os.environ["COHELD_DIR"] = str(directory)
    logging.getLogger("coheld").addHandler(Told())
    counter = Counter(lock_name="counter", lock_backend=url)
    coheld.when_lost(counter, lambda error: HEARD.append(type(error).__name__))
    link.say("ready")
    while True:
        act, *args = link.hear()
        try:
            link.say(counter.write_slowly(*args, link) if act == "write_slowly" else ACTS[act](counter, *args))
        except (coheld.CoheldError, AssertionError) as error:
            link.say(error)


class Host:
    """One, from outside."""

    def __init__(self, worker: procs.FunctionWorker) -> None:
        self.worker = worker

    def tell(self, act: str, *args: object) -> None:
        self.worker.tell((act, *args))

    def do(self, act: str, *args: object) -> Any:
        """What came of it. Raises: what it raised there."""
        self.tell(act, *args)
        return self.result()

    def result(self) -> Any:
        if isinstance(result := self.worker.hear(), Exception):
            raise result
        return result


Start = Callable[..., Host]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a host that reaches the server by that URL."""
    with ExitStack() as life:

        def begin(url: str, lease: float = LEASE) -> Host:
            directory = tmp_path / f"host-{len(list(tmp_path.iterdir()))}"
            directory.mkdir(0o700)
            one = Host(life.enter_context(procs.start(host, directory, f"{url}?lease={lease}")))
            life.callback(one.worker.kill)
            one.worker.expect("ready")
            return one

        yield begin


@pytest.fixture
def proxy(valkey: servers.Valkey) -> Iterator[Proxy]:
    with Proxy(valkey.port) as proxy:
        yield proxy


def through(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


KEY, WAITING = "coheld:{counter}", "coheld:{counter}:waiting"


def wait_until_waiting(valkey: servers.Valkey, number: int) -> None:
    with valkey.client() as client:
        states.wait_until(lambda: client.zcard(WAITING) == number, f"{number} wait")


# ---- hosts that are well -------------------------------------------------------------------------------------


def test_hosts_in_turn_see_what_the_other_has_written(valkey: servers.Valkey, start: Start) -> None:
    hosts = start(valkey.url()), start(valkey.url())
    assert [one.do("add") for _ in range(3) for one in hosts] == [1, 2, 3, 4, 5, 6]


def test_state_that_a_holder_did_not_look_at_is_there_for_others(valkey: servers.Valkey, start: Start) -> None:
    one, other = start(valkey.url()), start(valkey.url())
    one.do("write_plain", valkey.url(), 7)
    assert other.do("pickled", valkey.url())


@pytest.mark.parametrize("take", ["take", "take after a wait"])
def test_a_guard_is_woken_by_another_host(valkey: servers.Valkey, start: Start, take: str) -> None:
    one, other = start(valkey.url()), start(valkey.url())
    taken = []
    for _ in range(5):
        one.tell(take)
        with valkey.client() as client:
            states.wait_until(lambda: client.pubsub_numsub(f"coheld:news:{KEY}")[0][1] >= 1, "it listens")
        one.worker.wait_until_blocked()
        put = other.do("put")
        taken.append(one.result() - put)
    assert sorted(taken)[2] < delays.SHORT, taken


def test_waiting_hosts_are_served_in_turn(valkey: servers.Valkey, start: Start) -> None:
    hosts = [start(valkey.url()) for _ in range(4)]
    hosts[0].do("acquire")
    for place, waiting in enumerate(hosts[1:], 1):
        waiting.tell("acquire")
        wait_until_waiting(valkey, place)
    for one, following in pairwise(hosts):
        one.do("release")
        assert following.result()
        wait_until_waiting(valkey, 3 - hosts.index(following))


def test_who_comes_anew_need_not_wait_for_a_holder(valkey: servers.Valkey, start: Start) -> None:
    """__create__ has returned, which the server knows."""
    holder = start(valkey.url())
    holder.do("acquire")
    assert start(valkey.url()).do("made") == 1
    assert not holder.do("lost")


@pytest.mark.parametrize(("fault", "bound"), [("kill", delays.MEDIUM / 2), ("stop", 1.5 * delays.MEDIUM)])
def test_a_waiter_that_is_dead_or_stopped_keeps_nobody_waiting(
    valkey: servers.Valkey, start: Start, fault: str, bound: float
) -> None:
    holder, first, second = (start(valkey.url(), lease=60) for _ in range(3))
    holder.do("acquire")
    for place, waiting in enumerate((first, second), 1):
        waiting.tell("acquire")
        wait_until_waiting(valkey, place)
    getattr(first.worker, fault)()
    with valkey.client() as client:
        states.wait_until(
            lambda: (
                sum(number for _, number in client.pubsub_numsub(*client.pubsub_channels("coheld:wake:*")))
                == (1 if fault == "kill" else 2)
            ),
            "the server knows who listens",
        )
    begun = time.monotonic()
    holder.do("release")
    assert second.result() and time.monotonic() - begun < bound


# ---- holders that die, or stand still -----------------------------------------------------------------------


def test_the_lock_of_a_killed_holder_is_had_within_its_lease(valkey: servers.Valkey, start: Start) -> None:
    holder, other = start(valkey.url()), start(valkey.url())
    holder.do("add")
    holder.do("acquire")
    holder.do("write", 7)
    token = holder.do("token")
    other.tell("acquire")
    wait_until_waiting(valkey, 1)
    holder.worker.kill()
    begun = time.monotonic()
    assert other.result() and time.monotonic() - begun < LEASE + delays.MEDIUM / 2
    assert other.do("token") > token and other.do("value") == 1


@pytest.mark.parametrize("held_still", [False, True], ids=["given back since", "held by another"])
def test_a_holder_that_was_stopped_beyond_its_lease(valkey: servers.Valkey, start: Start, held_still: bool) -> None:
    holder, other = start(valkey.url()), start(valkey.url())
    holder.do("acquire")
    holder.do("write", 7)
    token = holder.do("token")
    holder.worker.stop()
    assert other.do("acquire") and other.do("token") > token
    other.do("write", 1)
    if not held_still:
        other.do("release")
    holder.worker.cont()
    assert holder.do("lost")
    with pytest.raises(LeaseLostError):
        holder.do("ensure")
    with pytest.raises(LeaseLostError, match="not committed"):
        holder.do("release")
    assert holder.do("heard") == ["LeaseLostError"]
    if held_still:
        assert other.do("value") == 1
        other.do("release")
    assert holder.do("value") == 1 and holder.do("add") == 2


def test_a_method_that_was_stopped_beyond_its_lease_has_changed_nothing(valkey: servers.Valkey, start: Start) -> None:
    holder, other = start(valkey.url()), start(valkey.url())
    holder.tell("write_slowly", 7)
    holder.worker.expect("inside")
    holder.worker.stop()
    assert other.do("add") == 1
    holder.worker.tell("go on")
    holder.worker.cont()
    with pytest.raises(LeaseLostError):
        holder.result()
    assert holder.do("add") == 2


# ---- leases --------------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_for_as_long_as_it_is_held(valkey: servers.Valkey, start: Start) -> None:
    holder, other = start(valkey.url()), start(valkey.url())
    holder.do("acquire")
    holder.do("write", 7)
    assert not other.do("acquire", 3 * LEASE)
    assert not holder.do("lost")
    holder.do("ensure")
    holder.do("release")
    assert other.do("value") == 7 and holder.do("heard") == holder.do("log") == []


def test_a_lease_that_cannot_be_renewed_is_told_of_and_lost(proxy: Proxy, start: Start) -> None:
    holder = start(through(proxy))
    holder.do("acquire")
    holder.do("write", 7)
    proxy.refuse()
    states.wait_until(lambda: holder.do("heard") == ["LeaseLostError"], "it is lost", 2 * LEASE)
    assert holder.do("lost") and any("could not be renewed" in line for line in holder.do("log"))
    proxy.forward()
    with pytest.raises(LeaseLostError):
        holder.do("release")
    assert holder.do("add") == 1


def test_a_connection_that_is_dead_costs_no_lease(proxy: Proxy, start: Start, valkey: servers.Valkey) -> None:
    holder = start(through(proxy), lease=2 * LEASE)
    holder.do("acquire")
    proxy.stall()
    proxy.forward()  # who connects anew gets through
    with valkey.client() as client:
        until = client.hget(KEY, "u")
        states.wait_until(lambda: client.hget(KEY, "u") != until, "it is renewed", 2 * LEASE)
    holder.do("release")
    assert holder.do("heard") == []


def several(link: procs.Link, silent: str, other: str) -> None:
    """Holds some locks of the one server, and one of the other."""
    places = [("counter", other), *((f"counter-{number}", silent) for number in range(4))]
    counters = [Counter(lock_name=name, lock_backend=f"{url}?lease={LEASE}") for name, url in places]
    for counter in counters:
        counter.acquire()
    link.say("held")
    link.wait_for("release")
    link.say([coheld.lost(counter) for counter in counters])
    counters[0].release()


def test_a_server_that_is_silent_costs_the_leases_of_no_other(valkey: servers.Valkey, proxy: Proxy) -> None:
    with servers.valkey() as other, procs.start(several, through(proxy), other.url()) as holder:
        holder.expect("held")
        proxy.stall()
        with other.client() as client:
            for _ in range(6):
                until = client.hget(KEY, "u")
                states.wait_until(lambda u=until: client.hget(KEY, "u") != u, "it is renewed", LEASE)
        holder.tell("release")
        assert holder.hear() == [False, True, True, True, True]


# ---- the server --------------------------------------------------------------------------------------------


def test_a_durable_server_that_is_killed_goes_on(start: Start) -> None:
    with servers.valkey(durable=True) as server:
        holder, other = start(server.url()), start(server.url())
        holder.do("add")
        holder.do("acquire")
        holder.do("write", 7)
        token = holder.do("token")
        server.restart()
        holder.do("release")
        assert other.do("acquire") and other.do("token") > token
        assert other.do("value") == 7 and other.do("made") == 1


def test_a_server_that_forgets_begins_anew(start: Start) -> None:
    with servers.valkey() as server:
        holder, other = start(server.url()), start(server.url())
        assert [holder.do("add"), other.do("add")] == [1, 2]
        holder.do("acquire")
        holder.do("write", 7)
        token = holder.do("token")
        server.restart()
        with pytest.raises(LeaseLostError):
            holder.do("release")
        for one in (other, holder):
            assert one.do("acquire") and one.do("token") > token and one.do("value") == 0 and one.do("made") == 1
            token = one.do("token")
            one.do("release")
        assert [holder.do("add"), other.do("add")] == [1, 2]


# ---- what is between -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_an_idle_connection_that_is_cut_is_not_noticed(proxy: Proxy, start: Start, reset: bool) -> None:
    one = start(through(proxy))
    one.do("add")
    proxy.cut(reset=reset)
    assert one.do("add") == 2


def test_an_acquire_whose_reply_is_lost_is_asked_again(valkey: servers.Valkey, proxy: Proxy, start: Start) -> None:
    one, other = start(through(proxy)), start(valkey.url())
    one.do("add")
    proxy.lose_reply(b"EVALSHA")
    one.do("acquire")
    assert proxy.lost == 1 and not other.do("acquire", 0)
    one.do("release")
    assert other.do("acquire", 0)


def test_a_release_whose_reply_is_lost_is_made_once(valkey: servers.Valkey, proxy: Proxy, start: Start) -> None:
    one, other = start(through(proxy)), start(valkey.url())
    one.do("add")
    one.do("acquire")
    one.do("write", 7)
    proxy.lose_reply(b"EVALSHA")
    one.do("release")
    assert proxy.lost == 1 and other.do("add") == 8 and one.do("add") == 9


class Engine(RedisServer):
    """A host's, without all that is above it."""

    def hold(self, nonce: bytes) -> None:
        assert isinstance(self.try_acquire("counter", Ask(nonce, b"", LEASE, Known(), False)), Granted)

    def change(self, nonce: bytes, number: bytes, state: bytes, keep: float | None = None) -> int | None:
        return self.release("counter", Change(nonce, number, state, keep, False, False, False))


@pytest.fixture
def engines(valkey: servers.Valkey) -> Iterator[tuple[Engine, Engine]]:
    two = Engine(Place(valkey.url())), Engine(Place(valkey.url()))
    yield two
    for one in two:
        one.close()


ONE, OTHER = b"n" * 16, b"o" * 16


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_change_whose_reply_is_lost_is_never_said_to_be_refused(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, overtaken: bool
) -> None:
    """It is asked for again; when another has had the lock meanwhile, the server does not know what became of it."""
    one, other = engines
    one.hold(ONE)
    one.change(ONE, number_of(ONE), b"", LEASE)  # the scripts are there
    made, send = list[int](), one._send

    def lose(command: tuple[Any, ...]) -> Any:
        made.append(int(send(command)))
        monkeypatch.setattr(one, "_send", send)
        if overtaken:
            other.hold(OTHER)
            assert other.change(OTHER, number_of(OTHER), b"theirs")
        raise redis.ConnectionError("lost")

    monkeypatch.setattr(one, "_send", lose)
    if overtaken:
        with pytest.raises(BackendError, match="may be committed"):
            one.change(ONE, number_of(ONE), b"ours")
    else:
        assert one.change(ONE, number_of(ONE), b"ours") == made[0]  # it was made once


def test_a_change_that_comes_late_replaces_no_later_one(engines: tuple[Engine, Engine]) -> None:
    """It was on its way for long, was asked for again, and others of that grant came after it."""
    one, other = engines
    one.hold(ONE)
    first, second = number_of(ONE), number_of(ONE)
    assert one.change(ONE, first, b"first", LEASE) and one.change(ONE, second, b"second", LEASE)
    assert one.change(ONE, first, b"first", LEASE) is None
    assert other.load("counter", Known()).payload == b"second"


def test_a_release_of_a_killed_owner_that_comes_late_ends_nobodys_grant(engines: tuple[Engine, Engine]) -> None:
    """The next of its host has asked with the same nonce, and has it by that."""
    one, other = engines
    one.hold(ONE)
    late = number_of(ONE)
    other.hold(ONE)
    assert one.change(ONE, late, b"late") is None
    assert other.change(ONE, number_of(ONE), b"next")


def test_a_wait_that_is_cut_goes_on(valkey: servers.Valkey, proxy: Proxy, start: Start) -> None:
    holder, waiting = start(valkey.url()), start(through(proxy))
    holder.do("acquire")
    waiting.tell("acquire")
    wait_until_waiting(valkey, 1)
    proxy.cut(reset=True)
    holder.do("release")
    begun = time.monotonic()
    assert waiting.result() and time.monotonic() - begun < 2 * delays.MEDIUM


@pytest.mark.parametrize("fault", ["stall", "refuse"])
def test_a_server_that_is_not_reached_ends_every_call_in_time(proxy: Proxy, start: Start, fault: str) -> None:
    one = start(through(proxy))
    one.do("acquire")
    one.do("write", 7)
    getattr(proxy, fault)()
    for act in ("release", "add", "value", "acquire"):
        begun = time.monotonic()
        with pytest.raises((BackendError, LeaseLostError)):
            one.do(act)
        assert time.monotonic() - begun < 2 * LEASE, act
    proxy.forward()
    states.wait_until(lambda: reached(one), "it works again")


def reached(one: Host) -> bool:
    try:
        return bool(one.do("add"))
    except BackendError:
        return False


def test_a_slow_server_is_waited_for(proxy: Proxy, start: Start) -> None:
    one = start(through(proxy))
    proxy.slow(LEASE / 20)
    assert [one.do("add"), one.do("add")] == [1, 2]
    one.do("acquire")
    one.do("ensure")
    assert not one.do("lost")


# ---- secrets, and what others have put there -----------------------------------------------------------------

SECRET = "not-for-you"


def test_a_password_is_told_to_nobody_but_the_server(start: Start, tmp_path: Path) -> None:
    with servers.valkey(user="me", password=SECRET) as server:
        one = start(server.url())
        assert one.do("add") == 1
        one.do("acquire")
        said = one.do("looks")
        with pytest.raises(IncompatibleError) as refused:
            one.do("semaphore", server.url())
        environment = os.environ | {"COHELD_DIR": str(tmp_path / "host-0"), "COHELD_BACKEND": server.url()}
        for command in ("ps", "ps counter"):
            line = [sys.executable, "-m", "coheld", *command.split()]
            shown = subprocess.run(line, check=False, env=environment, capture_output=True, text=True)
            said += [shown.stdout, shown.stderr]
        server.kill()
        states.wait_until(lambda: one.do("heard"), "it is lost")
        for act in ("release", "add"):
            with pytest.raises((BackendError, LeaseLostError)) as error:
                one.do(act)
            said += [str(error.value), repr(vars(error.value))]
    said += [str(refused.value), *one.do("log"), *os.listdir(tmp_path / "host-0")]
    assert len(one.do("log")) > 0
    assert SECRET not in " ".join(said)


def tried(link: procs.Link, url: str) -> str:
    try:
        Counter(lock_name="counter", lock_backend=url)
    except BackendError as error:
        return str(error)
    return "no error"


def test_a_wrong_password_is_said_to_be_one() -> None:
    with (
        servers.valkey(password=SECRET) as server,
        procs.start(tried, server.url().replace(SECRET, "wrong-one")) as client,
    ):
        said = client.result()
    assert "password" in said and "refuses" in said and "wrong-one" not in said, said


def test_what_another_program_has_under_the_name(valkey: servers.Valkey, start: Start) -> None:
    one = start(valkey.url())
    for put in (
        lambda client: client.set(KEY, "theirs"),
        lambda client: client.rpush(KEY, "theirs"),
        lambda client: client.hset(KEY, mapping={"v": "theirs"}),
        lambda client: client.hset(KEY, mapping={"t": "theirs"}),
        lambda client: client.hset(KEY, mapping={"g": "theirs"}),
        lambda client: client.hset(KEY, mapping={"v": "3"}),
        lambda client: client.set(WAITING, "theirs"),
    ):
        with valkey.client() as client:
            client.delete(KEY, WAITING)
            put(client)
        with pytest.raises(IncompatibleError):
            one.do("add")
    with valkey.client() as client:
        client.delete(KEY, WAITING)
    assert one.do("add") == 1


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return os.putenv, ("UNPICKLED", "yes")


class Other(Lockable):
    value: str = shared("")

    @Lockable.locked
    def add(self) -> None:
        self.value += "1"


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: b"",
        lambda state: state[:-1],
        lambda state: state + b"0",
        lambda state: b"\xff" * len(state),
        lambda state: pickle.dumps(Canary()),
        lambda state: b"\x92\xc4\x02\x90\x00\x90",
        lambda state: bytes(len(state)),
        lambda state: state[:-1] + b"\xc1",
        lambda state: state.replace(b"int", b"str"),
        lambda state: b"\xdd\xff\xff\xff\xff",
    ],
    ids=["none", "short", "long", "noise", "pickle", "other", "zeros", "value", "type", "huge"],
)
def test_damaged_state(valkey: servers.Valkey, start: Start, damage: Callable[[bytes], bytes]) -> None:
    one, other = start(valkey.url()), start(valkey.url())
    assert one.do("add") == 1
    with valkey.client() as client:
        client.hset(KEY, "s", damage(client.hget(KEY, "s")))
    for act in ("add", "value", "add"):
        with pytest.raises(IncompatibleError):
            other.do(act)
    assert not other.do("unpickled")
    assert one.do("add") == 2 and other.do("add") == 3  # the one has a copy


def test_state_of_another_class(valkey: servers.Valkey, start: Start) -> None:
    one, other = start(valkey.url()), start(valkey.url())
    assert one.do("add") == 1
    with pytest.raises(IncompatibleError, match="another schema"):
        other.do("other", valkey.url())
    assert one.do("add") == 2


# ---- many ----------------------------------------------------------------------------------------------------


def many(link: procs.Link, directory: Path, url: str, number: int) -> int:
    os.environ["COHELD_DIR"] = str(directory)
    counter = Counter(lock_name="counter", lock_backend=url)

    async def main() -> None:
        waiting = [asyncio.ensure_future(add()) for _ in range(number)]
        await asyncio.sleep(0)
        link.say("waiting")
        await asyncio.gather(*waiting)

    async def add() -> None:
        async with counter:
            counter.value += 1

    asyncio.run(main())
    return counter.value


def commands(client: redis.Redis) -> int:
    return sum(stat["calls"] for stat in client.info("commandstats").values())


def test_a_thousand_waiting_tasks_do_not_stampede(valkey: servers.Valkey, start: Start, tmp_path: Path) -> None:
    number = 1000
    holder = start(valkey.url(), lease=60)
    holder.do("acquire")
    directory = tmp_path / "many"
    directory.mkdir(0o700)
    with valkey.client() as client, procs.start(many, directory, f"{valkey.url()}?lease=60", number) as tasks:
        tasks.expect("waiting")
        wait_until_waiting(valkey, 1)
        client.config_resetstat()
        holder.do("ensure")
        assert client.zcard(WAITING) == 1 and commands(client) < 20, client.info("commandstats")
        holder.do("release")
        assert tasks.result() == number
        assert commands(client) < 20 * number, client.info("commandstats")
