"""The page at /, and what it asks about its own jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import Response

from fastsd.server.app_state import State
from fastsd.server.images import encode_plain
from fastsd.server.jobs import Job

FOLDER = Path(__file__).parent.parent / "assets" / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def page_routes(state: State) -> APIRouter:
    """The page's files, read once, and its jobs."""
    router = APIRouter(tags=["page"])
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS}

    def answer(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "no such file of the page")
        kind = f"{KINDS[Path(name).suffix]}; charset=utf-8"
        return Response(files[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return answer("index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        """A file of it."""
        return answer(name)

    def find(number: str) -> Job:
        job = state.queue.find(number)
        if job is None:
            raise HTTPException(404, "no job with this id waits or runs")
        return job

    @router.get("/jobs/{number}")
    async def look(number: str, preview: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        """How far a job is, and its preview if there is one later than this."""
        return await report(state, find(number), preview)

    @router.delete("/jobs/{number}")
    async def cancel(number: str) -> dict[str, bool]:
        """Cancel a job: it leaves the queue, or ends after its step."""
        state.queue.cancel(find(number))
        return {"cancelled": True}

    return router


async def report(state: State, job: Job, seen: int) -> dict[str, Any]:
    """The state of a job. Asking asks for the next preview, too."""
    loading = state.queue.loading
    state.queue.want_preview(job)
    image = job.preview if job.previews > seen else None
    return {
        "state": job.state,
        "place": state.queue.waiting.index(job) + 1 if job in state.queue.waiting else 0,
        "loading": loading.name if loading is not None else None,
        "index": job.index,
        "total": job.total,
        "progress": job.progress,
        "seconds_left": job.seconds_left,
        "previews": job.previews,
        "preview": await encode_plain(image, ".jpg") if image is not None else None,
    }
