"""How kernels are launched, as data: one table an op, keyed by architecture class, and the rule that reads it.

Nothing here imports Triton, so that a table can be read, shown and tested where there is none.
"""

# Every launch says so itself: Triton 3.9 warns where it is left open, and 3.10 turns the default round.
OPTIONS = {"enable_fp_fusion": True}
