"""The models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
DIGITS = "digits"  # the default
BUNDLED = {name: ASSETS / name for name in (DIGITS, "emoji")}
