"""ComfyUI's settings of an image: the graph in the PNG text chunk `prompt`, where one KSampler made it.

    {"3": {"class_type": "KSampler", "inputs": {"seed": 7, "steps": 20, ..., "model": ["4", 0]}}, "4": ...}

An input is a value, or a link to a node's output; of those that give a value, the ones that hold nothing but that value
are read. Graphs are untrusted: values are checked as flags are, and links are followed no further than there are nodes.
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
# ComfyUI's names of schedules, where ours are others.
SCHEDULE_NAMES = {"normal": "default"}
# What ComfyUI's page does to a number after each image; it changes nothing in this one.
AFTERWARDS = ("fixed", "increment", "decrement", "randomize")


def read_graph(text: str) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The settings in a graph, and what else is in it; None: the text is no graph.

    Settings that the graph leaves open are under `unread` with the reason: {"seed": "its 'seed' comes from node ..."}.

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
        self.unread: dict[str, str] = {}

    def read(self, sampler: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What `read_graph` returns, from the name of its KSampler's node on."""
        inputs = self.nodes[sampler]["inputs"]
        self.used.add(sampler)
        seed = "noise_seed" if self.nodes[sampler]["class_type"] == "KSamplerAdvanced" else "seed"
        settings: dict[str, Any] = {"like": "comfy"}
        for key, ours in ((seed, "seed"), ("steps", "num_inference_steps"), ("cfg", "guidance_scale")):
            settings |= self._number(inputs, key, ours)
        settings |= self._word(inputs, "sampler_name", "sampler") | self._word(inputs, "scheduler", "schedule")
        if "sampler" in settings:
            settings["sampler"] = settings["sampler"].removesuffix("_gpu")
        if "schedule" in settings:
            settings["schedule"] = SCHEDULE_NAMES.get(settings["schedule"], settings["schedule"])
        for key, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
            found, skip = self._text(inputs.get(key), key, ours)
            settings |= found | ({"clip_skip": skip} if skip else {})
        for node in self._chain(inputs.get("model"), MODELS):
            if "ckpt_name" in node["inputs"]:
                settings |= self._word(node["inputs"], "ckpt_name", "model")
        if "model" in settings:
            settings["model"] = settings["model"].removesuffix(".safetensors").removesuffix(".ckpt")
        settings |= self._start(inputs)
        if self.nodes[sampler]["class_type"] == "KSamplerAdvanced":
            self.others |= {
                key: str(inputs[key])
                for key, usual in (("add_noise", "enable"), ("start_at_step", 0), ("end_at_step", 10000))
                if self._value(inputs.get(key, usual)) != usual
            }
        for name, node in self.nodes.items():
            if name not in self.used and node["class_type"] not in SILENT:
                self.others[node["class_type"]] = ""
        return settings | ({"unread": self.unread} if self.unread else {}), self.others

    def _node(self, link: Any) -> Node | None:
        """The node that a link leads to."""
        if not isinstance(link, list) or not link or str(link[0]) not in self.nodes:
            return None
        self.used.add(str(link[0]))
        return self.nodes[str(link[0])]

    def _value(self, value: Any) -> Any:
        """An input's value, also where a node gives it that has this one input; otherwise the link to the node."""
        for _ in self.nodes:
            node = self._node(value)
            inputs = () if node is None else [each for each in node["inputs"].values() if each not in AFTERWARDS]
            if node is None or len(inputs) != 1:
                return value
            if isinstance(inputs[0], list) and not node["class_type"].startswith("Reroute"):
                return value
            value = inputs[0]
        return value

    def _number(self, inputs: Mapping[str, Any], key: str, ours: str) -> dict[str, Any]:
        """A number of a node as a setting; one that is not read is noted in `unread`."""
        value = self._value(inputs.get(key))
        try:  # ComfyUI takes numbers as texts too
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            pass
        if _is_number(value) and value >= 0:
            return {ours: value}
        return self._leave(ours, key, value)

    def _word(self, inputs: Mapping[str, Any], key: str, ours: str) -> dict[str, Any]:
        """A text of a node as a setting; one that is not read is noted in `unread`."""
        value = self._value(inputs.get(key))
        return {ours: value} if isinstance(value, str) else self._leave(ours, key, value)

    def _leave(self, ours: str, key: str, value: Any) -> dict[str, Any]:
        """No setting, and the reason in `unread`."""
        self.unread[ours] = f"its {key!r} {self._reason(value)}"
        return {}

    def _reason(self, value: Any) -> str:
        """What an input that is not read does: it comes from a node, or is missing, or is of no use."""
        if not isinstance(value, list) or not value:
            return "is missing" if value is None else f"is {repr(value)[:40]}"
        node = self._node(value)
        kind = "which is missing" if node is None else node["class_type"][:40]
        return f"comes from node {str(value[0])[:20]}, {kind}"

    def _chain(self, link: Any, leads: Mapping[str, str]) -> Iterator[Node]:
        """The nodes from a link on, each to the one before it."""
        for _ in self.nodes:
            node = self._node(link)
            if node is None:
                return
            yield node
            if node["class_type"] not in leads and node["class_type"] != "CheckpointLoaderSimple":
                self.others[node["class_type"]] = ""
            if "lora_name" in node["inputs"]:
                name = self._value(node["inputs"]["lora_name"])
                named = f"the LoRA {name[:60]}" if isinstance(name, str) else f"a LoRA that {self._reason(name)}"
                self.others[named] = ""
            if node["class_type"] not in leads:
                return
            link = node["inputs"].get(leads[node["class_type"]])

    def _text(self, link: Any, which: str, ours: str) -> tuple[dict[str, str], int]:
        """The text of a conditioning as a setting, and its clip skip or 0."""
        node = self._node(link)
        if node is None or node["class_type"] != "CLIPTextEncode":
            kind = "nothing" if node is None else node["class_type"][:40]
            raise FastsdError(f"a ComfyUI graph is read where CLIPTextEncode is its {which} input, not {kind}")
        text = node["inputs"].get("text")
        source = self._node(text)
        if source is not None:
            texts = [value for value in source["inputs"].values() if isinstance(value, str)]
            text = texts[0] if len(texts) == 1 else text
        found = {ours: text} if isinstance(text, str) else self._leave(ours, f"{which} text", text)
        skip = 0
        for step in self._chain(node["inputs"].get("clip"), CLIPS):
            if "stop_at_clip_layer" in step["inputs"] and not skip:
                layer = self._value(step["inputs"]["stop_at_clip_layer"])
                if isinstance(layer, int) and layer < 0:
                    skip = -layer
                else:
                    self._leave("clip_skip", "stop_at_clip_layer", layer)
        return found, skip

    def _start(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        """Where the run starts: an empty latent of a size, or an image, of which `denoise` is changed."""
        node = self._node(sampler.get("latent_image"))
        denoise = {"denoise": 1.0, **sampler}
        share = self._number(denoise, "denoise", "strength")
        if node is None or node["class_type"] != "EmptyLatentImage":
            if node is not None and node["class_type"] != "VAEEncode":
                self.others[node["class_type"]] = ""
            return share
        self.unread.pop("strength", None)
        if share.get("strength") != 1:
            reason = self._reason(self._value(denoise["denoise"]))
            self.others[f"an empty latent's denoise, which {reason}"] = ""
        size = self._number(node["inputs"], "width", "width") | self._number(node["inputs"], "height", "height")
        count = self._number({"batch_size": 1, **node["inputs"]}, "batch_size", "noise_count").get("noise_count", 1)
        if count > 1:
            self.others[f"its place in a batch of {count}"] = ""
            return size | {"noise_count": count}
        return size


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
