"""The three ways in which every experiment's command can be started."""

from __future__ import annotations

from dit.config import ConfigError
from dit.ranks import early
from dit.train.dry_run import dry_run as tell_cost
from dit.train.plan import MakeParts
from dit.train.preflight import checks
from dit.train.settings import RunConfig
from dit.train.start import train


def start(cfg: RunConfig, make_parts: MakeParts, *, dry_run: bool, preflight: bool) -> bool:
    """Train, or only tell what that costs, or only check; whether it trained. Collective.

    All three refuse what cannot be trained, in the same words. Raises ConfigError where both are asked for.
    """
    if dry_run and preflight:
        raise ConfigError("--dry_run and --preflight are two things: leave one of them out")
    if dry_run or preflight:
        early.end_if_asked()
    if dry_run:
        tell_cost(cfg, make_parts)
    elif preflight:
        checks.check_and_print(cfg, make_parts)
    else:
        train(cfg, make_parts)
    return not (dry_run or preflight)
