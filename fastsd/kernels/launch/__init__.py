"""How kernels are launched, as data: one table an op, keyed by architecture class, and the rule that reads it.

Nothing here imports Triton, so that a table can be read, shown and tested where there is none.
"""
