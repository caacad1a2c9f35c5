"""Keys that take none, one or several members of an axis, and keep the plainest of these forms."""

from __future__ import annotations

from typing import Any

from pydantic_core import core_schema

from dit.config import Complaint, ConfigError, Registry, parts_of


class Plainest:
    """Lets a key that took one member or null take a list of them too, as an annotation of its type.

    terms: Annotated[
        Annotated[Term, TERMS] | tuple[Annotated[Term, TERMS], ...] | None, Plainest()
    ] = None

    A list of one is that one, an empty list None: what is one thing has one form, and one form when it is written,
    that of a key which never took a list.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        registry = next(part for part in parts_of(source) if isinstance(part, Registry))
        return core_schema.no_info_plain_validator_function(lambda value: _plainest(registry, value))


def _plainest(registry: Registry[Any], value: Any) -> Any:
    """None, a member, or a tuple of at least two. Raises ConfigError that names the place of each bad one."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return registry.parse(value)
    members: list[Any] = []
    problems: list[Complaint] = []
    for place, item in enumerate(value):
        try:
            members.append(registry.parse(item))
        except ConfigError as error:
            problems += [Complaint((str(place), *p.key), p.message) for p in error.problems]
    if problems:
        raise ConfigError(problems=problems)
    return tuple(members) if len(members) > 1 else next(iter(members), None)
