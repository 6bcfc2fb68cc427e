"""A page with a prompt and an image that appears step by step: python examples/gradio_app.py (pip install gradio)"""

from __future__ import annotations

from collections.abc import Iterator

import gradio
from PIL import Image

import fastsd

pipe = fastsd.Pipeline.from_pretrained("digits")  # or a folder, a file, a hub id


def draw(prompt: str, steps: int, seed: int) -> Iterator[Image.Image]:
    """What the network sees after each step, then the image. Gradio closes this generator on Stop."""
    try:
        for step in pipe.stream(prompt, num_inference_steps=int(steps), seed=int(seed)):
            yield step.preview() if step.result is None else step.result.images[0]
    except fastsd.FastsdError as error:
        raise gradio.Error(str(error)) from error


page = gradio.Interface(
    draw,
    [gradio.Textbox("a handwritten five"), gradio.Slider(1, 50, 10, step=1), gradio.Number(0, precision=0)],
    gradio.Image(),
)

if __name__ == "__main__":
    page.queue().launch()
