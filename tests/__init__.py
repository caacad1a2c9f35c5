"""Tests; a package of its own name, or one of that name among the installed ones would be taken for it."""
