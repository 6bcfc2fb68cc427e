"""Models by their id on the hub: huggingface_hub fetches the files that are needed and keeps them in its cache.

huggingface_hub decides where files come from and go to, so its variables apply: HF_ENDPOINT, HF_TOKEN (or the token
that `hf auth login` keeps), HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE. If all files are cached, loading sends one
request, which asks for the branch's current commit; offline, or with a commit as the revision, it sends none.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath

from fastsd.bundled import BUNDLED
from fastsd.errors import FastsdError
from fastsd.files import check_path
from fastsd.weights.formats.json_file import MAX_JSON
from fastsd.weights.hub.errors import first_line, hub_error
from fastsd.weights.hub.files import FileSelector, model_files, network_files, one_file, with_shards
from fastsd.weights.hub.hub_id import SUFFIX, HubId, ModelLocation, parse_hub_id


def locate_model(text: str | Path, revision: str | None, half: bool) -> ModelLocation:
    """A model's folder or file on this machine; an id is fetched from the hub.

    Args:
        text, revision: as `parse_hub_id` takes them; or the name of a bundled model.
        half: for a folder, fetch the fp16 variant of the weights if there is one, as `find_files` chooses it.

    Raises:
        FastsdError: one line that says what is missing and how to get it: huggingface_hub, a login, a network, space.
    """
    hub_id = parse_hub_id(text, revision)
    if hub_id is None:
        return _here(BUNDLED.get(text, text) if isinstance(text, str) else text)
    return _fetch(hub_id, one_file(hub_id) if hub_id.file else model_files(hub_id, half), half)


def locate_vae(text: str | Path, half: bool) -> ModelLocation:
    """An autoencoder, as `locate_model` does a model: a file, a repository of its own, or a model's `vae/`."""
    return _locate_network(text, half, "vae")


def locate_controlnet(text: str | Path, half: bool) -> ModelLocation:
    """A ControlNet, as `locate_vae` does an autoencoder."""
    return _locate_network(text, half, "controlnet")


def locate_vision(text: str | Path, half: bool) -> ModelLocation:
    """CLIP's vision tower, as `locate_vae` does an autoencoder: in a repository `image_encoder/`, or its top."""
    return _locate_network(text, half, "image_encoder")


def _locate_network(text: str | Path, half: bool, network: str) -> ModelLocation:
    hub_id = parse_hub_id(text)
    if hub_id is None:
        return _here(text)
    if hub_id.file:
        return _fetch(hub_id, one_file(hub_id), half)
    location = _fetch(hub_id, network_files(hub_id, half, network), half)
    if (location.path / "config.json").is_file():
        return location
    return replace(location, path=location.path / network)


def locate_file(text: str | Path) -> ModelLocation:
    """One file, fetched from the hub if `text` is the id of one."""
    hub_id = parse_hub_id(text)
    return _fetch(hub_id, one_file(hub_id), True) if hub_id is not None and hub_id.file else _here(text)


def _here(path: str | Path) -> ModelLocation:
    """A path on this machine, whether or not anything is there."""
    check_path(path)
    return ModelLocation(Path(path))


