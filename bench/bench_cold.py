"""What a user feels: from starting a process to its first picture, its memory, and what any change costs after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import record
from bench.bench_images import GUIDANCE, pixels
from bench.cold import PROMPT
from bench.measure import Outcome, distance, image_limit, spread
from bench.memory import in_use
from bench.models import pipeline_of
from bench.session import Session
from fastsd.kernels import dispatch
from fastsd.pipeline import BUNDLED
from fastsd.runtime.devices import dtype_name
from fastsd.weights.layouts.save import save_folder

STEPS = 4
PATIENCE = 900  # seconds that one process may take
KNOWN = ("split", "steady_step", "peak", "again", "growth")
CANDIDATES = ("fastsd", "diffusers", "diffusers-channels-last")


@pytest.fixture
def folder(bench: Session, model: str, dtype: torch.dtype, tmp_path: Path) -> Path:
    """The model on a disk (its pages still in memory, so that reading it costs all candidates the same)."""
    if bench.options.model is not None:
        return bench.options.model
    if model == "digits":
        return BUNDLED
    save_folder(bench.components(model, dtype), tmp_path / "model", dtype)
    return tmp_path / "model"


def start(
    folder: Path, candidate: str, dtype: torch.dtype, size: int, output: Path, grow: bool, caches: Path,
    patience: float = PATIENCE,
) -> Any:  # fmt: skip
    """Run `bench.cold` in a process of its own, for `patience` seconds at most, with kernel caches in `caches`."""
    flags = ["--candidate", candidate, "--dtype", dtype_name(dtype), "--size", str(size), "--steps", str(STEPS)]
    flags += ["--output", str(output), "--others", str(in_use()), *(["--grow"] if grow else [])]
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "HF_HUB_OFFLINE": "1",
    }
    began = time.time()
    run = [sys.executable, "-m", "bench.cold", str(folder), *flags]
    found = subprocess.run(run, cwd=record.ROOT, env=environment, capture_output=True, text=True, timeout=patience)
    if found.returncode:
        raise RuntimeError((found.stderr.strip().splitlines() or ["it died"])[-1])
    result = json.loads(found.stdout.strip().splitlines()[-1])
    result["first_picture"] = result["finished"] - began
    result["split"]["start of Python"] = result["process_started"] - began
    return result


def reference(bench: Session, model: str, dtype: torch.dtype, size: int) -> torch.Tensor:
    """The first picture by the reference path, in this process."""
    components = bench.components(model, dtype)
    vae = components.vae.config
    noise = torch.randn(
        1, vae.latent_channels, size // vae.downscale, size // vae.downscale,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    pipeline = pipeline_of(components, bench.options.device, dtype, captured=False)
    with dispatch.reference_only():
        return pixels(
            pipeline(
                PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=size, height=size, latents=noise
            ).images
        )


def bench_cold_process(bench: Session, model: str, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    size = bench.size(model, bench.components(model, dtype))
    wanted, limit = reference(bench, model, dtype, size), image_limit(dtype, GUIDANCE)
    cuda, measuring = bench.options.device.type == "cuda", bench.options.measuring
    names = [name for name in CANDIDATES if name == "fastsd" or (measuring and name in bench.options.peers)]
    grow = cuda or size <= 256
    lines = [f"cold process model={model} size={size} batch=1 steps={STEPS} {dtype_name(dtype)}"]
    own: Outcome | None = None
    for name in names:
        caches = ("empty", "warm") if cuda and name == "fastsd" else ("warm",)
        for state in caches:
            title = f"{name}, empty kernel cache" if state == "empty" else name
            outcome, fields = Outcome(title), {}
            try:
                left = min(PATIENCE, max(1.0, bench.remaining()))
                found = start(folder, name, dtype, size, tmp_path / "out.npy", grow and state == "warm", tmp_path, left)
                image = torch.from_numpy(np.load(tmp_path / "out.npy").astype(np.float32) / 255.0)
                outcome.distance = d = distance(image, wanted)
                if not d.psnr >= limit:
                    outcome.problem = f"red gate: PSNR {d.psnr:.1f} dB, needs {limit:.1f}"
                else:
                    outcome.samples, outcome.spread = [found["first_picture"]], spread([found["first_picture"]])
                    fields = {key: _rounded(found[key]) for key in KNOWN if key in found}
            except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
                outcome.problem = f"failed: {(str(error).splitlines() or [type(error).__name__])[0][-160:]}"
            lines.append(_line(outcome, fields))
            own = own or outcome
            if measuring:
                bench.results.add(
                    contest="cold", model=model, size=size, batch=1, steps=STEPS, dtype=dtype_name(dtype),
                    **record.outcome_fields(outcome), **fields,
                )  # fmt: skip
    bench.tables.append("\n".join(lines))
    assert own is not None and not own.problem, own and own.problem


def _rounded(value: Any) -> Any:
    """Milliseconds are enough."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def _line(outcome: Outcome, fields: dict[str, Any]) -> str:
    if outcome.spread is None:
        return f"  {outcome.name:26} {outcome.problem}"
    split = ", ".join(f"{name} {seconds:.2f}" for name, seconds in fields["split"].items())
    peak = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in fields["peak"].items())
    text = f"  {outcome.name:26} first picture {outcome.spread.median:.2f} s ({split}); peak {peak}"
    if "again" in fields:
        text += "\n" + " " * 29 + "then " + ", ".join(f"{k} {v:.2f} s" for k, v in fields["again"].items())
    if "growth" in fields:
        kind = "driver" if "driver" in fields["growth"][0] else "resident"
        first, last = (fields["growth"][i][kind] for i in (0, -1))
        text += f"; {last / first - 1:+.1%} {kind} memory over five sizes"
    return text
