"""What is Redis' alone of what goes wrong: what it forgets, what others have put there, and that nobody stampedes."""

import asyncio
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import coheld
from coheld import BackendError, IncompatibleError, LeaseLostError
from coheld.backends.redis import Place, RedisServer
from coheld.backends.store import Ask, Change, Granted, Known, number_of
from coheld.testing.support import delays, procs, states
from engines import hosts, servers
from engines.hosts import LEASE, Counter, Host, Start
from engines.proxy import Proxy


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


def test_state_that_a_holder_did_not_look_at_is_there_for_others(valkey: servers.Valkey, start: Start) -> None:
    one, other = start(valkey.url()), start(valkey.url())
    one.do("write_plain", valkey.url(), 7)
    assert other.do("pickled", valkey.url())


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_what_was_kept_for_who_cannot_come_goes_to_other_hosts(
    valkey: servers.Valkey, start: Start, tmp_path: Path, fault: str
) -> None:
    """Nobody has told the lock that it waits no more."""
    url = f"{valkey.url()}?lease=60"
    holder, other = start(valkey.url(), lease=60), start(valkey.url(), lease=60)
    with procs.start(hosts.host, tmp_path / "host-0", url) as waiter:
        waiter.expect("ready")
        holder.do("pass on for long")
        holder.do("acquire")
        waiter.tell(("acquire",))
        waiter.wait_until_blocked()
        getattr(waiter, fault)()
        holder.do("release")
        assert other.do("acquire", delays.LONG)
        if fault == "stop":
            waiter.kill()


# ---- leases --------------------------------------------------------------------------------------------------


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


def take_turns(holder: Host, waiter: Host, server: servers.Valkey) -> None:
    holder.do("acquire")
    waiter.tell("acquire")
    wait_until_waiting(server, 1)
    holder.do("release")
    assert waiter.result()
    waiter.do("release")


def test_a_primary_that_follows_another_now_is_left(start: Start) -> None:
    """It lives on, and another is at its address: what one asks, and what it hears, is of that one."""
    with servers.valkey() as former, servers.valkey() as latter, Proxy(former.port) as proxy:
        one = start(through(proxy), lease=60)
        take_turns(start(former.url(), lease=60), one, former)
        assert one.do("add") == 1
        with former.client() as here, latter.client() as there:
            there.replicaof("127.0.0.1", former.port)
            states.wait_until(lambda: there.exists(KEY), "it follows")
            there.replicaof("NO", "ONE")
            proxy.turn_to(latter.port)
            here.replicaof("127.0.0.1", latter.port)
            states.wait_until(lambda: here.info("replication")["role"] == "slave", "the other follows")
        assert one.do("add") == 2
        take_turns(start(latter.url(), lease=60), one, latter)
        assert one.do("add") == 3 and one.do("log") == []


# ---- what is between -----------------------------------------------------------------------------------------


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
