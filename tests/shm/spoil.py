"""Damage, of all kinds, to the bytes of a segment file."""

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from coheld import _native
from coheld.backends import files

HEADER = files._FIELDS.size + files._CHECK.size  # bytes; what follows up to the cell has no meaning
CELL = _native.CELL_SIZE
# Where things are in a cell; the first four are pthread's.
LOCK_WORD, OWNER, MUTEX_KIND, FLAGS, MAGIC, KIND = 0, 8, 16, 44, CELL - 8, CELL - 4
WAITERS = 1 << 31  # in the lock word


def read_header(path: Path) -> files.Header:
    """What the file says of itself."""
    return files.Header(*files._FIELDS.unpack_from(path.read_bytes()))


def change_header(path: Path, **fields: Any) -> None:
    """Let it say something else, with a checksum that fits."""
    overwrite(path, 0, replace(read_header(path), **fields).pack())


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of the file that is there; who maps it sees it."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int, bit: int) -> None:
    """Change one bit of it."""
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 1 << bit]))


def word_at(path: Path, offset: int) -> int:
    """A word of four bytes."""
    return int.from_bytes(path.read_bytes()[offset : offset + 4], "little")


def put_word(path: Path, offset: int, value: int) -> None:
    """Change a word of four bytes."""
    overwrite(path, offset, value.to_bytes(4, "little"))


WORDS = (0, 1, 2, 255, 256, 4095, 4096, 2**22, 2**29, 2**30, 2**30 + 1, 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1)


def flip_some(rng: random.Random, data: bytearray, cell: int) -> None:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_in_cell(rng: random.Random, data: bytearray, cell: int) -> None:
    for _ in range(rng.randint(1, 16)):
        data[cell + rng.randrange(CELL)] ^= 1 << rng.randrange(8)


def odd_words_in_cell(rng: random.Random, data: bytearray, cell: int) -> None:
    for _ in range(rng.randint(1, 8)):
        at = cell + 4 * rng.randrange(CELL // 4)
        data[at : at + 4] = rng.choice([*WORDS, os.getpid(), os.getppid()]).to_bytes(4, "little")


def odd_flags(rng: random.Random, data: bytearray, cell: int) -> None:
    data[cell + FLAGS : cell + FLAGS + 4] = rng.randrange(2**32).to_bytes(4, "little")


def noise_in_cell(rng: random.Random, data: bytearray, cell: int) -> None:
    """All but what marks it as a cell."""
    kind = data[cell + MUTEX_KIND : cell + MUTEX_KIND + 4]
    data[cell : cell + MAGIC] = rng.randbytes(MAGIC)
    data[cell + MUTEX_KIND : cell + MUTEX_KIND + 4] = kind


def noise_in_header(rng: random.Random, data: bytearray, cell: int) -> None:
    first = rng.randrange(HEADER)
    length = rng.randint(1, HEADER - first)
    data[first : first + length] = rng.randbytes(length)


def noise_with_checksum(rng: random.Random, data: bytearray, cell: int) -> None:
    noise_in_header(rng, data, cell)
    data[: len(files.MAGIC)] = files.MAGIC
    fields = bytes(data[: files._FIELDS.size])
    data[len(fields) : HEADER] = files._CHECK.pack(crc32(fields))


def noise(rng: random.Random, data: bytearray, cell: int) -> None:
    data[:] = rng.randbytes(len(data))


def cut(rng: random.Random, data: bytearray, cell: int) -> None:
    del data[rng.randrange(len(data)) :]


def extend(rng: random.Random, data: bytearray, cell: int) -> None:
    data += rng.randbytes(rng.randint(1, 100_000))


def zero_some(rng: random.Random, data: bytearray, cell: int) -> None:
    first = rng.randrange(len(data))
    length = rng.randint(1, len(data) - first)
    data[first : first + length] = bytes(length)


def shift(rng: random.Random, data: bytearray, cell: int) -> None:
    data[:0] = bytes(rng.randint(1, 300))


WAYS = [
    flip_some,
    flip_in_cell,
    odd_words_in_cell,
    odd_flags,
    noise_in_cell,
    noise_in_header,
    noise_with_checksum,
    noise,
    extend,
    zero_some,
    shift,
    cut,
]
"""In an order in which one may follow another: nothing but the last takes bytes away."""


WAYS_IN_PLACE = [flip_in_cell, odd_words_in_cell, odd_flags, noise_in_header]
"""Those that a process can meet which has mapped the file: others would take the memory away."""
