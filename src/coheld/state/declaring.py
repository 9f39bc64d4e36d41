"""What becomes of a class that has shared fields."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, get_args, get_origin, get_type_hints

from .. import native
from . import schema_of, unsettled
from .schema import MAX_STATE, Schema, Shared, Spec


def declare(cls: type, max_state: int | None) -> None:
    """Make descriptors of what the class declares as shared, and of what it inherits.

    Raises: TypeError: if that cannot be; it names the field.
    """
    own = {name: one for name, one in vars(cls).items() if isinstance(one, Shared | native.Field)}
    mixed = _mixed_in(cls)
    parents = {parent for base in cls.__bases__ if (parent := schema_of(base))}
    if max_state is not None:
        _check_limit(cls, max_state)
    if not own and not mixed and not parents:
        if max_state is not None:
            raise TypeError(f"{cls.__qualname__} has max_state, and no shared fields")
        return
    _refuse_bases(cls)
    if not own and not mixed and len(parents) == 1 and max_state is None:
        _Settling(cls, parents.pop())
        return
    specs = _inherited(cls) | mixed | _declared(cls, own)
    limit = max_state if max_state is not None else max((parent.max_state for parent in parents), default=MAX_STATE)
    _Settling(cls, Schema(cls, specs, limit)).when_made()


def _check_limit(cls: type, limit: object) -> None:
    if type(limit) is not int:
        raise TypeError(f"{cls.__qualname__}: max_state is a number of bytes, an int, not {type(limit).__name__}")
    if not 1 <= limit < 1 << 63:
        raise ValueError(f"{cls.__qualname__}: max_state is a number of bytes, from 1 to 2**63 - 1, not {limit}")


def _refuse_bases(cls: type) -> None:
    for module, name in (("msgspec", "Struct"), ("pydantic", "BaseModel")):
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and issubclass(cls, base):
            raise TypeError(
                f"{cls.__qualname__} is a {module}.{name}, which makes fields of its own: it cannot have shared fields"
            )


def _inherited(cls: type) -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for base in reversed(cls.__mro__[1:]):
        for name, one in vars(base).items():
            if isinstance(one, native.Field):
                found[name] = one.schema.specs[one.index]
            else:
                found.pop(name, None)
    return {name: spec for name, spec in found.items() if name not in vars(cls)}


def _mixed_in(cls: type) -> dict[str, Spec]:
    """Of the fields of bases that are no Lockables, which nobody has made descriptors of, and which no class before
    them in the order of resolution redefines.  The bases stay as they are.

    Raises: TypeError: if an annotation is missing, or a decorator has made a field of its own of one.
    """
    specs: dict[str, Spec] = {}
    seen = set(vars(cls))
    for base in cls.__mro__[1:]:
        _refuse_taken(base)
        names = [name for name, one in vars(base).items() if isinstance(one, Shared) and name not in seen]
        if names:
            annotations, around = _annotations_of(base), _names_around(base)
            specs |= {name: _spec(base, name, vars(base)[name], annotations, around) for name in names}
        seen |= vars(base).keys()
    return specs


def _refuse_taken(base: type) -> None:
    """Raises: TypeError: if the arguments of this mixin's __init__, by @dataclass or attrs, are to be its fields."""
    fields = [*vars(base).get("__dataclass_fields__", {}).values(), *vars(base).get("__attrs_attrs__", ())]
    for field in fields:
        if isinstance(field.default, Shared):
            raise TypeError(
                f"{base.__qualname__}.{field.name} cannot be shared: what decorates {base.__qualname__} has made an "
                "argument of __init__ of it; let it inherit Lockable, or leave it undecorated"
            )


def _spec(cls: type, name: str, one: Shared, annotations: Mapping[str, Any], around: dict[str, Any]) -> Spec:
    if name not in annotations:
        raise TypeError(f"{cls.__qualname__}.{name} is shared, and needs an annotation: {name}: int = shared(…)")
    return Spec(name, f"{cls.__qualname__}.{name}", one, _Annotation(cls, annotations[name], around))


def _declared(cls: type, own: Mapping[str, Any]) -> dict[str, Spec]:
    """Of the fields declared here, which are marked as class variables, so that dataclasses and attrs leave them alone.
    Descriptors are there already where a decorator makes its own version of the class.

    Raises: TypeError: if an annotation is missing.
    """
    annotations, specs, names = _annotations_of(cls), {}, _names_around(cls)
    for name, one in own.items():
        if isinstance(one, native.Field):
            specs[name] = one.schema.specs[one.index]
            continue
        specs[name] = _spec(cls, name, one, annotations, names)
        given = annotations[name]
        annotations[name] = given if _is_class_variable(given) else _as_class_variable(specs[name].label, given)
    if own:
        cls.__annotations__ = annotations
    return specs


def _is_class_variable(annotation: Any) -> bool:
    text = annotation if isinstance(annotation, str) else ""
    return get_origin(annotation) is ClassVar or text.startswith(("ClassVar[", "typing.ClassVar["))


def _as_class_variable(label: str, annotation: Any) -> Any:
    try:
        return ClassVar[annotation]
    except TypeError as error:
        raise TypeError(f"{label} cannot be shared: {error}") from None


def _annotations_of(cls: type) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        return dict(annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF))
    return dict(vars(cls).get("__annotations__", {}))


def _names_around(cls: type) -> dict[str, Any]:
    """The local names of the function that the class is made in: annotations may use them."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == cls.__module__ and frame.f_code.co_name != "__init_subclass__":
            return {} if frame.f_locals is frame.f_globals else dict(frame.f_locals)
    return {}


class _Annotation:
    """An annotation as it was written, and where its names are known."""

    def __init__(self, cls: type, given: Any, names: dict[str, Any]) -> None:
        self.given, self.module, self.names = given, cls.__module__, names
        self.cls = weakref.ref(cls)

    def resolve(self) -> Any:
        """The type. Raises: NameError: if a name in it is not known yet.  TypeError: if it is no type of a field."""
        cls = self.cls()
        names = self.names | ({cls.__name__: cls} | dict(vars(cls)) if cls else {})
        holder = type("", (), {"__annotations__": {"it": self.given}})
        module = vars(sys.modules[self.module]) if self.module in sys.modules else {}
        hint = get_type_hints(holder, module, names, include_extras=True)["it"]
        hint = get_args(hint)[0] if get_origin(hint) is ClassVar else hint
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if get_origin(bare) is Final:
            raise TypeError("Final says that nobody assigns it")
        return hint


class _Settling:
    """A class with shared fields, until its first object: names in its annotations may be known only then, and what
    decorates it may have taken descriptors away."""

    def __init__(self, cls: type, schema: Schema) -> None:
        number = id(cls)
        self.cls = weakref.ref(cls, lambda _: unsettled.pop(number, None))
        self.schema = schema
        unsettled[number] = self.first_object

    def when_made(self) -> None:
        """Raises: TypeError: if a type cannot be shared."""
        try:
            self.schema.settle()
        except NameError:
            self.schema.install(self.schema.owner())

    def first_object(self) -> None:
        """Raises: TypeError: if the class is not as it was declared, or a type cannot be shared."""
        cls = self.cls()
        assert cls is not None
        self.schema.check(cls)
        try:
            self.schema.settle()
        except NameError as error:
            raise TypeError(
                f"{cls.__qualname__}: the annotation of a shared field cannot be resolved: {error}"
            ) from error
        unsettled.pop(id(cls), None)
