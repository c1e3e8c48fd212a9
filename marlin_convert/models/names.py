"""What transformers takes the tensors of a checkpoint for: which parameter each is, and which are left out.

Vision-language models have had two sets of names, `language_model.model.layers.0` and
`model.language_model.layers.0`. What leads from the old to the new is transformers' own, class by class.
"""

import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

# Layers for multi-token prediction, by name, and how many blocks past the last one they are.
_MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
_MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")

_NUMBER = re.compile(r"\.(\d+)\.")


def parameters_of(model: PreTrainedModel) -> Callable[[str], str]:
    """From the name of a tensor to the parameter that transformers loads it as, the name itself if into none.

    A tensor that transformers splits, joins or turns while it loads it keeps its name too.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def parameter(name: str) -> str:
        if name in expected:
            return name
        found, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        return name if converted else found

    return parameter


def beside(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Those of the names that are of the model's, but of no part that is built: they go along as they are.

    Layers for multi-token prediction, which engines draft with, and what else transformers says that it
    leaves out of this class.
    """
    left = "|".join(f"({pattern})" for pattern in sorted(model._keys_to_ignore_on_load_unexpected or ()))
    config = model.config.get_text_config()
    blocks = getattr(config, "num_hidden_layers", 0)
    further = max((getattr(config, key, None) or 0 for key in _MTP_COUNTS), default=0)
    expected = model.state_dict()
    lists = {name.partition(f".{blocks - 1}.")[0] for name in expected if f".{blocks - 1}." in name}

    def further_block(name: str) -> bool:
        number = _NUMBER.search(name)
        return (
            number is not None
            and blocks <= int(number[1]) < blocks + further
            and name[: number.start()] in lists
        )

    return [
        name
        for name in names
        if name not in expected
        and (_MTP.search(name) or further_block(name) or (left and re.search(left, name)))
    ]
