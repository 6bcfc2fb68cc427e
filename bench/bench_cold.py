"""A cold process: the time from its start to its first image, its memory, and the times of the images after it."""

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
from bench.measure import Outcome, check_failed, distance, image_limit, spread
from bench.memory import in_use
from bench.models import pipeline_of, vae_dtype
from bench.session import Session
from fastsd.bundled import BUNDLED
from fastsd.kernels import dispatch
from fastsd.runtime.devices import dtype_name
from fastsd.weights.layouts.save import save_folder

STEPS = 4
TIMEOUT = 900  # seconds for one process
FIELDS = ("split", "steady_step", "peak", "again", "growth")  # of the process's report, for the record
CANDIDATES = ("fastsd", "diffusers", "diffusers-channels-last")


@pytest.fixture
def folder(bench: Session, model: str, dtype: torch.dtype, tmp_path: Path) -> Path:
    """The model on disk. Its pages are still in the file cache, so reading costs all candidates the same."""
    if bench.options.model is not None:
        return bench.options.model
    if model == "digits":
        return BUNDLED["digits"]
    save_folder(bench.components(model, dtype), tmp_path / "model", dtype)
    return tmp_path / "model"


def run_process(
    folder: Path, candidate: str, dtype: torch.dtype, size: int, output: Path, grow: bool, caches: Path,
    timeout: float = TIMEOUT,
) -> Any:  # fmt: skip
    """Run `bench.cold` in a new process, with its kernel caches in `caches`; returns its report."""
    flags = ["--candidate", candidate, "--dtype", dtype_name(dtype), "--size", str(size), "--steps", str(STEPS)]
    flags += ["--output", str(output), "--others", str(in_use()), *(["--grow"] if grow else [])]
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "HF_HUB_OFFLINE": "1",
    }
    began = time.time()
    command = [sys.executable, "-m", "bench.cold", str(folder), *flags]
    process = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or ["no message"])[-1])
    report = json.loads(process.stdout.strip().splitlines()[-1])
    report["first_image"] = report["finished"] - began
    report["split"]["start of Python"] = report["process_started"] - began
    return report


def reference_image(bench: Session, model: str, dtype: torch.dtype, size: int) -> torch.Tensor:
    """The first image by the reference path, in this process."""
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
    components = bench.components(model, dtype)
    size, limit = bench.size(model, components), image_limit(dtype, GUIDANCE, vae_dtype(components))
    expected = reference_image(bench, model, dtype, size)
    cuda, measuring = bench.options.device.type == "cuda", bench.options.measuring
    names = [name for name in CANDIDATES if name == "fastsd" or (measuring and name in bench.options.peers)]
    runs = [
        (name, state) for name in names for state in (("empty", "warm") if cuda and name == "fastsd" else ("warm",))
    ]

    def measure(name: str, state: str) -> tuple[Outcome, dict[str, Any]]:
        outcome = Outcome(f"{name}, empty kernel cache" if state == "empty" else name)
        grow = (cuda or size <= 256) and state == "warm"
        timeout = min(TIMEOUT, max(1.0, bench.remaining()))
        try:
            report = run_process(folder, name, dtype, size, tmp_path / "out.npy", grow, tmp_path, timeout)
            image = torch.from_numpy(np.load(tmp_path / "out.npy").astype(np.float32) / 255.0)
            outcome.distance = d = distance(image, expected)
            if not d.psnr >= limit:
                outcome.problem = check_failed(f"PSNR {d.psnr:.1f} dB, required {limit:.1f}")
                return outcome, {}
        except subprocess.TimeoutExpired as error:
            outcome.problem = f"failed: no image within {error.timeout:.0f} s"
            if timeout < TIMEOUT:
                outcome.problem = outcome.cut = f"stopped after {error.timeout:.0f} s: the budget is spent"
            return outcome, {}
        except (RuntimeError, OSError) as error:
            outcome.problem = f"failed: {(str(error).splitlines() or [type(error).__name__])[0][-160:]}"
            return outcome, {}
        outcome.samples, outcome.spread = [report["first_image"]], spread([report["first_image"]])
        return outcome, {key: _rounded(report[key]) for key in FIELDS if key in report}

    lines = [f"cold process model={model} size={size} batch=1 steps={STEPS} {dtype_name(dtype)}"]
    outcomes = []
    for name, state in runs:
        outcome, fields = measure(name, state)
        outcomes.append(outcome)
        lines.append(_line(outcome, fields))
        if measuring:
            bench.results.add(
                benchmark="cold", model=model, size=size, batch=1, steps=STEPS, dtype=dtype_name(dtype),
                **record.outcome_fields(outcome), **fields,
            )  # fmt: skip
    bench.tables.append("\n".join(lines))
    if outcomes[0].cut:
        bench.not_run.append(lines[0])
        pytest.skip(outcomes[0].cut)
    assert not outcomes[0].problem, outcomes[0].problem


def _rounded(value: Any) -> Any:
    """Round times to milliseconds."""
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
    text = f"  {outcome.name:26} first image {outcome.spread.median:.2f} s ({split}); peak {peak}"
    if "again" in fields:
        text += "\n" + " " * 29 + "then " + ", ".join(f"{k} {v:.2f} s" for k, v in fields["again"].items())
    if "growth" in fields:
        kind = "driver" if "driver" in fields["growth"][0] else "resident"
        first, last = (fields["growth"][i][kind] for i in (0, -1))
        text += f"; {last / first - 1:+.1%} {kind} memory over five sizes"
    return text
