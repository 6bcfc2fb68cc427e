"""Untrusted JSON: objects read from files, and their values checked for type and range."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError

MAX_JSON = 32 * 2**20  # bytes; a real config has a few thousand, an index of shards a few hundred thousand


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FastsdError: missing, unreadable, too large or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise FastsdError(f"larger than any config ({MAX_JSON // 2**20} MiB)", path=path)
        data = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastsdError(f"cannot be read ({error.strerror})", path=path) from error
    except (ValueError, RecursionError) as error:
        raise FastsdError(f"not JSON ({error.__class__.__name__})", path=path) from error
    if not isinstance(data, dict):
        raise FastsdError("not a JSON object", path=path)
    return data


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for untrusted texts: an integer of more digits than any number here needs becomes a float.

    Raises:
        ValueError, RecursionError: not JSON, or nested too deeply.
    """
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


# The range of each number. Values outside it belong to no model; they would fill memory or build layers endlessly.
_WIDTH = (1, 2**16)
_LIMITS: dict[str, tuple[float, float]] = {
    "layers_per_block": (1, 8),
    "transformer_layers_per_block": (1, 24),
    "num_hidden_layers": (1, 256),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (0, 16)),
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (1, 1024)),
    **dict.fromkeys(("block_out_channels", "attention_head_dim", "num_attention_heads", "norm_num_groups"), _WIDTH),
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "cross_attention_dim", "sample_size"), _WIDTH),
    **dict.fromkeys(("hidden_size", "projection_dim", "max_position_embeddings"), _WIDTH),
    **dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim"), (0, 2**16)),
    "time_cond_proj_dim": (0, 2**16),
    **dict.fromkeys(("intermediate_size", "vocab_size"), (1, 2**20)),
    "freq_shift": (0, 1),
    **dict.fromkeys(("image_size", "patch_size"), (1, 2**13)),
    **dict.fromkeys(("norm_eps", "layer_norm_eps", "beta_start", "beta_end"), (0.0, 1.0)),
    "scaling_factor": (1e-6, 1e6),
    "num_train_timesteps": (1, 100_000),
    "steps_offset": (0, 100_000),
    "original_inference_steps": (1, 100_000),
    "timestep_scaling": (1e-6, 1e6),
    "lambda_min_clipped": (-math.inf, 100.0),
    **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data"), (1e-6, 1e6)),
    "rho": (0.1, 100.0),
}


class ConfigReader:
    """Typed access to one JSON config; every error names the file and the key."""

    def __init__(self, path: Path, data: dict[str, Any] | None = None):
        """data: what the file would hold, for a config that is in memory; `path` then only names it."""
        self.path = path
        self.data = read_json(path) if data is None else data

    def error(self, key: str, expected: str) -> FastsdError:
        value = repr(self.data.get(key))
        return FastsdError(f"{key} is {value if len(value) <= 80 else value[:77] + '...'}; {expected}", path=self.path)

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A value of type `kind`, within its range; `default` if the file lacks the key."""
        value: Any = self.data.get(key)
        if value is None:
            value = default
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**53 else math.inf
        if type(value) is not kind:
            raise self.error(key, f"it should be of type {kind.__name__}")
        low, high = _LIMITS.get(key, (0, 2**31 - 1))
        number: Any = value
        if kind is not bool and not low <= number <= high:  # false for NaN too
            raise self.error(key, f"it should be a number from {low} to {high}")
        return value

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value not in allowed:
            raise self.error(key, f"it should be {' or '.join(map(repr, allowed))}")
        return value

    def per_level(self, key: str, levels: int, default: Any) -> tuple[int, ...]:
        """One integer for all levels, or a list with one per level."""
        value = self.data.get(key)
        value = default if value is None else value
        numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
        low, high = _LIMITS[key]
        if len(numbers) != levels or not all(type(n) is int and low <= n <= high for n in numbers):
            raise self.error(key, f"it should be an integer from {low} to {high}, or a list of {levels}")
        return numbers
