"""`fastsd show reverse`: noise becomes an image, step by step, and what the network takes for the image all along."""

from __future__ import annotations

import io

from PIL import Image

from fastsd.image.drawing import enlarged, labelled, shrunk, titled
from fastsd.show.scene import CELL, Scene, as_colours, spread

MOST = 8  # steps in the strip
FRAMES = 60  # of the animation, at most
FIRST, EACH, LAST = 600, 160, 2000  # milliseconds


def draw(scene: Scene) -> list[bytes]:
    """The strip, and an animated WebP of every step."""
    rows: list[tuple[Image.Image, Image.Image, Image.Image]] = []
    total = 0
    for step in scene.stream():
        total = step.total
        now = step.latents[:1].float().cpu()
        clean = step.preview()
        rows.append(tuple(enlarged(shrunk(image, 256), CELL) for image in (as_colours(now), scene.decode(now), clean)))  # type: ignore[arg-type]
    chosen = spread(len(rows), MOST)
    names = ("latents", "decoded", "predicted")
    cells = [[(rows[k][row], f"step {k + 1}: {names[row]}") for k in chosen] for row in range(3)]
    settings = " ".join(f"{name.replace('num_inference_', '')}={value}" for name, value in scene.settings.items())
    title = f'The reverse process of {scene.model}: "{scene.prompt}"'
    notes = [
        f"Seed {scene.seed}, {total} steps, {settings or 'default settings'}.",
        "Above: the latents after the step, channels 1 to 3 as red, green and blue.",
        "Middle: the same, decoded. Below: the clean image that the network predicts at this step.",
    ]
    strip = titled(labelled(cells, scene.theme), title, notes, scene.theme)
    frames = [
        labelled([[(row[1], f"step {k + 1} of {total}: the latents"), (row[2], "the predicted image")]], scene.theme)
        for k, row in enumerate(rows)
    ]
    return [scene.png(strip), animation([frames[k] for k in spread(len(frames), FRAMES)])]


def animation(frames: list[Image.Image]) -> bytes:
    """Frames as an animated WebP that starts again; the last one stays longer."""
    stream = io.BytesIO()
    times = [EACH] * len(frames)
    times[0], times[-1] = FIRST, LAST
    frames[0].save(
        stream, "WEBP", save_all=True, append_images=frames[1:], duration=times, loop=0, quality=80, method=4
    )
    return stream.getvalue()
