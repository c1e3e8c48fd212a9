"""What is checked, and what it is compared with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marlin_convert.checkpoint.linears import Weights

if TYPE_CHECKING:
    from marlin_convert.ranks import Ranks


@dataclass(frozen=True)
class Subject:
    """The checkpoint, opened: its weights, the model its config.json means, and where that is run.

    `ranks` are the processes that share the work; alone it is this one.
    """

    weights: Weights
    model: PreTrainedModel
    manifest: dict[str, Any] | None
    device: torch.device
    trust_remote_code: bool
    ranks: "Ranks"


@dataclass(frozen=True)
class Original:
    """The model a checkpoint was made from, and the text that both are run on.

    `ids` are the tokens of the text, (samples, length) int64; `text` is what the report says of it.
    """

    name: str
    weights: Weights
    ids: Tensor
    text: dict[str, Any]
