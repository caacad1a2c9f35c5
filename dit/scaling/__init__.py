"""Experiments over sizes: laws of scale, and parametrizations whose best rate does not depend on the width."""
