"""A whole training run: autoencoder, latents, UNet with text encoder, export."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastsd.components import Components
from fastsd.config import CLIPConfig
from fastsd.errors import FastsdError
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.vae import AutoencoderKL
from fastsd.train import vocabulary
from fastsd.train.autoencoder import Latents, centre, encode_all, load_latents, reconstruction_loss, save_latents
from fastsd.train.captions import KNOWN_WORDS, WORDS
from fastsd.train.diffusion import Denoiser, denoising_loss
from fastsd.train.digits import PICTURE, Digits, read_digits
from fastsd.train.loop import Stage, Workers
from fastsd.train.settings import Settings, read_settings
from fastsd.weights import save_folder


class Run:
    """The stages of one run and the files between them, all in the folder `out`.

    autoencoder.pt and diffusion.pt are the stages' checkpoints, latents.pt the encoded training set, tokenizer/ the
    vocabulary, log.txt what was reported.
    """

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out = settings, out
        out.mkdir(parents=True, exist_ok=True)
        text = settings.diffusion.text
        self.tokenizer: Tokenizer = vocabulary.write(WORDS, out / "tokenizer", text.max_position_embeddings)
        self.text: CLIPConfig = replace(text, vocab_size=len(self.tokenizer), eos_token_id=self.tokenizer.eos_id)
        torch.manual_seed(settings.seed)  # the initial weights
        vae = AutoencoderKL(settings.autoencoder.model)
        denoiser = Denoiser(settings.diffusion.unet, self.text)
        seed = settings.seed
        self.first = Stage("autoencoder", vae, settings.autoencoder.fit, seed, out / "autoencoder.pt")
        self.second = Stage("diffusion", denoiser, settings.diffusion.fit, seed, out / "diffusion.pt")

    def report(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {line}"
        print(line, flush=True)
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def train(self, digits: Digits) -> None:
        """Both stages, from wherever their checkpoints are."""
        settings = self.settings
        sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in self._models().items()}
        self.report("parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
        first, second = self.first, self.second
        vae = first.model
        assert isinstance(vae, AutoencoderKL) and isinstance(second.model, Denoiser)
        with Workers(settings.threads or torch.get_num_threads()) as workers:
            common = (workers, self.report, settings.checkpoint_minutes, settings.precision)
            if not first.finished:
                (self.out / "latents.pt").unlink(missing_ok=True)  # of an autoencoder that is not there any more
                first.run(reconstruction_loss(vae, digits, settings.data, settings.autoencoder), *common)
            latents = self.latents(digits, workers)
            loss = denoising_loss(second.model, latents, self.tokenizer, settings.diffusion)
            second.run(loss, *common)

    def latents(self, digits: Digits, workers: Workers) -> Latents:
        """The cache of latents, made on first use."""
        path = self.out / "latents.pt"
        if not path.is_file():
            vae = self.first.average
            assert isinstance(vae, AutoencoderKL)
            started = time.monotonic()
            made = encode_all(vae, digits, self.settings.data, self.settings.seed, self.settings.precision, workers)
            save_latents(made, path)
            self.report(f"encoded {len(made.mean):,} pictures in {(time.monotonic() - started) / 60:.1f} min")
        return load_latents(path)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint folder, fp16; an older model there is replaced whole."""
        cache = self.out / "latents.pt"
        if not cache.is_file():
            raise FastsdError(f"{self.out}: nothing to export yet, the autoencoder is not trained")
        settings, latents = self.settings, load_latents(cache)
        vae, denoiser = AutoencoderKL(settings.autoencoder.model), self.second.average
        vae.load_state_dict(self.first.average.state_dict())
        assert isinstance(denoiser, Denoiser)
        centre(vae, latents.offset, latents.spread)
        components = Components(
            unet=denoiser.unet,
            vae=vae,
            text_encoders=(denoiser.text_encoder,),
            tokenizers=(self.tokenizer,),
            scheduler=settings.diffusion.scheduler,
            sample_size=PICTURE // settings.autoencoder.model.downscale,
            defaults={"width": PICTURE, "height": PICTURE, **asdict(settings.defaults)},
            known_words=frozenset(KNOWN_WORDS),
        )
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        save_folder(components, part, torch.float16)
        _widen_on_load(part / "text_encoder" / "config.json")
        if folder.exists():
            if not (folder / "model_index.json").is_file():
                raise FastsdError(f"--export {folder}: exists and is no model; choose another folder")
            shutil.rmtree(folder)
        part.rename(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self.report(f"exported step {self.second.step} to {folder}, {size / 1e6:.2f} MB")

    def restore(self) -> bool:
        """Go back to the checkpoints; whether there were any."""
        return self.first.restore() | self.second.restore()

    def _models(self) -> dict[str, torch.nn.Module]:
        denoiser = self.second.model
        assert isinstance(denoiser, Denoiser)
        return {"autoencoder": self.first.model, "unet": denoiser.unet, "text encoder": denoiser.text_encoder}


def _widen_on_load(config: Path) -> None:
    """Say in a text encoder's config that it runs in fp32 unless told otherwise.

    transformers 5 gives a text encoder the dtype of its file where the config is silent, diffusers gives the UNet fp32;
    opened without a dtype, the fp16 file would then make a pipeline of two dtypes, which fails in its first product.
    """
    content = json.loads(config.read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(
    config: str | Path,
    out: str | Path | None = None,
    export: str | Path | None = None,
    resume: bool = False,
    export_only: bool = False,
) -> None:
    """Train what a config says, or go on, or only export.

    Args:
        config: a TOML file, see `settings.Settings`. out, export: folders that replace the config's.
        resume: go on from the checkpoints in `out`; without it a run there is refused, not overwritten.
        export_only: write the model as the last checkpoints have it.

    Raises:
        FastsdError: bad config, missing data, a run in the way, nothing to export.
    """
    settings = read_settings(config)
    folder = Path(out or settings.out)
    digits = None
    if not export_only:
        digits = read_digits(settings.data.mnist)
        limit = settings.data.limit or len(digits.images)
        digits = Digits(digits.images[:limit], digits.labels[:limit])
        if (folder / "autoencoder.pt").is_file() and not resume:
            raise FastsdError(f"--out {folder}: holds a run already; give --resume to go on, or another folder")
    run = Run(settings, folder)
    found = (resume or export_only) and run.restore()
    if digits is not None:
        if found:
            run.report(f"resumed: autoencoder at step {run.first.step}, diffusion at step {run.second.step}")
        run.train(digits)
    run.export(Path(export or settings.export))
