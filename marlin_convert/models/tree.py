"""The modules of a model as transformers builds them, and whether a checkpoint's tensors are theirs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.errors import SourceError
from marlin_convert.models import experts, joined
from marlin_convert.models.discover import discover
from marlin_convert.models.names import Names

OTHER_MODEL = "the config.json may be of another model; fetch the model again."


# Counts that transformers makes as many objects of, however many a config.json says. The largest models have
# some hundred blocks; labels are for classifiers.
MOST = {"num_hidden_layers": 1000, "num_labels": 1000}

# What a config.json may ask a forward to do or to return, left over from training or exporting the model.
FORWARD = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "use_cache": False,
    "gradient_checkpointing": False,
}

# What is stored beside the parameters and is none: buffers that every model computes, the bookkeeping of
# Transformer Engine, and the scales of a quantized cache, without which the cache is kept in 16 bits.
_NO_PARAMETER = re.compile(
    r"(^|\.)(rotary_emb\.\w+|_extra_state"
    r"|self_attn\.(attn\.|[kqv]_proj\.)?(kv|k|q|v|prob|output|prob_output)_(scale|zero_point))$"
)

# What llm-compressor stores beside weights that it has not rounded yet.
_OF_A_ROUNDING = re.compile(r"\.(weight|input|output)_(scale|zero_point|g_idx|shape)$")


def module_tree(weights: Weights, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint as transformers builds it, with every tensor on the meta device.

    The tensors of `weights` get the names of its parameters.
    Its config has a head that is not the embedding where one with other values is stored, whatever the
    config.json says: so transformers loads it.
    """
    checkpoint = weights.checkpoint
    check_type(checkpoint.config)
    for part in (checkpoint.config, checkpoint.config.get("text_config")):
        for key, most in MOST.items():
            if isinstance(part, dict) and isinstance(part.get(key), int) and part[key] > most:
                raise SourceError(
                    f"config.json says {key} = {part[key]}, more than {most}.",
                    "it may be damaged; fetch it again.",
                )
    with config_errors(checkpoint.config):
        settings = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
        for one in (settings, settings.get_text_config()):
            for flag, value in FORWARD.items():
                setattr(one, flag, value)
        settings._attn_implementation = None  # what transformers takes by itself, whatever is asked for
        model = _on_meta(settings, trust_remote_code)
    Names(model).place(weights)
    if any(
        name in weights and of in weights and not weights.same(name, of)
        for name, of in model.all_tied_weights_keys.items()
    ):
        settings.tie_word_embeddings = False
        with config_errors(checkpoint.config):
            model = _on_meta(settings, trust_remote_code)
    return model


def _on_meta(settings: Any, trust_remote_code: bool) -> PreTrainedModel:
    kinds = {
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    of_type = [kind for kind, names in kinds.items() if settings.model_type in names]
    saved = set(settings.architectures or ())
    # some types are both: then the class that was saved says which
    auto = next(
        (kind for kind in of_type if saved & set(_names(kinds[kind][settings.model_type]))),
        of_type[0] if of_type else AutoModelForCausalLM,
    )
    with torch.device("meta"), _quiet_transformers():
        model = auto.from_config(settings, trust_remote_code=trust_remote_code).eval()
    if any(getattr(module, "attn_logit_softcapping", None) for module in model.modules()):
        # the fused attention of torch has no softcap: some releases leave it out and say nothing
        model.set_attn_implementation("eager")
    experts.take_apart(model)
    joined.take_apart(model)
    return model


def _names(of: str | Sequence[str]) -> tuple[str, ...]:
    """The classes that transformers has for a type: one name, or several."""
    return (of,) if isinstance(of, str) else tuple(of)


def check_type(config: Mapping[str, Any]) -> None:
    """Raise SourceError for a type that a config.json alone says to be unknown, or no language model."""
    model_type = config.get("model_type")
    if "auto_map" in config:
        return
    if not (isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES):
        raise SourceError(
            f"{model_type!r} is not a type of model that transformers {transformers.__version__} knows.",
            "a newer one may: pip install -U transformers.",
        )
    if model_type not in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}:
        raise SourceError(
            f"{model_type!r} is no language model that transformers builds from its config alone.",
            "causal language models are quantized, and the text part of models that take images too.",
        )


def claims_tied(weights: Weights, model: PreTrainedModel) -> bool:
    """Whether config.json says that the head is the embedding, and is wrong: transformers loads both."""
    by_default = getattr(type(model.config), "tie_word_embeddings", False)
    said = weights.checkpoint.config.get("tie_word_embeddings", by_default)
    return bool(said) and not model.config.tie_word_embeddings


