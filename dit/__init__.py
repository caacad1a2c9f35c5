"""A training system for diffusion transformers: exact, elastic and reproducible from a run directory."""

__version__ = "0.1.0"