def is_cached(hub_id: HubId, vae: bool = False) -> bool:
    """Whether a model, or an autoencoder, is on this machine in some precision. Sends no request."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return False
    selector = network_files(hub_id, True, "vae") if vae else model_files(hub_id, True)
    selector = one_file(hub_id) if hub_id.file else selector
    return _in_cache(hub_id, selector, True) is not None


def _fetch(hub_id: HubId, select: FileSelector, half: bool) -> ModelLocation:
    """The files that `select` names, from the cache or the network."""
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise FastsdError(
            "no such path here; to fetch it from the hub, first run: pip install huggingface_hub", path=hub_id
        ) from error
    if hub_id.pinned and (location := _in_cache(hub_id, select, half)):
        return location
    # huggingface_hub has changed its HTTP library before, but its own error always derives from that library's.
    unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT  # seconds; the default is to wait forever
        info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=timeout, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    except unreachable as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or (location := _in_cache(hub_id, select, True)) is None:
            raise hub_error(hub_id, error) from error
        return location
    except (ValueError, KeyError, TypeError) as error:
        raise FastsdError(
            f"{constants.ENDPOINT} does not answer like a hub ({first_line(error)})", path=hub_id
        ) from error
    selected = select(set(sizes))
    broken: tuple[type[BaseException], ...] = (*unreachable, RuntimeError)  # hf_xet raises RuntimeError
    try:
        return _download(hub_id, str(info.sha), selected, sizes)
    except broken as error:
        raise hub_error(hub_id, error) from error


def _download(hub_id: HubId, commit: str, selected: list[str], sizes: dict[str, int]) -> ModelLocation:
    """Fetch the files that the cache lacks, configs before weights."""
    from huggingface_hub import hf_hub_download

    pinned = replace(hub_id, revision=commit)

    def get(name: str) -> Path:
        return Path(hf_hub_download(hub_id.repo, name, revision=commit))

    _check_listed(hub_id, selected, sizes)
    files = list(with_shards(selected, get))
    _check_listed(hub_id, files, sizes)
    _check_disk_space(hub_id, sum(sizes[name] for name in files if _cached_file(pinned, name) is None))
    paths = [get(name) for name in files]
    if not hub_id.pinned and _cached_file(hub_id, files[0]) != paths[0]:
        # Records the branch's commit in the cache. It comes last, so that offline the branch means a complete model.
        hf_hub_download(hub_id.repo, files[0], revision=hub_id.revision or "main")
    return _location(pinned, files[0], paths[0])


def _in_cache(hub_id: HubId, select: FileSelector, half: bool) -> ModelLocation | None:
    """What the cache holds, if it is complete.

    Args:
        half: accept the fp16 variant of the weights, which fp32 would lose precision by.
    """
    markers = ["model_index.json", "config.json", "vae/config.json", "controlnet/config.json"]
    if hub_id.file:
        markers = [hub_id.file]
    cached = ((name, _cached_file(hub_id, name)) for name in markers)
    marker, path = next(((name, path) for name, path in cached if path is not None), ("", None))
    if path is None:
        return None
    location = _location(hub_id, marker, path)
    root = location.path.parents[len(PurePosixPath(hub_id.file).parts) - 1] if hub_id.file else location.path
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    try:
        files = list(with_shards(select(names), lambda name: root / name))
    except FastsdError:
        return None
    complete = names.issuperset(files) and (half or not any(".fp16." in name for name in files))
    return location if complete else None


def _location(hub_id: HubId, name: str, path: Path) -> ModelLocation:
    """The file if the id names one, else the snapshot folder that holds it, whose name is the commit."""
    root = path.parents[len(PurePosixPath(name).parts) - 1]
    return ModelLocation(path if hub_id.file else root, replace(hub_id, revision=root.name))


def _cached_file(hub_id: HubId, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id.repo, name, revision=hub_id.revision)
    return Path(path) if isinstance(path, str) else None  # None, or a mark that the repository has no such file


def _check_listed(hub_id: HubId, files: list[str], sizes: dict[str, int]) -> None:
    """Before any download, refuse files that are not in the repository and configs that are too large to read."""
    for name in files:
        if name not in sizes:
            raise FastsdError(f"no {name} in that repository, though an index of shards there names it", path=hub_id)
        if not name.endswith(SUFFIX) and sizes[name] > MAX_JSON:
            raise FastsdError(f"its {name} has {sizes[name]} bytes; no config has more than {MAX_JSON}", path=hub_id)


def _check_disk_space(hub_id: HubId, nbytes: int) -> None:
    """Before any download, refuse what does not fit on the disk."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise FastsdError(
            f"the download takes {nbytes / 2**30:.1f} GiB and {constants.HF_HUB_CACHE} has "
            f"{free / 2**30:.1f} GiB free; free some, or set HF_HOME to a folder on another disk",
            path=hub_id,
        )
