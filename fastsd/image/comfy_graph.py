"""ComfyUI's settings of an image: the graph in the PNG text chunk `prompt`, where one KSampler made it.

    {"3": {"class_type": "KSampler", "inputs": {"seed": 7, "steps": 20, ..., "model": ["4", 0]}}, "4": ...}

An input is a value, or a link to a node's output. Graphs are untrusted: values are checked as flags are, and links are
followed no further than there are nodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastsd.errors import FastsdError

Node = Mapping[str, Any]
# Inputs that lead from a node to the one whose output it changes.
MODELS = {"LoraLoader": "model", "LoraLoaderModelOnly": "model"}
CLIPS = {"LoraLoader": "clip", "CLIPSetLastLayer": "clip"}
# Nodes that change nothing which a setting could say.
SILENT = {"VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage", "LoadImage", "VAEEncode", "Note", "PrimitiveNode"}
# ComfyUI's names of schedules and of a sampler's inputs, where ours are others.
SCHEDULE_NAMES = {"normal": "default"}
NUMBERS = {"seed": "seed", "noise_seed": "seed", "steps": "num_inference_steps", "cfg": "guidance_scale"}


def read_graph(text: str) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The settings in a graph, and what else is in it; None: the text is no graph.

    Raises:
        FastsdError: a graph of another shape, which it names.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    nodes = {
        str(name): node
        for name, node in (found.items() if isinstance(found, dict) else ())
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }
    if not nodes:
        return None
    samplers = [name for name, node in nodes.items() if "Sampler" in node["class_type"]]
    kinds = [nodes[name]["class_type"] for name in samplers]
    if kinds not in (["KSampler"], ["KSamplerAdvanced"]):
        have = ", ".join(dict.fromkeys(kind[:40] for kind in kinds)) or "none"
        raise FastsdError(f"a ComfyUI graph is read where one KSampler made the image; its samplers are: {have}")
    return _Graph(nodes).read(samplers[0])


class _Graph:
    """The nodes, and which of them have been used."""

    def __init__(self, nodes: Mapping[str, Node]):
        self.nodes, self.used = nodes, set[str]()
        self.others: dict[str, str] = {}

    def read(self, sampler: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What `read_graph` returns, from the name of its KSampler's node on."""
        inputs = self.nodes[sampler]["inputs"]
        self.used.add(sampler)
        settings: dict[str, Any] = {"like": "comfy"}
        settings |= {ours: inputs[key] for key, ours in NUMBERS.items() if _is_number(inputs.get(key))}
        if isinstance(inputs.get("sampler_name"), str):
            settings["sampler"] = inputs["sampler_name"].removesuffix("_gpu")
        if isinstance(inputs.get("scheduler"), str):
            settings["schedule"] = SCHEDULE_NAMES.get(inputs["scheduler"], inputs["scheduler"])
        for key, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
            settings[ours], skip = self._text(inputs.get(key), key)
            settings |= {"clip_skip": skip} if skip else {}
        for node in self._chain(inputs.get("model"), MODELS):
            if isinstance(node["inputs"].get("ckpt_name"), str):
                settings["model"] = node["inputs"]["ckpt_name"].removesuffix(".safetensors").removesuffix(".ckpt")
        settings |= self._latent(inputs.get("latent_image"), inputs.get("denoise", 1.0))
        if self.nodes[sampler]["class_type"] == "KSamplerAdvanced":
            self.others |= {
                key: str(inputs[key])
                for key, usual in (("add_noise", "enable"), ("start_at_step", 0), ("end_at_step", 10000))
                if inputs.get(key, usual) != usual
            }
        for name, node in self.nodes.items():
            if name not in self.used and node["class_type"] not in SILENT:
                self.others[node["class_type"]] = ""
        return settings, self.others

    def _node(self, link: Any) -> Node | None:
        """The node that a link leads to."""
        if not isinstance(link, list) or not link or str(link[0]) not in self.nodes:
            return None
        self.used.add(str(link[0]))
        return self.nodes[str(link[0])]

    def _chain(self, link: Any, leads: Mapping[str, str]) -> Iterator[Node]:
        """The nodes from a link on, each to the one before it."""
        for _ in self.nodes:
            node = self._node(link)
            if node is None:
                return
            yield node
            if node["class_type"] not in leads and node["class_type"] != "CheckpointLoaderSimple":
                self.others[node["class_type"]] = ""
            if isinstance(lora := node["inputs"].get("lora_name"), str):
                self.others[f"the LoRA {lora[:60]}"] = ""
            if node["class_type"] not in leads:
                return
            link = node["inputs"].get(leads[node["class_type"]])

    def _text(self, link: Any, which: str) -> tuple[str, int]:
        """The text of a conditioning, and its clip skip or 0."""
        node = self._node(link)
        if node is None or node["class_type"] != "CLIPTextEncode":
            kind = "nothing" if node is None else node["class_type"][:40]
            raise FastsdError(f"a ComfyUI graph is read where CLIPTextEncode is its {which} input, not {kind}")
        text = node["inputs"].get("text")
        source = self._node(text)
        if source is not None:
            texts = [value for value in source["inputs"].values() if isinstance(value, str)]
            text = texts[0] if len(texts) == 1 else None
        if not isinstance(text, str):
            raise FastsdError(f"the {which} text of its ComfyUI graph is put together by other nodes")
        skip = 0
        for step in self._chain(node["inputs"].get("clip"), CLIPS):
            layer = step["inputs"].get("stop_at_clip_layer")
            skip = -layer if isinstance(layer, int) and layer < 0 and not skip else skip
        return text, skip

    def _latent(self, link: Any, strength: Any) -> dict[str, Any]:
        """Where the run starts: an empty latent of a size, or an image."""
        node = self._node(link)
        inputs = {} if node is None else node["inputs"]
        if node is None or node["class_type"] != "EmptyLatentImage":
            if node is not None and node["class_type"] != "VAEEncode":
                self.others[node["class_type"]] = ""
            return {"strength": strength} if _is_number(strength) else {}
        size = {key: inputs[key] for key in ("width", "height") if _is_number(inputs.get(key))}
        count = inputs.get("batch_size", 1)
        if isinstance(count, int) and count > 1:
            self.others[f"its place in a batch of {count}"] = ""
            return size | {"noise_count": count}
        return size


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
