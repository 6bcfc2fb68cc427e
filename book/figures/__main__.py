"""Draw the figures: `python -m book.figures [name ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from book.figures import diffusion, images, model, sampling, speed
from book.figures.style import DPI, plt

FOLDER = Path(__file__).parents[2] / "docs" / "book" / "images"
FIGURES = {
    function.__name__: function
    for function in (
        *(diffusion.forward, diffusion.flow, model.between, model.emoji, model.unet, model.guidance),
        *(sampling.samplers, images.resizing, images.upscaling, speed.roofline),
    )
}


def main(names: list[str]) -> None:
    unknown = set(names) - set(FIGURES)
    if unknown:
        sys.exit(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or FIGURES:
        figure = FIGURES[name]()
        figure.savefig(FOLDER / f"{name}.png", dpi=DPI, metadata={"Software": None})
        plt.close(figure)
        print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
