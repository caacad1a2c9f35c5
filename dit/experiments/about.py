"""What a configuration has chosen, for people."""

from __future__ import annotations

import dataclasses
from typing import Any

from dit.config import to_dict


def named(value: Any) -> str:
    """A config's choices in one line, those of its fields that are members of a registry: "path linear, times uniform".

    A choice whose own fields are not their defaults has them behind it: "times logit_normal {shift: 3.0}". Several in
    one field have a plus between them: "auxiliary direction + layersync".
    """
    parts = []
    for field in dataclasses.fields(value):
        chosen = getattr(value, field.name)
        members = chosen if isinstance(chosen, tuple) else (chosen,)
        if members and all(hasattr(type(member), "registered_name") for member in members):
            parts.append(f"{field.name.rstrip('_')} {' + '.join(_named(member) for member in members)}")
    return ", ".join(parts)


def _named(member: Any) -> str:
    given = {
        f.name.rstrip("_"): to_dict(getattr(member, f.name))
        for f in dataclasses.fields(member)
        if getattr(member, f.name) != f.default
    }
    inner = ", ".join(f"{key}: {item}" for key, item in given.items())
    return f"{type(member).registered_name}{f' {{{inner}}}' if inner else ''}"