def check_names(weights: Weights, names: Names, *, requantize: bool = False) -> list[str]:
    """Compare the tensors with those of a model; returns those that are known to be left out.

    To `requantize` leaves the scales of a rounding that was not carried out too.
    SourceError names what is missing, what is not of the architecture or of a type that is not read, scales
    that are none, and what is there dense and packed.
    """
    source = weights.checkpoint.directory.name
    model, shapes = names.model, names.shapes
    tied, expected = model.all_tied_weights_keys.keys(), shapes.keys()
    known = {name for name in weights.packed_names() if f"{name.rpartition('.')[0]}.weight" in expected}
    parts = {part for parts, _ in weights.joined.values() for part in parts}
    foreign = sorted(weights.checkpoint.tensors.keys() - expected - known - parts)
    converted = [name for name in foreign if names.is_converted(name)]
    # of what no text reads nothing is computed: its tensors go along as they are
    idle = discover(model).idle if converted else frozenset()
    of_towers = {name for name in converted if names.loaded_as(name) in idle}
    if converted := [name for name in converted if name not in of_towers]:
        raise SourceError(
            f"{_some(converted)} in {source}: transformers splits or joins them while it loads them.",
            "that is not done here: load the model with transformers, and save its state_dict().",
        )
    unread = idle if of_towers else frozenset()
    missing = sorted(name for name in expected - tied - unread if name not in weights)
    if missing:
        raise SourceError(
            f"{_some(missing)} of the architecture not in {source}.", _way_to_names(missing, weights, names)
        )
    for name, info in weights.checkpoint.tensors.items():
        if name in expected and info.shape != shapes[name]:
            raise SourceError(
                f"{name} has shape {info.shape}, its config.json means {shapes[name]}.", OTHER_MODEL
            )
        if name in expected:
            weights.dtype(name)  # it must be one that is read
    weights.check_scales()
    packed = {f"{linear}.weight" for linear in weights.packed_linears()}
    twice = sorted(packed & weights.checkpoint.tensors.keys())
    if twice:
        raise SourceError(f"{_some(twice)} in {source} both dense and packed.", OTHER_MODEL)
    unrounded = [name for name in foreign if weights.disregarded and _OF_A_ROUNDING.search(name)]
    if unrounded and not requantize:
        raise SourceError(
            f"{_some(unrounded)} in {source} beside weights not rounded to them: {weights.disregarded}.",
            "--requantize solves from the weights as they are; or save the model compressed.",
        )
    left_out = unrounded + [
        name
        for name in foreign
        if name not in of_towers and (_NO_PARAMETER.search(name) or _is_idle_bias(weights, name))
    ]
    with_place = {*left_out, *of_towers, *filter(names.is_beside, foreign)}
    strangers = [name for name in foreign if name not in with_place]
    if strangers:
        raise SourceError(
            f"{_some(strangers)} in {source} not of the architecture.",
            _way_to_names(strangers, weights, names),
        )
    return left_out


def _way_to_names(wrong: Sequence[str], weights: Weights, names: Names) -> str:
    """What to do about tensors that are missing, or too many: what config.json would have to say."""
    blocks = discover(names.model).blocks + "."
    if weights.disregarded:
        return f"{weights.disregarded}; fetch the model again."
    if weights.checkpoint.config.get("vision_config") and not any(
        "vision" in name for name in weights.checkpoint.tensors
    ):
        return (
            "config.json is of the form that takes images (vision_config), the files are of its text part: "
            "fetch the whole model, or save the text part with a config.json of its own."
        )
    if list(wrong) == ["lm_head.weight"]:
        return "if the embedding is the head too, config.json must say tie_word_embeddings = true."
    further = set(names.beside(weights.checkpoint.tensors))
    numbers = {
        name.removeprefix(blocks).partition(".")[0]
        for name in weights.checkpoint.tensors
        if name.startswith(blocks) and name not in further
    }
    if not numbers:
        first = next(iter(weights.checkpoint.tensors))
        return (
            f"its tensors have names like {first!r}; engines know those of the "
            "language model alone: save that, with adapters merged."
        )
    said = names.model.config.get_text_config().num_hidden_layers
    if len(numbers) != said:
        return (
            f"config.json says num_hidden_layers = {said}, the tensors are of {len(numbers)} blocks; "
            "make it say what the model has, or fetch the model again."
        )
    if all(name.endswith(".bias") for name in wrong):
        return "config.json must say which linears have biases: attention_bias and mlp_bias, true or false."
    return OTHER_MODEL


def _is_idle_bias(weights: Weights, name: str) -> bool:
    """Whether this is a bias of zeros: old AutoGPTQ gave one to every linear, whatever the architecture."""
    linear = name.removesuffix(".bias")
    return linear != name and f"{linear}.weight" in weights and not weights.read(name).any()


def _some(names: Sequence[str]) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors ({shown}, ...)" if len(names) > 3 else shown


# What transformers calls by another name than it did.
_RENAMED = {"su": "longrope"}


@contextmanager
def config_errors(config: Mapping[str, Any]) -> Iterator[None]:
    """Make a SourceError of whatever a config.json makes transformers raise while it builds a model."""
    try:
        yield
    except Exception as error:  # it can be wrong in as many ways as there is code reading it
        why = " ".join(str(error).split()).rstrip(".")
        unknown = error.args[0] if isinstance(error, KeyError) and error.args else None
        place = _place_of(unknown, config)
        if place:
            why = f"{place} is {unknown!r}, which transformers {transformers.__version__} does not know"
        raise SourceError(
            f"transformers cannot build a model from this config.json: {why}.",
            _way_to_config(unknown, config),
        ) from error


def _way_to_config(unknown: Any, config: Mapping[str, Any]) -> str:
    """What to do about a config.json that transformers does not take: the newer one that wrote it, if so."""
    if unknown in _RENAMED:
        return f"that is an old name; write {_RENAMED[unknown]!r}."
    version = str(config.get("transformers_version") or "")
    if _release(version) > _release(transformers.__version__):
        return f"transformers {version} wrote it: pip install -U transformers."
    if config.get("vision_config"):
        return f"correct text_config and vision_config of {config.get('model_type')!r}, or fetch it again."
    return "correct it, or fetch it again."


def _release(version: str) -> list[int]:
    """The numbers that a version begins with."""
    return [int(number) for number in re.findall(r"\d{1,9}", version)[:3]]


def _place_of(value: Any, config: Any, place: str = "") -> str | None:
    """Where in a config a text stands, as the keys that lead to it; None where it does not."""
    if isinstance(config, Mapping):
        found = (
            _place_of(value, one, f"{place}.{key}" if place else str(key)) for key, one in config.items()
        )
        return next(filter(None, found), None)
    return place if isinstance(value, str) and config == value else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
