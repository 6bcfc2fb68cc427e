"""How kernels are launched, as data: a table per op, keyed by architecture class, and the rule that reads it.

Nothing here imports Triton, so that the tables can be read and tested without it.
"""

# Passed by every launch: Triton 3.9 warns if it is not, and 3.10 reverses the default.
OPTIONS = {"enable_fp_fusion": True}
