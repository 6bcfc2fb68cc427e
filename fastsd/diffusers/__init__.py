"""diffusers' pipelines on fastsd's networks: `fastsd.accelerate(pipe)` and `fastsd.restore(pipe)` (docs/diffusers.md).

Nothing here imports diffusers: a pipeline that is given brings it along.
"""
