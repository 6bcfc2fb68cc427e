"""Benchmarks: fastsd and its peers on the same weights, interleaved in one run."""
