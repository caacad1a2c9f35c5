"""Figures over the settings that images are drawn with: the axes, what is kept of a cell, tables and the picture."""
