"""Sampling: a sampler is a table of coefficients, and one update runs them all."""
