"""The model that generates an image: what metadata says of it, and how a repeated image finds it again."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.bundled import BUNDLED, DIGITS
from fastsd.config import PREDICTIONS
from fastsd.errors import FastsdError

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline
    from fastsd.weights.hub.hub_id import HubId, ModelLocation

BLOCK, BLOCKS = 4096, 16


def settings(pipe: Pipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What identifies the model: for the hub, its id and commit; otherwise its path and a fingerprint."""
    source = pipe.source
    assert source is not None  # the command line loads every model from somewhere
    found: dict[str, Any] = {"prediction": args.prediction, "ema": args.ema, "model_hash": _hash(source.path)}
    bundled = args.model or DIGITS
    if bundled in BUNDLED:
        found |= {"model_path": bundled, "model_fingerprint": fingerprint(source.path)}
    else:
        found |= _of_place(source, args.model, "model_")
    for name, place in (("vae", pipe.vae_source), ("refiner", pipe.refiner_source)):
        if place is not None:
            given = getattr(args, name)
            found[name] = named(place, given)
            if digits := _hash(place.path):
                found[name]["hash"] = digits
    return found


def _of_place(place: ModelLocation, given: str, prefix: str = "") -> dict[str, Any]:
    """The path of a model, with its commit or its fingerprint."""
    if place.hub is not None:
        return {f"{prefix}path": _unpinned(place.hub), "revision": place.hub.revision}
    return {f"{prefix}path": without_home(given), f"{prefix}fingerprint": fingerprint(place.path)}


def _hash(path: Path) -> str | None:
    """A1111's short hash of a model file, if it is known."""
    from fastsd.files.hashes import known_sha256

    found = known_sha256(path) if path.is_file() else None
    return None if found is None else found[:10]


def _unpinned(found: HubId) -> str:
    return f"{found.repo}/{found.file}" if found.file else found.repo


def named(place: ModelLocation, given: str) -> dict[str, Any]:
    """What metadata says of a file besides the model: its name, as A1111 shows it, and `_of_place`."""
    path = given if place.hub is None else _unpinned(place.hub)
    return {"name": Path(path).name, **_of_place(place, given)}


