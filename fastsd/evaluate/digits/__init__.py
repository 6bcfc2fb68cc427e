"""The checks of the digits model (docs/digits.md)."""
