"""Count a guided step's launches on a GPU that is not there.

python -m bench.dryrun --model sd15 [--gpu h100] [--batch 1] [--size 512] [--list]
"""

from __future__ import annotations

import argparse
from collections import Counter

from bench.dryrun.cost import KINDS
from bench.dryrun.device import why_not
from bench.dryrun.gpus import GPUS
from bench.dryrun.record import dry_run
from bench.dryrun.steps import guided_step
from bench.families import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FAMILIES, required=True)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=0, help="of the image, in pixels")
    parser.add_argument("--list", action="store_true", help="print every launch")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        parser.exit(2, f"error: no dry run here: {reason}\n")
    with dry_run(GPUS[arguments.gpu]) as run:
        guided_step(run, FAMILIES[arguments.model], arguments.batch, arguments.size)
    launches = run.of("step").launches
    if arguments.list:
        print(*launches, sep="\n")
    count, moved = Counter(x.kind for x in launches), Counter[str]()
    for launch in launches:
        moved[launch.kind] += launch.bytes
    for kind in KINDS:
        if count[kind]:
            print(f"{kind:12} {count[kind]:5} launches {moved[kind] / 1e9:8.3f} GB")
    print(f"{'all':12} {len(launches):5} launches {sum(moved.values()) / 1e9:8.3f} GB")
    print(f"{sum(x.hidden for x in launches)} of them are hidden copies")


if __name__ == "__main__":
    main()
