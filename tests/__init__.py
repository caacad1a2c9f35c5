"""A package by its file: some libraries install a `tests` of their own, which would come before a folder without."""
