"""Several processes that share a step's batch, started by `torchrun`: each computes a part of it on its own device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from fastsd.errors import FastsdError


class Processes:
    """The processes of a run; alone, one.

    Every process has all weights, and takes the same steps: gradients are added up before each (Li et al. 2020, as
    DistributedDataParallel does). That class is not used, since a loss calls parts of its networks, such as an
    encoder, and several networks are trained in turn. Only the main process writes files.

    Attributes:
        rank: the number of this process. count: of all. local: its number on this machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0):
        self.rank, self.count, self.local = rank, count, local

    @classmethod
    @contextmanager
    def joined(cls, cuda: bool) -> Iterator[Processes]:
        """Within the context, the processes that torchrun's environment names know each other.

        Raises:
            FastsdError: the environment is incomplete.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            yield cls()
            return
        try:
            rank, count, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
            if cuda:
                torch.cuda.set_device(local)
            dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=count)
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise FastsdError(f"the processes do not find each other ({first:.120}); start them by torchrun") from None
        try:
            yield cls(rank, count, local)
        finally:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first, the others after it, when its files are there."""
        if self.count > 1 and not self.main:
            dist.barrier()
        yield
        if self.count > 1 and self.main:
            dist.barrier()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true in any process."""
        return self.count > 1 and self.sums({"": float(flag)}, device)[""] > 0 or flag

    def sums(self, figures: dict[str, float], device: torch.device) -> dict[str, float]:
        """The sums of figures that all processes have."""
        if self.count == 1:
            return figures
        names = sorted(figures)
        values = torch.tensor([figures[name] for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(values)
        return dict(zip(names, values.tolist()))

    def add_up_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by the sum over the processes, in one message."""
        if self.count == 1:
            return
        device = parameters[0].device
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters]
        message = torch.cat([used, *flat])
        dist.all_reduce(message)
        used, rest = message[: len(used)], message[len(used) :]
        for parameter, part, there in zip(parameters, rest.split([p.numel() for p in parameters]), used.tolist()):
            if there:  # in the memory layout that it had, in which norms are summed
                layout = parameter if parameter.grad is None else parameter.grad
                parameter.grad = torch.empty_like(layout).copy_(part.view_as(parameter))
