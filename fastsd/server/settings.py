"""The flags of `fastsd serve`, checked."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError, about
from fastsd.parameters import PARAMETERS
from fastsd.parameters.kinds import File, Kind, Number, Switch, Text, Whole
from fastsd.runtime.ray_cluster import HERE
from fastsd.server.limits import Limits

MIN_KEY = 12  # characters of a key or a password
# The first parts of this server's own paths, which a proxy's path cannot be told from.
OWN_PATHS = ("", "controlnet", "health", "jobs", "metrics", "openapi.json", "page", "ready", "sdapi", "v1")
LOADING = ("model", "vae", "preview", "few_step", "prediction", "device", "dtype", "graphs", "vae_tiling")
FOLDERS = ("models_dir", "lora_dir", "embedding_dir", "controlnet_dir", "upscaler_dir")


@dataclass(frozen=True)
class ServerFlag:
    """A flag of this command alone: its values, help and default; `several`: it may be given again."""

    name: str
    kind: Kind
    help: str
    default: Any = None
    several: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


FOLDER = File(metavar="DIR")
FLAGS = (
    ServerFlag(
        "host", Text(metavar="ADDRESS"), "to listen at; another than this machine's own needs a key", "127.0.0.1"
    ),
    ServerFlag("port", Whole(low=0, high=65535), "to listen at; 0: any that is free", 7860),
    ServerFlag("models_dir", FOLDER, "a folder of checkpoints that clients choose from"),
    ServerFlag("lora_dir", FOLDER, "a folder of LoRAs, for <lora:NAME:X> in prompts"),
    ServerFlag("embedding_dir", FOLDER, "a folder of embeddings; those that prompts name are read"),
    ServerFlag("controlnet_dir", FOLDER, "a folder of ControlNets"),
    ServerFlag("upscaler_dir", FOLDER, "a folder of ESRGANs, for the hires fix and for images that are sent"),
    ServerFlag("styles", File(), "A1111's styles.csv: name, prompt, negative_prompt"),
    ServerFlag("api_key", Text(metavar="KEY"), "what clients must send; better in the environment, FASTSD_API_KEY"),
    ServerFlag("user", Text(metavar="NAME"), "HTTP basic, in place of a key or beside it"),
    ServerFlag("password", Text(metavar="WORD"), "of --user; better in the environment, FASTSD_PASSWORD"),
    ServerFlag("cors", Text(metavar="ORIGIN"), "a web site that may call: https://chat.example", several=True),
    ServerFlag("allow_host", Text(metavar="NAME"), "a name by which clients call this server", several=True),
    ServerFlag(
        "root_path", Text(metavar="PATH"), "the path under which a reverse proxy offers this server: /fastsd", ""
    ),
    ServerFlag("queue", Whole(low=1, high=10000), "requests that may wait; others get 429", 32),
    ServerFlag("max_batch", Whole(low=1, high=64), "images that run together", 4),
    ServerFlag("max_images", Whole(low=1, high=1000), "images of one request", 16),
    ServerFlag("max_side", Whole(low=64, high=8192), "pixels of a side", 2048),
    ServerFlag("max_work", Whole(low=1), "width x height x images x steps of one request", 2**31),
    ServerFlag("max_body", Whole(low=1, high=1024), "MiB of a request", 64),
    ServerFlag("keep", Whole(low=1, high=64), "models that stay in memory, while they fit", 1),
    ServerFlag("drain", Number(low=0, high=3600), "seconds that running work may take after SIGTERM", 30.0),
    ServerFlag("ray", Text(metavar="HOST:PORT"), "replicas on a cluster of Ray (default: this machine)"),
    ServerFlag("min_replicas", Whole(low=1, high=10000), "that --ray keeps", 1),
    ServerFlag("max_replicas", Whole(low=1, high=10000), "that --ray has while many wait", 1),
    ServerFlag("threads", Whole(low=1, high=1024), "cores of each (default: 1 beside a GPU, else all)"),
    ServerFlag("log_prompts", Switch(), "write prompts to the log", False),
)


@dataclass(frozen=True)
class ServerSettings:
    """How the server runs.

    Attributes:
        options: of `Pipeline.from_pretrained`, for every model.
        model: the path or hub id of the first model; None: the bundled one, or the folder's first.
        tiling: of every call, see `fastsd.server.engine.EngineSettings`.
        ray: the address of a cluster, which has replicas of the server; None: this process serves.
        threads: cores of a replica; None: see `fastsd.runtime.ray_cluster.pool_size`.
        cors: origins of web sites that may call. hosts: names by which the server is called, besides its address.
        root_path: what stands before every path where a proxy offers the server under one; else "".
    """

    host: str = "127.0.0.1"
    port: int = 7860
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tiling: bool | None = None
    models_dir: str | None = None
    lora_dir: str | None = None
    embedding_dir: str | None = None
    controlnet_dir: str | None = None
    upscaler_dir: str | None = None
    styles: str | None = None
    api_key: str | None = None
    user: str | None = None
    password: str | None = None
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    root_path: str = ""
    queue: int = 32
    max_batch: int = 4
    keep: int = 1
    drain: float = 30.0
    ray: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    threads: int | None = None
    log_prompts: bool = False
    limits: Limits = Limits()

    @property
    def shared(self) -> bool:
        """A request may come to one replica of several."""
        return self.ray is not None and self.max_replicas > 1

    @property
    def locked(self) -> bool:
        """Clients must prove who they are."""
        return self.api_key is not None or self.password is not None


def add_arguments(parser: argparse.ArgumentParser, used: Collection[str] | None = None) -> None:
    """The flags of `fastsd serve`, or those of these names; values are checked in `read`."""
    for row in (row for row in FLAGS if used is None or row.name in used):
        usual = "" if row.default in (None, False) else f" (default: {row.default})"
        options: dict[str, Any] = {"metavar": row.kind.metavar, "action": "append" if row.several else "store"}
        if isinstance(row.kind, Switch):
            options = {"action": "store_const", "const": True}
        if row.name == "ray":
            options |= {"nargs": "?", "const": HERE}
        parser.add_argument(row.flag, dest=row.name, help=f"{row.help}{usual}", **options)
    for parameter in (PARAMETERS[name] for name in LOADING):
        options = {"metavar": parameter.kind.metavar}
        if hasattr(parameter.kind, "value"):
            options = {"action": "store_const", "const": parameter.kind.value}
        parser.add_argument(*parameter.flags, dest=parameter.name, help=parameter.text, **options)


def read(args: argparse.Namespace) -> ServerSettings:
    """The flags, each within its range and against the others.

    Raises:
        FastsdError: it names the flag.
    """
    found: dict[str, Any] = {}
    for row in FLAGS:
        value = getattr(args, row.name, None)
        with about(row.flag):
            if isinstance(value, str):
                value = row.kind.parse(value)
            elif isinstance(value, list):
                value = tuple(row.kind.parse(each) for each in value)
        found[row.name] = row.default if value is None else value
    loading = {name: getattr(args, name) for name in LOADING if getattr(args, name) is not None}
    loading = {n: PARAMETERS[n].parse(value) if isinstance(value, str) else value for n, value in loading.items()}
    for name, variable in (("api_key", "FASTSD_API_KEY"), ("password", "FASTSD_PASSWORD")):
        found[name] = (os.environ.get(variable) or None) if found[name] is None else found[name]
    found["host"] = found["host"].strip("[]")
    _check_access(found)
    found["root_path"] = _check_root_path(found["root_path"])
    _check_replicas(args, found)
    for name in FOLDERS:
        _check_folder(f"--{name.replace('_', '-')}", found[name])
    limits = Limits(
        images=found.pop("max_images"),
        side=found.pop("max_side"),
        work=found.pop("max_work"),
        body=found.pop("max_body") * 2**20,
    )
    cors = tuple(origin.rstrip("/").lower() for origin in found.pop("cors") or ())
    hosts = tuple(name.lower() for name in found.pop("allow_host") or ())
    model, tiling = loading.pop("model", None), loading.pop("vae_tiling", None)
    return ServerSettings(**found, cors=cors, hosts=hosts, model=model, tiling=tiling, options=loading, limits=limits)


def _check_access(found: dict[str, Any]) -> None:
    """Refuse a server that others could use without a key, and keys that could be guessed."""
    for name in ("api_key", "password"):
        if found[name] is not None and len(found[name]) < MIN_KEY:
            raise FastsdError(
                f"{len(found[name])} characters; it should have at least {MIN_KEY}",
                argument=f"--{name.replace('_', '-')}",
            )
    if (found["user"] is None) != (found["password"] is None):
        given, missing = ("--user", "--password") if found["user"] else ("--password", "--user")
        raise FastsdError(f"given without {missing}", argument=given)
    for origin in found["cors"] or ():
        if not origin.startswith(("http://", "https://")) or origin.rstrip("/").count("/") != 2:
            raise FastsdError("it should be an origin, such as https://chat.example", argument="--cors", value=origin)
    for name in found["allow_host"] or ():
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", name, re.A):
            message = "it should be a name alone, without scheme, port or path, such as images.example"
            raise FastsdError(message, argument="--allow-host", value=name)
    if not is_loopback(found["host"]) and found["api_key"] is None and found["password"] is None:
        raise FastsdError(
            f"{found['host']} can be reached by other machines; it needs --api-key, or --user and --password",
            argument="--host",
        )


def _check_root_path(path: str) -> str:
    """The path without a slash at its end."""
    parts = path.rstrip("/").split("/")
    if path.rstrip("/") and (parts[0] or not all(re.fullmatch(r"[\w.~-]*[\w~-]", part, re.A) for part in parts[1:])):
        raise FastsdError("it should be a path, such as /fastsd", argument="--root-path", value=path)
    if len(parts) > 1 and parts[1] in OWN_PATHS:
        raise FastsdError(
            "this server has paths of its own that begin so; take another", argument="--root-path", value=path
        )
    return path.rstrip("/")


def _check_replicas(args: argparse.Namespace, found: dict[str, Any]) -> None:
    for name in ("min_replicas", "max_replicas", "threads"):
        if found["ray"] is None and getattr(args, name, None) is not None:
            raise FastsdError("given without --ray", argument=f"--{name.replace('_', '-')}", value=found[name])
    if found["min_replicas"] > found["max_replicas"]:
        raise FastsdError(
            f"it should be --max-replicas ({found['max_replicas']}) at most",
            argument="--min-replicas",
            value=found["min_replicas"],
        )
    if found["ray"] is not None and found["port"] == 0:
        raise FastsdError("with --ray it should be a number of your choice", argument="--port", value=0)
    if found["ray"] is not None and found["root_path"]:
        raise FastsdError("not supported with --ray", argument="--root-path", value=found["root_path"])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_folder(flag: str, folder: str | None) -> None:
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise FastsdError("no such folder", argument=flag, path=folder)
    try:
        next(iter(os.scandir(folder)), None)
    except OSError as error:
        raise FastsdError(f"it cannot be read ({error.strerror})", argument=flag, path=folder) from error
