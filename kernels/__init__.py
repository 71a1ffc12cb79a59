"""Kernels and their reference in plain torch; installed as ``vas_engine.kernels``."""
