"""A GPU run without a GPU: the real code on fake CUDA tensors, every launch recorded (`python -m bench.dryrun`).

- `device`: CUDA tensors without memory, and what torch.cuda answers.
- `record`: the launches, in order; what a captured graph could not do raises.
- `cost`, `accesses`, `floor`, `gpus`: kind, bytes and operations of a launch; the floor; the GPUs' published rates.
- `memory`: what PyTorch's allocator would hold.
- `networks`, `steps`, `ways`: what is run.
"""
