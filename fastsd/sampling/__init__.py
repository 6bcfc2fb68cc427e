"""Samplers as tables of coefficients, and the one update that runs them all."""
