"""Models by their id on the hub, through huggingface_hub: only the files that are needed, kept in its cache.

Where files come from and go to is huggingface_hub's business, and so are its variables: HF_ENDPOINT, HF_TOKEN (or the
token that `hf auth login` keeps), HF_HOME and HF_HUB_CACHE, HF_HUB_OFFLINE. With all files there, a start takes one
request, which asks what the branch stands for now; none at all offline, or where the revision is a commit.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath

from fastsd.errors import FastsdError
from fastsd.weights.formats.json_file import MAX_JSON
from fastsd.weights.hub.errors import first_line, refusal
from fastsd.weights.hub.files import Choose, model_files, network_files, one_file, with_shards
from fastsd.weights.hub.hub_id import SUFFIX, HubId, Place, parse


def locate_model(text: str | Path, revision: str | None, half: bool) -> Place:
    """A model's folder or file on this machine, fetched from the hub if it is an id.

    Args:
        text, revision: as `parse` takes them.
        half: for a folder, fetch the fp16 variant of the weights where there is one, as `find_files` chooses it.

    Raises:
        FastsdError: one line that says what is missing and how to get it: huggingface_hub, a login, a network, room.
    """
    wanted = parse(text, revision)
    if wanted is None:
        return Place(Path(text))
    return _fetch(wanted, one_file(wanted) if wanted.inside else model_files(wanted, half), half)


def locate_vae(text: str | Path, half: bool) -> Place:
    """An autoencoder as `locate_model` does a model: a file, a repository of its own, or the part of a model's."""
    return _locate_network(text, half, "vae")


def locate_controlnet(text: str | Path, half: bool) -> Place:
    """A ControlNet, as `locate_vae` does an autoencoder."""
    return _locate_network(text, half, "controlnet")


def _locate_network(text: str | Path, half: bool, part: str) -> Place:
    wanted = parse(text)
    if wanted is None:
        return Place(Path(text))
    if wanted.inside:
        return _fetch(wanted, one_file(wanted), half)
    place = _fetch(wanted, network_files(wanted, half, part), half)
    return place if (place.path / "config.json").is_file() else replace(place, path=place.path / part)


def locate_file(text: str | Path) -> Place:
    """One file, fetched from the hub if `text` is the id of one."""
    wanted = parse(text)
    return _fetch(wanted, one_file(wanted), True) if wanted is not None and wanted.inside else Place(Path(text))


def is_cached(wanted: HubId, vae: bool = False) -> bool:
    """Whether a model, or an autoencoder, is on this machine in some precision; nothing is asked of the network."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return False
    files = network_files(wanted, True, "vae") if vae else model_files(wanted, True)
    files = one_file(wanted) if wanted.inside else files
    return _in_cache(wanted, files, True) is not None


# Getting it


def _fetch(wanted: HubId, choose: Choose, half: bool) -> Place:
    """What `choose` picks, from the cache or the network."""
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise FastsdError(
            f"{wanted}: no such path here; to fetch it from the hub, first do: pip install huggingface_hub"
        ) from error
    if wanted.pinned and (place := _in_cache(wanted, choose, half)):
        return place
    # The HTTP library under huggingface_hub changes with the years; its own error always is a sibling of that one's.
    unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        patience = constants.HF_HUB_ETAG_TIMEOUT  # seconds; without it a dead network is waited for without end
        info = HfApi().model_info(wanted.repo, revision=wanted.revision, timeout=patience, files_metadata=True)
        sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    except unreachable as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or (place := _in_cache(wanted, choose, True)) is None:
            raise refusal(wanted, error) from error
        return place
    except (ValueError, KeyError, TypeError) as error:
        raise FastsdError(
            f"{wanted}: {constants.ENDPOINT} does not answer as a hub does ({first_line(error)})"
        ) from error
    chosen = choose(set(sizes))
    broken: tuple[type[BaseException], ...] = (*unreachable, RuntimeError)  # the last is hf_xet's
    try:
        return _download(wanted, str(info.sha), chosen, sizes)
    except broken as error:
        raise refusal(wanted, error) from error


def _download(wanted: HubId, commit: str, chosen: list[str], sizes: dict[str, int]) -> Place:
    """Fetch files that are not in the cache yet, the configs before the weights."""
    from huggingface_hub import hf_hub_download

    pinned = replace(wanted, revision=commit)

    def get(name: str) -> Path:
        return Path(hf_hub_download(wanted.repo, name, revision=commit))

    _check_listed(wanted, chosen, sizes)
    files = list(with_shards(chosen, get))
    _check_listed(wanted, files, sizes)
    _check_room(wanted, sum(sizes[name] for name in files if _cached_file(pinned, name) is None))
    paths = [get(name) for name in files]
    if not wanted.pinned and _cached_file(wanted, files[0]) != paths[0]:
        # This leaves word in the cache of what the branch stands for, last of all: offline, what it says is whole.
        hf_hub_download(wanted.repo, files[0], revision=wanted.revision or "main")
    return _place(pinned, files[0], paths[0])


def _in_cache(wanted: HubId, choose: Choose, half: bool) -> Place | None:
    """What is in the cache, if it is whole.

    Args:
        half: take the fp16 variant of the weights too; for fp32 that would be a loss.
    """
    markers = (
        [wanted.inside]
        if wanted.inside
        else ["model_index.json", "config.json", "vae/config.json", "controlnet/config.json"]
    )
    found = next((pair for name in markers if (pair := (name, _cached_file(wanted, name)))[1] is not None), None)
    if found is None or found[1] is None:
        return None
    place = _place(wanted, found[0], found[1])
    root = place.path.parents[len(PurePosixPath(wanted.inside).parts) - 1] if wanted.inside else place.path
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    try:
        files = list(with_shards(choose(names), lambda name: root / name))
    except FastsdError:
        return None
    complete = names.issuperset(files) and (half or not any(".fp16." in name for name in files))
    return place if complete else None


def _place(wanted: HubId, name: str, path: Path) -> Place:
    """The snapshot that a file is in, whose folder is called by its commit; or the file, where one file is wanted."""
    root = path.parents[len(PurePosixPath(name).parts) - 1]
    return Place(path if wanted.inside else root, replace(wanted, revision=root.name))


def _cached_file(wanted: HubId, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(wanted.repo, name, revision=wanted.revision)
    return Path(found) if isinstance(found, str) else None  # else None, or a mark that there is no such file


def _check_listed(wanted: HubId, files: list[str], sizes: dict[str, int]) -> None:
    """Refuse files that are not there, and configs that could not be read, before they are fetched."""
    for name in files:
        if name not in sizes:
            raise FastsdError(f"{wanted}: no {name} in that repository; an index of shards there names it")
        if not name.endswith(SUFFIX) and sizes[name] > MAX_JSON:
            raise FastsdError(f"{wanted}: {name} has {sizes[name]} bytes there; no config has more than {MAX_JSON}")


def _check_room(wanted: HubId, needed: int) -> None:
    """Refuse what the disk has no room for before it is fetched."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FastsdError(
            f"{wanted}: {needed / 2**30:.1f} GiB are to be fetched and {free / 2**30:.1f} GiB are free at "
            f"{constants.HF_HUB_CACHE}; make room, or set HF_HOME to a folder on another disk"
        )
