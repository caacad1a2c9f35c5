"""Feature networks: from images to the spaces in which sets of them are compared."""
