"""Measurements: what this engine's decoding costs beside other ways to do the same."""
