"""Sets of images to be evaluated, whatever they lie in: streamed by number, and known by their content."""
