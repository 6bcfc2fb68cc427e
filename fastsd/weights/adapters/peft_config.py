"""PEFT's configs: what they say of an adapter's layers beyond the tensors, and what of them fastsd does not do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError
from fastsd.weights.adapters.layer_patterns import layer_matcher
from fastsd.weights.adapters.roles import NO_OPTIONS, LayerOptions
from fastsd.weights.formats.json_file import parse_json

METADATA = "lora_adapter_metadata"  # the metadata key under which diffusers stores PEFT's configs, as JSON
TYPES = ("LORA", "LOHA", "LOKR", "OFT", "IA3")
DEFAULT_ALPHA = DEFAULT_RANK = 8  # of LoraConfig, LoHaConfig and LoKrConfig
# Settings that are honoured: by the tensors or by the functions below.
_USED = (
    *("peft_type", "r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("bias", "modules_to_save", "coft", "eps", "block_share", "oft_block_size", "feedforward_modules"),
    *("use_cayley_neumann", "num_cayley_neumann_terms", "use_effective_conv2d", "decompose_both", "decompose_factor"),
)
# Settings of training, of where PEFT finds layers, and of layers that Stable Diffusion has not.
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "init_ia3_weights"),
    *("megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
)
# Settings that change the result in a way that fastsd lacks.
_REFUSED = (
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "target_parameters"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Initialisations that leave the base weights as they are. The others (pissa, olora, corda, loftq, lora_ga) subtract
# the first adapter from them, and such files belong to the weights that remain.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")

Configs = dict[str, dict[str, Any]]  # by network; "" where there is one


def configs_in(path: Path, text: str) -> Configs:
    """PEFT's config of each network, from a JSON object with keys like "unet.lora_alpha".

    Raises:
        FastsdError: it is not a JSON object.
    """
    try:
        flat = parse_json(text)
        pairs = [(*key.split(".", 1), value) for key, value in flat.items() if "." in key]
    except (ValueError, AttributeError, RecursionError) as error:
        raise FastsdError(f"its metadata {METADATA} is not a JSON object", path=path) from error
    configs: Configs = {}
    for network, key, value in pairs:
        configs.setdefault(network, {})[key] = value
    return configs


def check_config(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Notes on the settings that fastsd does not know.

    Raises:
        FastsdError: a kind of adapter or a setting that fastsd lacks.
    """
    kind = config.get("peft_type", "LORA")
    if kind not in TYPES:
        raise FastsdError(f"PEFT's {str(kind)[:40]}; fastsd reads {', '.join(TYPES)} of PEFT's kinds", path=path)
    for name in _REFUSED:
        if config.get(name):
            raise FastsdError(f"PEFT's setting {name} is {_short(config[name])}; fastsd lacks it", path=path)
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in (None, *_PLAIN_STARTS):
        raise FastsdError(
            f"PEFT's setting init_lora_weights is {_short(start)}, so it belongs to changed base weights; save it with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
            path=path,
        )
    known = {*_USED, *_WITHOUT_EFFECT, *_REFUSED, "init_lora_weights"}
    unknown = [name for name, value in config.items() if name not in known and value not in (None, False, "none")]
    return [
        f"{path}: PEFT's setting {name[:60]} ({_short(config[name])}) is not known here and has no effect"
        for name in unknown
        if config[name] != [] and config[name] != {}
    ]


def scale_of(name: str, rank: int | None, config: Mapping[str, Any], path: Path) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023).

    Args:
        name: of the layer, without the network's.
        rank: as the tensors have it; None: they do not tell, and the config does.
        config: of the layer's network.
        path: for messages.

    Raises:
        FastsdError: alpha or rank is no number.
    """
    # LoRA's alpha has another name than that of LoHa and LoKr.
    alpha = config.get("lora_alpha", config.get("alpha"))
    alpha = _by_pattern(name, config.get("alpha_pattern"), DEFAULT_ALPHA if alpha is None else alpha, path)
    if rank is None:
        stated = config.get("r")
        rank = _by_pattern(name, config.get("rank_pattern"), DEFAULT_RANK if stated is None else stated, path)
    for what, value in (("alpha", alpha), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int | float) or (what == "rank" and value <= 0):
            raise FastsdError(f"PEFT's {what} of {name[:80]} is {_short(value)}; it should be a number", path=path)
    return alpha / rank**0.5 if config.get("use_rslora") is True else alpha / rank


def options_of(name: str, config: Mapping[str, Any], path: Path) -> LayerOptions:
    """The options of a layer of OFT or (IA)^3.

    Raises:
        FastsdError: a setting that is not what PEFT writes.
    """
    if config.get("peft_type") == "IA3":
        patterns = config.get("feedforward_modules") or ()
        if not isinstance(patterns, str | list | tuple):
            raise FastsdError(f"PEFT's feedforward_modules is {_short(patterns)}", path=path)
        if isinstance(patterns, str):
            return LayerOptions(feedforward=_matches(patterns, name, path))
        return LayerOptions(feedforward=any(name == part or name.endswith(f".{part}") for part in patterns))
    if config.get("peft_type") == "OFT":
        terms, eps = config.get("num_cayley_neumann_terms", 5), config.get("eps", 6e-5)
        if type(terms) is not int or not 1 <= terms <= 100 or type(eps) not in (int, float):
            raise FastsdError(f"PEFT's num_cayley_neumann_terms is {_short(terms)}, eps {_short(eps)}", path=path)
        series = config.get("use_cayley_neumann", True)
        return LayerOptions(terms=terms if series else None, bound=float(eps) if config.get("coft") else None)
    return NO_OPTIONS


def _by_pattern(name: str, patterns: Any, default: Any, path: Path) -> Any:
    """PEFT's rule (`get_pattern_key`): the first pattern, a regular expression, that matches the end of the name."""
    if not isinstance(patterns, Mapping):
        return default
    for pattern, value in patterns.items():
        if _matches(pattern, name, path):
            return value
    return default


def _matches(pattern: str, name: str, path: Path) -> bool:
    try:
        return layer_matcher(pattern)(name)
    except ValueError as error:
        raise FastsdError(f"PEFT's pattern {_short(pattern)} {error}; name the layers instead", path=path) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
