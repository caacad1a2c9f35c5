"""The tests; a package by name, so that no other distribution's `tests` comes before it."""
