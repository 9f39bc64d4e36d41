"""The shared fields of a class: their types, how they are encoded, and how they find the state of a resource."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .. import native
from ..errors import IncompatibleError, NotLockedError, StateError
from .frozen import Frozen, freeze, thaw
from .shapes import ASSIGNED, COPIED, MUTABLE, Shape, UnfitError, shape_of
from .slots import UNDECODABLE
from .surplus import Search, search_of

MAX_STATE = 64 << 20
_MISSING: Any = object()


def _foreign(value: Any) -> Any:
    """What msgspec does not know, but is meant as a plain value: of numpy, or a subclass of a builtin type."""
    if hasattr(value, "dtype") and hasattr(value, "item"):
        return value.item()
    plain: Any
    for plain in (int, float, str, bytes):
        if isinstance(value, plain):
            return plain(value)
    raise TypeError(f"{type(value).__name__} cannot be stored")


_encode = msgspec.msgpack.Encoder(enc_hook=_foreign).encode


@dataclass(frozen=True)
class Shared:
    """What ``shared(…)`` leaves in the class body until the class is made."""

    default: Any = _MISSING
    default_factory: Callable[[], Any] | None = None


@dataclass
class Spec:
    """One field.  label: as errors name it."""

    name: str
    label: str
    declared: Shared
    annotation: Any
    """Until its names are known."""
    shape: Shape = field(default_factory=lambda: Shape(""))
    decode: Callable[[Any], Any] = field(default=bytes)
    surplus: Search | None = None
    initial: bytes | None = None
    constant: Any = None
    """The default, if that is the same object for all."""

    def settle(self) -> None:
        """Fix the type. Raises: TypeError: if it cannot be shared, or its default is none of it."""
        if self.annotation is None:
            return
        try:
            annotation = self.annotation.resolve()
            info = msgspec.inspect.type_info(annotation)
            self.shape, self.surplus = shape_of(info), search_of(info)
            self.decode = msgspec.msgpack.Decoder(annotation).decode
        except UnfitError as error:
            raise TypeError(f"{self.label} cannot be shared: its type has {error}") from None
        except TypeError as error:
            raise TypeError(f"{self.label} cannot be shared: {error}") from None
        self.annotation = None
        if self.declared.default_factory is None:
            try:
                self.initial = self.encode(self.declared.default)
                self.constant = self.as_read(self.declared.default, self.initial)
            except StateError as error:
                raise TypeError(f"the default of {self.label} is not what its type says: {error}") from None

    @property
    def kinds(self) -> int:
        return self.shape.kinds | MUTABLE * self.shape.mutable | COPIED * self.shape.copied

    def is_drawn(self, default: Any) -> bool:
        """Is the next default another one than this, as uuid4's are?"""
        return self.declared.default_factory is not None and self.encode(default) != self.encode(self.default())

    def default(self) -> Any:
        """A new default value. Raises: StateError: of a factory, if it is none of the type."""
        if self.declared.default_factory is not None:
            made = self.declared.default_factory()
            return self.as_read(made, self.encode(made))
        return self.decode(self.initial) if self.shape.mutable else self.constant

    def encode(self, value: Any) -> bytes:
        """Raises: StateError: if it has no encoding."""
        try:
            return _encode(value)
        except OverflowError as error:
            integer = "ints" in str(error)
            why = "integers have 64 bits, from -2**63 to 2**64 - 1" if integer else f"{error}, as UTC"
            raise StateError(f"{self.label}: {why}") from None
        except UNDECODABLE as error:
            raise StateError(f"{self.label}: {error}") from error

    def decoded(self, raw: bytes) -> Any:
        """Raises: StateError: if a reader would refuse the bytes."""
        try:
            return self.decode(raw)
        except UNDECODABLE as error:
            raise StateError(f"{self.label} is {self.shape.text}: {error}") from error

    def as_read(self, value: Any, raw: bytes) -> Any:
        """What becomes of a value that has this encoding.

        Raises: StateError: if a reader would refuse it, or get less than it is.
        """
        read = self.decoded(raw)
        if self.surplus and (more := self.surplus([value])):
            raise StateError(f"{self.label} is {self.shape.text}, and its value has more, which would be lost: {more}")
        return read

    def checked(self, value: Any) -> Any:
        """The value as it is assigned: one that cannot be changed is what readers will see, a container is looked at
        when it is committed, and its owner may change it until then.

        Raises: StateError: if it has no encoding, or as as_read.
        """
        if not self.shape.mutable:
            return self.as_read(value, self.encode(value))
        try:
            return thaw(value) if self.shape.freeze is freeze or isinstance(value, Frozen) else value
        except RecursionError as error:
            raise StateError(f"{self.label}: {error}") from error

    def frozen(self, value: Any) -> Any:
        """The value for readers; value is nobody else's."""
        return self.shape.freeze(value) if self.shape.freeze else value


