"""An HTTP service around a pipeline: uvicorn examples.fastapi_app:app, then /image?prompt=a+handwritten+seven

A client that goes away ends its image within one step. Of several clients each waits for its turn.
"""

from __future__ import annotations

import asyncio
import io

from fastapi import FastAPI, HTTPException, Request, Response

import fastsd

app = FastAPI()
pipe = fastsd.Pipeline.from_pretrained("digits")  # or a folder, a file, a hub id


@app.get("/image")
async def image(request: Request, prompt: str, steps: int = 10, seed: int = 0) -> Response:
    work = asyncio.ensure_future(pipe.generate(prompt, num_inference_steps=steps, seed=seed))
    while not work.done():
        await asyncio.wait({work}, timeout=0.2)
        if await request.is_disconnected():
            work.cancel()
            return Response(status_code=499)
    try:
        result = work.result()
    except fastsd.FastsdError as error:
        raise HTTPException(422, str(error)) from error
    png = io.BytesIO()
    result.images[0].save(png, "PNG")
    return Response(png.getvalue(), media_type="image/png")
