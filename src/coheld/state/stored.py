"""A state as a store on another host has it: one value, with all fields in it."""

from __future__ import annotations

import msgspec


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    """Names and types of the fields, and the encoding of each."""

    schema: bytes
    fields: list[bytes]


_decoded = msgspec.msgpack.Decoder(_Stored).decode
_decoded_schema = msgspec.msgpack.Decoder(list[tuple[str, str]]).decode


def pack(schema: bytes, fields: list[bytes]) -> bytes:
    """schema: a schema.Schema's record."""
    return msgspec.msgpack.encode(_Stored(schema, fields))


def unpack(payload: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """Of each field by its name: its type, as text, and its encoding. Raises: UNDECODABLE: if it is no state."""
    stored = _decoded(payload)
    texts = dict(_decoded_schema(stored.schema))
    return texts, dict(zip(texts, stored.fields, strict=True))