class Schema:
    """All shared fields of a class, by name.  Its methods that begin with an underscore are called by Field."""

    def __init__(self, owner: type, specs: Mapping[str, Spec], max_state: int) -> None:
        self.owner = weakref.ref(owner)
        self.title = owner.__qualname__
        self.names = tuple(sorted(specs))
        self.specs = [specs[name] for name in self.names]
        self.max_state = max_state
        self.settled = False

    def settle(self) -> None:
        """Fix the types of the fields. Raises: NameError: if an annotation has a name that is not known yet.
        TypeError: if a field cannot be shared."""
        if self.settled:
            return
        for spec in self.specs:
            spec.settle()
        self.settled = True
        self.kinds = bytes(spec.kinds for spec in self.specs)
        self.texts = {spec.name: spec.shape.text for spec in self.specs}
        self.record = _encode([[spec.name, spec.shape.text] for spec in self.specs])
        self.install(self.owner())

    def install(self, owner: type | None) -> None:
        """Put the descriptors into the class; again, when their types are known."""
        assert owner is not None
        for index, spec in enumerate(self.specs):
            setattr(owner, spec.name, native.Field(self, index, spec.name, spec.kinds))

    def check(self, owner: type) -> None:
        """Raises: TypeError: if a descriptor is not there any more, taken away by a decorator of the class, or
        hidden by what a subclass has under its name."""
        for spec in self.specs:
            where = next((cls for cls in owner.__mro__ if spec.name in vars(cls)), None)
            found = vars(where)[spec.name] if where else None
            if isinstance(found, native.Field):
                continue
            if where in (None, self.owner()):
                raise TypeError(
                    f"{owner.__qualname__}.{spec.name} was declared as shared, and is {found!r} now: "
                    "what decorates the class has replaced it"
                )
            raise TypeError(
                f"{where.__qualname__}.{spec.name} is {found!r}, and replaces the shared field {spec.label}: "
                "give one of them another name"
            )

    def bind(self, lock: Any) -> Any:
        """The View by which the calling thread gets at this schema's fields, made if there is none; for the owner, it
        is the lock's from now on.

        Raises: IncompatibleError: if the owner has changed fields of another class of this resource.
        """
        from .view import view_of  # it needs what this module has

        self.settle()
        while True:  # until no other thread has attached it anew, or been first, meanwhile
            if not lock.attached or (lock.flags & native.REMOVED and not lock._mine()):
                lock._attach()
            latest = lock.view
            if latest is not None and latest.schema is self:
                return latest
            self._refuse_in_between(lock, latest)
            siblings = latest.siblings if latest else []
            view = next((one for one in siblings if one.schema is self), None) or view_of(lock, self, siblings)
            if lock._adopt(view, latest):
                return view

    def _refuse_in_between(self, lock: Any, latest: Any) -> None:
        if lock.pending and lock._mine():
            raise IncompatibleError(
                f"{lock.label}: fields of {latest.schema.title} were changed in this call, and now fields of "
                f"{self.title} are asked for: one call can change those of one class",
                resource=lock.label,
            )

    def _get(self, lock: Any, index: int, obj: object) -> Any:
        view = self.bind(lock)
        return view._value_inside(obj, index) if lock._mine() else view._current_value(index)

    def _set(self, lock: Any, index: int, value: Any, _obj: object) -> None:
        self.bind(lock)
        spec = self.specs[index]
        if not lock._mine():
            raise NotLockedError(
                f"{spec.label} is shared, and was set without the lock: set it in a locked method, with obj: …, "
                "or for its first value in __create__(self)",
                resource=lock.label,
            )
        if lock.guarding:
            raise NotLockedError(f"{spec.label} was set in a guard, which may only look", resource=lock.label)
        value = spec.checked(value)
        self.bind(lock)  # again: a signal's handler may have looked at another class's fields
        lock._put(index, value, ASSIGNED)


class Snapshot:
    """All shared fields of an object, as one commit left them: attributes, read-only."""

    __slots__ = ("__title", "__values")

    def __init__(self, title: str, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_Snapshot__title", title)
        object.__setattr__(self, "_Snapshot__values", values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_Snapshot__"):  # a copy that is being made
            raise AttributeError(name)
        try:
            return self.__values[name]
        except KeyError:
            raise AttributeError(f"{self.__title} has no shared field {name!r}") from None

    def __setattr__(self, name: str, _value: Any) -> None:
        raise NotLockedError(f"{self.__title}.{name}: a snapshot is read-only")

    def __delattr__(self, name: str) -> None:
        raise NotLockedError(f"{self.__title}.{name}: a snapshot is read-only")

    def __dir__(self) -> list[str]:
        return list(self.__values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and bool(self.__values == other.__values)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Snapshot, (self.__title, dict(self.__values))

    def __repr__(self) -> str:
        return f"{self.__title}({', '.join(f'{name}={value!r}' for name, value in self.__values.items())})"
