"""A package of its own: some that pip installs bring a "tests" too, which would be found first."""
