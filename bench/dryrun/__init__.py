"""A GPU run without a GPU: the real code on fake CUDA tensors, every launch recorded (`python -m bench.dryrun`).

- `device`: CUDA tensors without memory, and what torch.cuda answers.
- `record`: the launches, in order; what a captured graph could not do raises.
- `cost`, `accesses`, `gpus`: kind, bytes and operations of a launch; the GPUs' published rates.
- `memory`: sizes and lifetimes.
"""
