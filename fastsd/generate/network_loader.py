"""What a pipeline loads beside its checkpoint: textual inversions, nets of controls, IP-Adapters, upscalers."""

from __future__ import annotations

from pathlib import Path

import torch

from fastsd.components import Components, TextualInversion
from fastsd.errors import about, named_arguments
from fastsd.model.controlnet import ControlNet
from fastsd.model.ip_adapter import IPAdapter
from fastsd.model.t2i_adapter import T2IAdapter
from fastsd.runtime.devices import undisturbed
from fastsd.upscale.upscaler import Upscaler
from fastsd.weights.adapters.embeddings import load_embedding
from fastsd.weights.hub.locate import locate_controlnet, locate_file, locate_vision
from fastsd.weights.layouts.controlnet import load_controlnet
from fastsd.weights.layouts.ip_adapter import load_ip_adapter


class NetworkLoader:
    """Loads files for the checkpoint of a pipeline, in its precision and on its device."""

    components: Components
    refiner: Components | None
    device: torch.device
    dtype: torch.dtype

    @named_arguments
    @undisturbed()
    def load_embedding(self, path: str | Path, token: str | None = None, allow_pickle: bool = False) -> tuple[str, ...]:
        """Load a textual inversion, which prompts then use by its name (Gal et al. 2022).

        Args:
            path: a `.safetensors` file or a hub id; `.pt` and `.bin` are pickles, read only with `allow_pickle`.
            token: its name in prompts; None: the file's name without its ending, and the token that the file states.
            allow_pickle: read pickles; only tensors and plain values are unpickled.

        Returns:
            Its names. A name that another embedding had now means this one.

        Raises:
            FastsdError: no such file, malformed, or one for another family of models.
        """
        models = [model for model in (self.components, self.refiner) if model is not None]
        encoders = max((model.text_encoders for model in models), key=len)
        embedding = load_embedding(locate_file(path).path, encoders, token, allow_pickle)
        for model in models:
            vectors = embedding.vectors[-len(model.text_encoders) :]  # SDXL's refiner has the second encoder alone
            pairs = zip(vectors, model.text_encoders, strict=True)
            if all(vector.shape[1] == encoder.config.hidden_size for vector, encoder in pairs):
                model.embeddings |= dict.fromkeys(embedding.names, TextualInversion(embedding.names, vectors))
        return embedding.names

    @named_arguments
    @undisturbed()
    def load_controlnet(self, path: str | Path, allow_pickle: bool = False) -> ControlNet | T2IAdapter:
        """Load a ControlNet (Zhang et al. 2023) or a T2I-Adapter (Mou et al. 2023) for this checkpoint's UNet, for use
        in a `Control`.

        Args:
            path: a diffusers folder, a single file in diffusers' or the original layout, or a hub id; the file says
                which of them it is.
            allow_pickle: read `.pth` files; only tensors and plain values are unpickled.

        Raises:
            FastsdError: no such file, malformed, too large for the memory, or for another family of models.
        """
        path = locate_controlnet(path, self.dtype != torch.float32).path
        return load_controlnet(path, self.components.unet.config, self.dtype, self.device, allow_pickle)

    @named_arguments
    @undisturbed()
    def load_ip_adapter(
        self, path: str | Path, encoder: str | Path | None = None, allow_pickle: bool = False
    ) -> IPAdapter:
        """Load an IP-Adapter for this checkpoint's UNet, for use in an `ImagePrompt` (Ye et al. 2023).

        Args:
            path: its file, or a hub id of one, `org/name/file.safetensors`.
            encoder: the vision tower that it reads images with: transformers' folder, a file or a hub id; None: the one
                beside the file, as in h94/IP-Adapter.
            allow_pickle: read `.bin` files; only tensors and plain values are unpickled.

        Raises:
            FastsdError: no such file, malformed, for another family of models, one of face ids; no tower that fits.
        """
        with about("ip_adapter"):
            place = locate_file(path).path
        with about("ip_encoder"):
            tower = None if encoder is None else locate_vision(encoder, self.dtype != torch.float32).path
        return load_ip_adapter(place, tower, self.components.unet, self.dtype, self.device, allow_pickle)

    @named_arguments
    @undisturbed()
    def load_upscaler(self, path: str | Path, allow_pickle: bool = False) -> Upscaler:
        """Load an upscaler onto the pipeline's device, for `hires_upscaler`; see `fastsd.Upscaler.from_file`."""
        return Upscaler.from_file(path, self.device, allow_pickle=allow_pickle)
