"""Benchmarks: fastsd beside what its users know, on the same weights, interleaved in one run."""