def fill_in(args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> None:
    """Give `args` the model that generated an image, with its revision, autoencoder, refiner, prediction and `--ema`.

    Flags come first. With another model than the image's, these are left alone.

    Args:
        before: the image's settings. They are untrusted: nothing is downloaded because of them.
        notes: what the user should know is added.

    Raises:
        FastsdError: one of them is not on this machine.
    """
    path, name = before.get("model_path"), before.get("model")
    if args.model is None:
        bundled = name if path is None else path
        if bundled in BUNDLED:
            args.model = bundled
        elif path or name:
            _fill_model(args, before)
        else:
            notes.append("the image does not say which model generated it; the digits model does now")
            args.model = DIGITS
    elif not _is_the_same(args, before):
        return
    if args.prediction is None and before.get("prediction") in PREDICTIONS:
        args.prediction = before["prediction"]
    args.ema = args.ema or before.get("ema")
    for flag in ("vae", "refiner"):
        wanted = before.get(flag)
        if getattr(args, flag) is None and wanted:
            found = _here(wanted.get("path"), wanted.get("revision"), vae=flag == "vae")
            if found is None:
                said = _cut(wanted.get("path") or wanted.get("name"))
                raise FastsdError(f"it was generated with {{{flag}}} {said}; give it again")
            setattr(args, flag, str(found))


def _fill_model(args: argparse.Namespace, before: dict[str, Any]) -> None:
    path, revision = before.get("model_path"), args.revision or before.get("revision")
    found = _here(path, revision)
    if found is not None:
        args.model = str(found)
        args.revision = args.revision if isinstance(found, str) else None  # the id holds it
        return
    if revision and path:
        flags = f"{{model}} {path[:80]} {{revision}} {revision[:40]}"
        raise FastsdError(f"it was generated with the hub's {_cut(path)}; fetch it with {flags}")
    raise FastsdError(f"it was generated with the model {_cut(before.get('model') or path)}; give it with {{model}}")


def _here(path: Any, revision: Any, vae: bool = False) -> str | HubId | None:
    """The model that metadata names, if it is on this machine: a path, or in the hub's cache."""
    if not isinstance(path, str) or path.startswith(("//", "\\\\")):  # no network paths of others
        return None
    local = os.path.expanduser(path)
    if os.path.exists(local):
        return local
    from fastsd.weights.hub import hub_id
    from fastsd.weights.hub import locate as hub

    try:
        wanted = hub_id.parse_hub_id(path, revision if isinstance(revision, str) else None)
    except FastsdError:
        return None
    return wanted if wanted is not None and wanted.pinned and hub.is_cached(wanted, vae) else None


def _is_the_same(args: argparse.Namespace, before: dict[str, Any]) -> bool:
    """Whether --model is the image's; then the image's commit is taken where the flags name no revision."""
    path = before.get("model_path")
    if args.model in BUNDLED:
        return bool(path == args.model)
    if os.path.exists(args.model):
        try:
            return args.model == path or before.get("model_fingerprint") == fingerprint(Path(args.model))
        except OSError:
            return False  # loading reports why it cannot be read
    from fastsd.weights.hub import hub_id

    wanted = hub_id.parse_hub_id(args.model)
    if wanted is None or _unpinned(wanted) != path:
        return False
    if wanted.revision is None and args.revision is None:
        args.revision = before.get("revision")
    return True


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Notes on how the model differs from the first time."""
    notes = []
    known = [key for key in ("model_fingerprint", "revision") if before.get(key)]
    if any(now.get(key) != before[key] for key in known):
        commit = f" at {before['revision'][:12]}" if before.get("revision") else ""
        notes.append(f"the model is not the one that generated the image ({_cut(before.get('model'))}{commit})")
    if "version" not in before:  # another program's, which says less
        return notes + _hash_notes(before.get("model_hash"), now.get("model_hash"))
    for name, what, usual in (("vae", "autoencoder", "the model's own"), ("refiner", "refiner", "none")):
        old, new = before.get(name) or {}, now.get(name) or {}
        if any(old.get(key) != new.get(key) for key in ("fingerprint", "revision")):
            said = _cut(old.get("name")) if old else usual
            notes.append(f"the {what} is not the one that generated the image ({said})")
    if before.get("prediction") != now.get("prediction"):
        said = f"with --prediction {_cut(before['prediction'])}" if before.get("prediction") else "without --prediction"
        notes.append(f"the image was generated {said}")
    return notes


def _hash_notes(before: str | None, now: str | None) -> list[str]:
    """A note where the model is another file than A1111's short hash says, or where that is not known."""
    from fastsd.image.infotext import is_another

    if before is None:
        return []
    if now is None:
        return [f"whether the model is that image's, {_cut(before)}, is not known; fastsd inspect FILE finds its hash"]
    return [f"the model is another file than that image's, {_cut(before)}"] if is_another(before, now) else []


def _cut(text: Any) -> str:
    return repr(str(text)[:80])


def without_home(path: str) -> str:
    """A path for metadata: as it was given, but without the user's name."""
    home = os.path.expanduser("~")
    return "~" + path[len(home) :] if home != "/" and path.startswith(home + os.sep) else path


def fingerprint(root: Path) -> str:
    """What tells models apart, without reading gigabytes.

    Returns:
        The first 16 hexadecimal digits of the SHA-256 of names, sizes, JSON files and samples of the weights.
    """
    digest = hashlib.sha256()
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in (".safetensors", ".json"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            if file.suffix == ".json":
                digest.update(opened.read())
                continue
            for i in range(BLOCKS):
                opened.seek(max(0, (size - BLOCK) * i // (BLOCKS - 1)))
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]
