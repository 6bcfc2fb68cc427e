"""The server: `python -m fastsd serve`, one queue before one worker, behind the HTTP APIs that clients know."""

from __future__ import annotations

import argparse
import asyncio

from fastsd.errors import FastsdError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd serve`."""
    from fastsd.server import settings

    settings.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes.

    Raises:
        FastsdError: a flag that is wrong, a port that is taken, a model that cannot be loaded, a missing package.
    """
    from fastsd.server import settings

    own = settings.read(args)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise FastsdError(f"it needs {error.name}, which is missing; pip install 'fastsd[server]'") from None
    if own.ray is not None:
        from fastsd.server.replicas import serve_replicas

        return serve_replicas(own)
    from fastsd.server.serve import serve

    return asyncio.run(serve(own))
