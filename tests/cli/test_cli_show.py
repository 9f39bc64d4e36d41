"""coheld show: every healthy state is shown, whatever is in it and whatever the stream can say."""

import dataclasses
import datetime
import json
import os
import random
from typing import Any

import msgspec
import pytest

from cli import commands
from coheld import Lockable, shared
from coheld.state.slots import UNDECODABLE
from coheld.state.untyped import Pairs, decoded


@dataclasses.dataclass(frozen=True)
class Place:
    x: int
    name: str = "é"


class Key(msgspec.Struct, frozen=True, array_like=True):
    x: int


class Odd(Lockable):
    places: dict[Place, list[int]] = shared(default_factory=dict)
    within: dict[tuple[int, Place], dict[Key, str]] = shared(default_factory=dict)
    numbers: list[float] = shared(default_factory=list)
    both: dict[int | str, int] = shared(default_factory=dict)
    flags: dict[bool | None, int] = shared(default_factory=dict)
    text: str = shared("")


def filled(name: str) -> None:
    with Odd(lock_name=name) as odd:
        odd.places = {Place(1): [1, 2]}
        odd.within = {(1, Place(2)): {Key(3): "x"}}
        odd.numbers = [float("nan"), float("inf"), float("-inf"), 1.5]
        odd.both = {1: 10, "1": 20}
        odd.flags = {True: 1, None: 2}
        odd.text = "é€😀"


def shown(encoding: str, *arguments: str) -> str:
    """By the command, on a stream of that encoding."""
    settings = {**os.environ, "PYTHONIOENCODING": encoding}
    done = commands.coheld("show", *arguments, env=settings, encoding=encoding)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


FIELDS = {
    "places": [[{"x": 1, "name": "é"}, [1, 2]]],
    "within": [[[1, {"x": 2, "name": "é"}], {"(3,)": "x"}]],
    "numbers": ["NaN", "Infinity", "-Infinity", 1.5],
    "both": [[1, 10], ["1", 20]],
    "flags": {"True": 1, "None": 2},
    "text": "é€😀",
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_every_value_is_json_on_any_stream(encoding: str) -> None:
    filled("odd/é")
    text = shown(encoding, "--json", "odd/é")
    found = json.loads(text, object_pairs_hook=without_doubles)
    assert found["name"] == "odd/é"
    assert {name: field["value"] for name, field in found["fields"].items()} == FIELDS
    assert text.isascii() == (encoding != "utf-8")


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize(("encoding", "text"), [("utf-8", "'é€😀'"), ("ascii", r"'\xe9\u20ac\U0001f600'")])
def test_every_value_is_in_the_table_on_any_stream(encoding: str, text: str) -> None:
    filled("odd")
    lines = {line.split()[0]: line for line in shown(encoding, "odd").splitlines()}
    assert lines["text"].endswith(text)
    assert "{{'x': 1, 'name': " in lines["places"] and lines["places"].endswith("}: [1, 2]}")


def values(made: random.Random, depth: int = 4) -> Any:
    """One that is its own decoding."""
    choice = made.randrange(12 if depth else 9)
    size = made.choice([0, 1, 5, 31, 32, 255, 256, 70_000]) if depth > 2 else made.randrange(3)
    number = made.choice([0, 1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
    if choice == 9:
        return [values(made, depth - 1) for _ in range(min(size, 20))]
    if choice == 10:
        return {f"{n}": values(made, depth - 1) for n in range(min(size, 20))}
    if choice == 11:
        return made.choice([[0] * size, dict.fromkeys(range(size), 0)])
    when = datetime.datetime.fromtimestamp(number % 2**34, datetime.UTC)
    scalars = [None, made.random() < 0.5, number, -(number >> 1), number / 3, "x" * size, b"x" * size, when]
    return scalars[choice] if choice < 8 else msgspec.msgpack.Ext(5, b"x" * size)


def test_a_value_with_keys_that_are_records_is_decoded_as_any_other() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    made = random.Random(seed)
    for _ in range(300):
        value = values(made)
        raw = msgspec.msgpack.encode({Place(1): value, (1, Place(2)): 3})
        assert decoded(raw) == Pairs([({"x": 1, "name": "é"}, value), ((1, {"x": 1 + 1, "name": "é"}), 3)])
        cut = made.randrange(len(raw))
        for bad in (raw[:cut], raw + b"\0", b"\x81\x80\xc1"):
            with pytest.raises(UNDECODABLE):
                decoded(bad)
