"""`python -m fastsd mcp`: two tools for an assistant, over its standard input and output (Model Context Protocol)."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from fastsd.errors import FastsdError
from fastsd.server import logs, settings

# The flags of `fastsd serve` that concern models and requests, not the network.
USED = ("models_dir", "lora_dir", "embedding_dir", "max_batch", "max_images", "max_side", "max_work", "keep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd mcp`."""
    settings.add_arguments(parser, USED)


def run(args: argparse.Namespace) -> int:
    """Serve one assistant until it closes our standard input.

    Raises:
        FastsdError: a flag that is wrong, a missing package.
    """
    own = settings.read(args)
    try:
        import fastapi  # noqa: F401
        import mcp.server.mcpserver  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise FastsdError(f"it needs mcp 2 or later ({error.name} is missing); pip install 'fastsd[mcp]'") from None
    from fastsd.server.assistant import make_server

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)  # standard output is the assistant's
    logs.set_up()
    asyncio.run(make_server(own).run_stdio_async())
    return 0
