"""transformers' CLIP text encoders, answered by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsd.diffusers.twin import Twin
from fastsd.model.clip import TextEncoder
from fastsd.weights.layouts.configs import read_clip
from fastsd.weights.layouts.names import canonical_key


class TextTwin(Twin):
    """Answers `CLIPTextModel` and `CLIPTextModelWithProjection`."""

    def __init__(self, host: Any, name: str):
        given = host.config.to_dict() | {"architectures": [type(host).__name__]}
        config = read_clip(Path(f"{name}.config"), given)
        super().__init__(host, name, lambda: TextEncoder(config))
        self.projects = config.projection_dim > 0

    def canonical(self, path: str) -> str:
        return canonical_key(f"{path}.").rstrip(".")

    def refuses(self, arguments: dict[str, Any]) -> str | None:
        ids, config = arguments["input_ids"], self.host.config
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return "input_ids is no table of tokens"
        if ids.shape[1] > config.max_position_embeddings:
            return "the text is longer than the model reads"  # transformers says so
        for name in ("attention_mask", "position_ids", "inputs_embeds"):
            if arguments.get(name) is not None:
                return f"{name} is given"
        if self._option(arguments, "output_attentions"):
            return "output_attentions is asked for"
        return None

    def _option(self, arguments: dict[str, Any], name: str) -> Any:
        """A call's option: among its arguments, in what it takes beside them, or the config's."""
        for given in (arguments, arguments.get("kwargs", {})):
            if given.get(name) is not None:
                return given[name]
        return getattr(self.host.config, name, None)

    def compute(self, net: nn.Module, arguments: dict[str, Any]) -> Any:
        assert isinstance(net, TextEncoder)
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        last, pooled, states = net.all_states(arguments["input_ids"])
        hidden = states if self._option(arguments, "output_hidden_states") else None
        result: Any = (
            CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=last, hidden_states=hidden)
            if self.projects
            else BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=hidden)
        )
        named = self._option(arguments, "return_dict")
        return result.to_tuple() if named is False else result
