"""Run a pipeline on a GPU that is not there, and count what it launches.

    python -m bench.dryrun --model sdxl [--gpu h100] [--way text] [--batch 1] [--size 1024] [--list]
    python -m bench.dryrun --write-docs

Launches and bytes are exact. Times are modelled from published rates, and optimistic: no launch is slower than its
operations or its bytes. The floor is that of `bench.roofline`. Memory is that of PyTorch's allocator, without the
workspaces of libraries.
"""

from __future__ import annotations

import argparse

from bench.dryrun import docs, table
from bench.dryrun.device import why_not
from bench.dryrun.gpus import GPUS
from bench.dryrun.record import dry_run
from bench.dryrun.ways import WAYS, generate
from bench.families import FAMILIES
from fastsd.errors import FastsdError, describe

FLAGS = {"num_images_per_prompt": "--batch", "width": "--size", "height": "--size"}  # of what the pipeline refuses


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.dryrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=FAMILIES)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--way", choices=WAYS, default="text", help="of using the pipeline (default: text)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--size", type=int, help="of an image, in pixels (default: the model's)")
    parser.add_argument("--list", action="store_true", help="print every launch of a step and of the decoder")
    parser.add_argument("--write-docs", action="store_true", help=f"bring {docs.PAGE.name} up to date")
    arguments = parser.parse_args(given)
    if arguments.write_docs and arguments != parser.parse_args(["--write-docs"]):
        parser.error("--write-docs runs what the page shows; leave the other flags out")
    reason = why_not()
    if reason is not None:
        parser.exit(2, f"error: no dry run here: {reason}\n")
    if arguments.write_docs:
        docs.write()
        return
    if arguments.model is None:
        parser.error("--model is needed, or --write-docs")
    gpu = GPUS[arguments.gpu]
    try:
        with dry_run(gpu) as run:
            generate(run, FAMILIES[arguments.model], arguments.way, arguments.batch, arguments.size)
    except FastsdError as error:
        parser.exit(2, f"error: {describe(error, lambda name: FLAGS.get(name, name))}\n")
    if arguments.list:
        for section in run.sections[1:]:
            print(section.name, *section.launches, "", sep="\n")
    print(table.text(run, gpu))


if __name__ == "__main__":
    main()
