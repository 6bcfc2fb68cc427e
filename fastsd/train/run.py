"""A complete training run: autoencoder, latents, UNet with text encoder, export."""

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
from fastsd.runtime.devices import undisturbed
from fastsd.train import vocabulary
from fastsd.train.autoencoder import Latents, centre, encode_all, load_latents, reconstruction_loss, save_latents
from fastsd.train.captions import KNOWN_WORDS, WORDS
from fastsd.train.diffusion import DiffusionModel, denoising_loss
from fastsd.train.digits import IMAGE_SIDE, Digits, read_digits
from fastsd.train.loop import Stage, Workers
from fastsd.train.settings import TrainingSettings, read_settings
from fastsd.weights import save_folder


class TrainingRun:
    """The stages of one run and the files in its folder `out`.

    autoencoder.pt and diffusion.pt are the checkpoints of the stages, latents.pt is the encoded training set,
    tokenizer/ the vocabulary, log.txt the progress report.
    """

    def __init__(self, settings: TrainingSettings, out: Path):
        self.settings, self.out = settings, out
        out.mkdir(parents=True, exist_ok=True)
        text = settings.diffusion.text
        self.tokenizer: Tokenizer = vocabulary.write(WORDS, out / "tokenizer", text.max_position_embeddings)
        self.text: CLIPConfig = replace(text, vocab_size=len(self.tokenizer), eos_token_id=self.tokenizer.eos_id)
        torch.manual_seed(settings.seed)  # the initial weights
        with torch.device("cpu"):
            vae = AutoencoderKL(settings.autoencoder.model)
            model = DiffusionModel(settings.diffusion.unet, self.text)
        seed = settings.seed
        self.autoencoder = Stage("autoencoder", vae, settings.autoencoder.fit, seed, out / "autoencoder.pt")
        self.diffusion = Stage("diffusion", model, settings.diffusion.fit, seed, out / "diffusion.pt")

    def report(self, line: str) -> None:
        """Print a line with the time, and append it to log.txt."""
        line = f"{time.strftime('%H:%M:%S')}  {line}"
        print(line, flush=True)
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def train(self, digits: Digits) -> None:
        """Train both stages; a restored stage continues from its checkpoint."""
        settings = self.settings
        counts = {name: sum(p.numel() for p in m.parameters()) for name, m in self._models().items()}
        self.report("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
        vae, model = self.autoencoder.model, self.diffusion.model
        assert isinstance(vae, AutoencoderKL) and isinstance(model, DiffusionModel)
        with Workers(settings.threads or torch.get_num_threads()) as workers:
            common = (workers, self.report, settings.checkpoint_minutes, settings.precision)
            if not self.autoencoder.finished:
                (self.out / "latents.pt").unlink(missing_ok=True)  # belongs to the weights before this training
                self.autoencoder.run(reconstruction_loss(vae, digits, settings.data, settings.autoencoder), *common)
            latents = self.latents(digits, workers)
            self.diffusion.run(denoising_loss(model, latents, self.tokenizer, settings.diffusion), *common)

    def latents(self, digits: Digits, workers: Workers) -> Latents:
        """The encoded training set; computed on first use, then read from latents.pt."""
        path = self.out / "latents.pt"
        if not path.is_file():
            vae = self.autoencoder.average
            assert isinstance(vae, AutoencoderKL)
            started = time.monotonic()
            latents = encode_all(vae, digits, self.settings.data, self.settings.seed, self.settings.precision, workers)
            save_latents(latents, path)
            self.report(f"encoded {len(latents.mean):,} images in {(time.monotonic() - started) / 60:.1f} min")
        return load_latents(path)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as an fp16 checkpoint folder; an existing model in `folder` is replaced."""
        cache = self.out / "latents.pt"
        if not cache.is_file():
            raise FastsdError("nothing to export yet; the autoencoder is not trained", path=self.out)
        settings, latents = self.settings, load_latents(cache)
        with torch.device("cpu"):
            vae, model = AutoencoderKL(settings.autoencoder.model), self.diffusion.average
        vae.load_state_dict(self.autoencoder.average.state_dict())
        assert isinstance(model, DiffusionModel)
        centre(vae, latents.offset, latents.spread)
        components = Components(
            unet=model.unet,
            vae=vae,
            text_encoders=(model.text_encoder,),
            tokenizers=(self.tokenizer,),
            scheduler=settings.diffusion.scheduler,
            sample_size=IMAGE_SIDE // settings.autoencoder.model.downscale,
            defaults={"width": IMAGE_SIDE, "height": IMAGE_SIDE, **asdict(settings.defaults)},
            known_words=frozenset(KNOWN_WORDS),
        )
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        save_folder(components, part, torch.float16)
        _load_in_fp32_by_default(part / "text_encoder" / "config.json")
        if folder.exists():
            if not (folder / "model_index.json").is_file():
                raise FastsdError("exists and is not a model; choose another folder", argument="--export", path=folder)
            shutil.rmtree(folder)
        part.rename(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self.report(f"exported step {self.diffusion.step} to {folder}, {size / 1e6:.2f} MB")

    def restore(self) -> bool:
        """Load the checkpoints; returns whether there are any."""
        return self.autoencoder.restore() | self.diffusion.restore()

    def _models(self) -> dict[str, torch.nn.Module]:
        model = self.diffusion.model
        assert isinstance(model, DiffusionModel)
        return {"autoencoder": self.autoencoder.model, "unet": model.unet, "text encoder": model.text_encoder}


def _load_in_fp32_by_default(config: Path) -> None:
    """Set fp32 as the default dtype in the config of a text encoder.

    Without a dtype in the config, transformers 5 loads the text encoder in the dtype of the file (fp16), while
    diffusers loads the UNet in fp32. A pipeline of two dtypes fails in its first matrix product.
    """
    content = json.loads(config.read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@undisturbed()
@torch.enable_grad()
def train(
    config: str | Path,
    out: str | Path | None = None,
    export: str | Path | None = None,
    resume: bool = False,
    export_only: bool = False,
) -> None:
    """Train a model from a config, resume a run, or only export it.

    Args:
        config: a TOML file, see `settings.TrainingSettings`. out, export: folders that override those of the config.
        resume: continue from the checkpoints in `out`; without it, an existing run there is an error.
        export_only: export the last checkpoints without training.

    Raises:
        FastsdError: invalid config, missing data, an existing run without `resume`, nothing to export.
    """
    settings = read_settings(config)
    folder = Path(out or settings.out)
    digits = None
    if not export_only:
        digits = read_digits(settings.data.mnist)
        limit = settings.data.limit or len(digits.images)
        digits = Digits(digits.images[:limit], digits.labels[:limit])
        if (folder / "autoencoder.pt").is_file() and not resume:
            raise FastsdError(
                f"--out {folder}: already contains a run; continue it with --resume, or choose another folder"
            )
    run = TrainingRun(settings, folder)
    restored = (resume or export_only) and run.restore()
    if digits is not None:
        if restored:
            steps = f"autoencoder at step {run.autoencoder.step}, diffusion at step {run.diffusion.step}"
            run.report(f"resumed: {steps}")
        run.train(digits)
    run.export(Path(export or settings.export))
