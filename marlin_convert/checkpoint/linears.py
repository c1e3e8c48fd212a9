"""The weights of a checkpoint as floats, or as integer codes where they are quantized."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marlin_convert import formats
from marlin_convert.checkpoint import fp8, mxfp4, names
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.reader import Checkpoint, Slice, TensorInfo
from marlin_convert.errors import FormatError, SourceError
from marlin_convert.formats.bounds import float16_scales
from marlin_convert.formats.scheme import SCALE_DTYPES
from marlin_convert.quantized import QuantizedLinear, contiguous_groups


@dataclass(frozen=True)
class Stacked:
    """A weight or bias of all experts as transformers stacks it: `path` is its name, `roles` its linears.

    With two of them the first rows of every expert's `shape`, (n, k) or (n,), are the gate's, or the even
    ones where they are `interleaved`. Files may hold a weight as (E, n, k) or as (E, k, n); of a square one
    the shape does not say which, and it is as transformers has it: `transposed` or not.
    """

    path: str
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    interleaved: bool
    transposed: bool


# The types of parameters, as safetensors calls them.
FLOATS = ("F16", "BF16", "F32")
# What modules keep among their floats: batch normalization's counter in vision towers, the experts that
# DeepSeek V4 sends a token to by its id.
INTEGERS = ("I32", "I64")
# Values of a tensor that are read where it is only looked at.
LOOKED_AT = 1 << 16
CPU = torch.device("cpu")

# What is floats in every module.
OF_LINEARS = (".weight", ".bias")


# The suffix of its codes tells the layout of a packed linear, but for GPTQ's and AWQ's, which share one.
CODES = {layout.SUFFIXES[0]: name for name, layout in formats.FORMATS.items()}


@dataclass(frozen=True)
class Peculiarities:
    """What a format must be able to hold beside codes and scales; `least_zero` is the least zero code."""

    symmetric: bool
    act_order: bool
    least_zero: int


class Weights:
    """Every parameter of a checkpoint, dense or packed, under its dense name.

    `checkpoint` has the tensors by the parameter that they are, `renamed` those called otherwise on disk and
    written under their full names.
    `disregarded` is what a config says of packed linears where none is packed, in any layout. `scaled` has
    the scales of weights stored in fp8, which are none of the tensors; `joined` the parameters that are
    several of them, one after another along a dimension. `supposed` says whether something was taken for what
    the config says, or what the first values are, because the files are not here.
    """

    def __init__(self, checkpoint: Checkpoint):
        """SourceError when the linears are packed in another layout than the config says.

        And for weights in fp8 that have no scales, or not those that the config says.
        """
        tied = checkpoint.config.get("tie_word_embeddings") is True
        found = names.parameters(checkpoint.tensors, tied=tied)
        self.renamed = {full: name for full, name in found.items() if full != name}
        checkpoint = replace(
            checkpoint, tensors={full: checkpoint.tensors[name] for full, name in found.items()}
        )
        self.checkpoint = checkpoint
        config = checkpoint.quantization_config
        self.scheme: formats.Scheme | None = None
        self.disregarded: str | None = None
        self.scaled: dict[str, fp8.Scales] = {}
        self.stored_in_mxfp4 = False
        self.supposed = False
        self.joined: dict[str, tuple[tuple[str, ...], int]] = {}
        self._schemes: dict[str, formats.Scheme] = {}
        self._same: dict[tuple[str, str], bool] = {}
        self._on_disk: dict[str, str] = {}
        self._modules_on_disk: dict[str, str] = {}
        if _is_mlx(checkpoint):
            raise SourceError(
                f"{checkpoint.directory.name} is quantized by MLX, whose layout is not read.",
                "start from the model it was made from, or write it out with mlx_lm.convert --dequantize.",
            )
        if config and mxfp4.says(config):
            self.checkpoint = replace(checkpoint, tensors=mxfp4.pair(checkpoint.tensors))
            self.stored_in_mxfp4 = True
        elif config and _is_dense(checkpoint):
            self.disregarded = f"{checkpoint.said_in} says that weights are quantized, and none is packed"
        elif config and (blocks := fp8.blocks(config)):
            tensors, self.scaled = fp8.pair(checkpoint.tensors, blocks)
            self.checkpoint = replace(checkpoint, tensors=tensors)
        elif config:
            self.scheme = formats.detect(config)
            layout = _layout(checkpoint)
            if not self.packed_linears() or {layout, self.scheme.format} == {"gptq", "awq"}:
                raise self._other_layout(layout)
        elif layout := _layout(checkpoint):
            raise SourceError(
                f"the linears of {checkpoint.directory.name} are packed in {layout}'s layout, and neither "
                "config.json nor quantize_config.json says how.",
                "fetch the model again, with the file of those two that its maker wrote.",
            )

    def _other_layout(self, layout: str | None) -> SourceError:
        """The config says a layout, and the tensors are of another one."""
        assert self.scheme is not None
        said = f"{self.checkpoint.said_in} of {self.checkpoint.directory.name} says {self.scheme.format}"
        if self.packed_linears():
            said += f", but its tensors are shaped as {layout} packs them."
        else:
            said += f", but no tensor of it is called '*.{formats.suffixes(self.scheme)[0]}'."
        if layout == "gptq" and self.scheme.format.startswith("marlin"):
            hint = (
                "its tensors are GPTQ's, and GPTQModel names a kernel so: set its checkpoint_format to gptq."
            )
        elif layout:
            hint = f"make it say quant_method {layout}, with the bits and the group_size of its codes."
        else:
            hint = "they are packed in another layout; make the config say which."
        return SourceError(said, hint)

    def split(self, stacked: Callable[[str], Stacked | None]) -> None:
        """Take tensors that hold a weight of every expert for as many tensors, called as experts' own are.

        `stacked` says of a tensor by its name whether it is one. SourceError for one of another shape or in a
        type that is not read, and for what is stacked in fp8 and is of no experts.
        """
        stacks = {name: stack for name in self.checkpoint.tensors if (stack := stacked(name)) is not None}
        for name in self.scaled.keys() - stacks.keys():
            shape = self.checkpoint.tensors[name].shape
            if len(shape) > 2:
                raise SourceError(
                    f"{name} of shape {shape} is stored in fp8, and is no stack of experts.",
                    "start from the model it was made from.",
                )
        if not stacks:
            return
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.checkpoint.tensors.items():
            stack = stacks.get(name)
            if stack is None:
                tensors[name] = info
                continue
            if sorted(info.shape[1:]) != sorted(stack.shape):
                raise SourceError(
                    f"{name} has shape {info.shape}, its config.json means {(info.shape[0], *stack.shape)}.",
                    "the config.json may be of another model; fetch the model again.",
                )
            if info.code not in FLOATS and name not in self.scaled:
                raise SourceError(
                    f"{name} holds the weights of {info.shape[0]} experts as {info.code}; "
                    f"{', '.join(FLOATS)} are read.",
                    "start from a release of the model in 16 bits.",
                )
            of_all = self.scaled.pop(name, None)
            for one, own in _slices(name, info, stack, of_all):
                tensors[one.name] = one
                if own is not None:
                    self.scaled[one.name] = own
        self.checkpoint = replace(self.checkpoint, tensors=tensors)

    def rename(self, parameter: Callable[[str], str | None]) -> None:
        """Take every tensor for the parameter that it is by its name; files keep the name, as `on_disk` says.

        `parameter` gives None for what is none. SourceError when two are one parameter.
        """
        placed = {name: self._parameter(name, parameter) for name in sorted(self.checkpoint.tensors)}
        found = {name: full for name, (full, _) in placed.items()}
        if all(name == full == said for name, (full, said) in placed.items()):
            return
        twice = [full for full, count in Counter(found.values()).items() if count > 1]
        if twice:
            both = " and ".join(name for name, full in found.items() if full == twice[0])
            raise SourceError(
                f"{both} are both {twice[0]}.",
                "remove the one that does not count, and save the model again.",
            )
        for name, (full, said) in placed.items():
            if said != name:  # the files' own name is one that transformers knows
                self.renamed.pop(name, None)
            (module, _, suffix), (of, _, last) = said.rpartition("."), full.rpartition(".")
            if said != full:
                self._on_disk[full] = self._on_disk.pop(name, said)
            # what else is written of a module goes by its weight; a router may have a bias from elsewhere
            if (
                module != of
                and suffix == last
                and (suffix == "weight" or self.is_packed(name.rpartition(".")[0]))
            ):
                self._modules_on_disk[of] = self._modules_on_disk.pop(module, module)
        tensors = {found[name]: info for name, info in self.checkpoint.tensors.items()}
        self.scaled = {found[name]: scales for name, scales in self.scaled.items()}
        self.checkpoint = replace(self.checkpoint, tensors=tensors)

    def join(self, name: str, parts: Sequence[str], dim: int) -> None:
        """Let a parameter be known that is several tensors, one after another; files keep these."""
        self.joined[name] = (tuple(parts), dim)

    def _parameter(self, name: str, parameter: Callable[[str], str | None]) -> tuple[str, str]:
        """The parameter of a tensor, or what a packed linear's is called beside its weight; by what name."""
        module, _, suffix = name.rpartition(".")
        packed = self.is_packed(module) and suffix in self._suffixes(module)
        # by its full name, or as it is in the files, where parts of some models have names without a prefix
        for one in (name, self.checkpoint.tensors[name].name):
            found = parameter(f"{one.removesuffix(suffix)}weight" if packed else one)
            if found is not None:
                return f"{found.removesuffix('weight')}{suffix}" if packed else found, one
        return name, name

    def on_disk(self, name: str) -> str:
        """What a tensor is called in files: as in the source, or as what else is written of its module."""
        module, _, suffix = name.rpartition(".")
        known = self._modules_on_disk.get(module)
        return self._on_disk.get(name) or (f"{known}.{suffix}" if known else name)

    def __contains__(self, name: str) -> bool:
        known = name in self.checkpoint.tensors or name in self.joined
        return known or self.is_packed(name.removesuffix(".weight"))

    def is_packed(self, linear: str) -> bool:
        """Whether this linear is stored as integer codes."""
        return bool(self.scheme) and f"{linear}.{self._suffixes(linear)[0]}" in self.checkpoint.tensors

    def packed_linears(self) -> list[str]:
        """The linears stored as integer codes, in the order of the files."""
        modules = (name.rpartition(".") for name in self.checkpoint.tensors if self.scheme)
        return [linear for linear, _, suffix in modules if suffix == self._suffixes(linear)[0]]

    def sparse_linears(self, manifest: Mapping[str, Any] | None) -> list[str]:
        """The linears that are 2:4 by their layout, or if what their manifest claims is true."""
        claimed = {name for name, fate in manifests.fates(manifest).items() if fate.layout.sparse}
        if self.scheme is None:
            return [linear for linear in claimed if f"{linear}.weight" in self.checkpoint.tensors]
        if self.scheme.format == "marlin-24":
            return [
                linear for linear in self.packed_linears() if self.scheme_of(linear).format == "marlin-24"
            ]
        return [linear for linear in self.packed_linears() if linear in claimed]

    def scheme_of(self, linear: str) -> formats.Scheme:
        """How a packed linear is stored."""
        assert self.scheme is not None
        if linear not in self._schemes:
            own = self.scheme.of(linear)
            if own is self.scheme:  # its maker may have known the module by the name that it has in the files
                own = self.scheme.of(self._modules_on_disk.get(linear, linear))
            self._schemes[linear] = own
        return self._schemes[linear]

    def _suffixes(self, linear: str) -> tuple[str, ...]:
        """The suffixes that the tensors of a packed linear may have, that of its codes first."""
        return formats.suffixes(self.scheme_of(linear))

    def packed_names(self) -> set[str]:
        """The names of all tensors that make packed linears, without their biases."""
        return {
            f"{linear}.{suffix}"
            for linear in self.packed_linears()
            for suffix in self._suffixes(linear)
            if f"{linear}.{suffix}" in self.checkpoint.tensors
        }

    def quantized(self, linear: str, memory: Tensor | None = None) -> QuantizedLinear:
        """The codes and scales of a packed linear, without its bias; FormatError if they make no sense.

        The codes are put in `memory` (flat uint8), if that is given and large enough.
        """
        scheme, stored = self.scheme_of(linear), self.stored(linear)
        try:
            return formats.FORMATS[scheme.format].unpack(
                {suffix: self.checkpoint.read(name) for suffix, name in stored.items()}, scheme, memory
            )
        except FormatError as error:
            raise FormatError(f"{linear}: {error}.", error.hint) from error

    def check(self, linear: str, k: int, n: int) -> None:
        """SourceError when the tensors of a packed linear are not those of shape (k, n), by their headers."""
        codes = self._suffixes(linear)[0]
        infos = {suffix: self.checkpoint.tensors[name] for suffix, name in self.stored(linear).items()}
        for suffix, (dtype, shape) in formats.tensors(self.scheme_of(linear), k, n).items():
            if suffix not in infos and suffix != "g_idx":
                raise SourceError(
                    f"{linear}.{suffix} is not in {self.checkpoint.directory.name}.", "fetch the model again."
                )
            if suffix in infos and infos[suffix].shape != shape:
                raise SourceError(
                    f"{linear}.{suffix} has shape {infos[suffix].shape}, its config.json means {shape}.",
                    "the config.json may be of another model; fetch the model again.",
                )
            # what is beside codes and scales is read below
            types = SCALE_DTYPES if dtype.is_floating_point else (dtype,)
            if (dtype.is_floating_point or suffix == codes) and infos[suffix].dtype not in types:
                raise SourceError(
                    f"{linear}.{suffix} is stored as {infos[suffix].code}.", "fetch the model again."
                )

    def peculiarities(self, linear: str, k: int, n: int) -> Peculiarities:
        """What is special about a packed linear that should have shape (k, n); its codes are not read.

        SourceError when its tensors are not of that shape and type, FormatError when those beside the codes
        make no sense or float16 cannot hold its scales. Of files that are only looked at it is what the
        config claims.
        """
        self.check(linear, k, n)
        scheme, stored = self.scheme_of(linear), self.stored(linear)
        middle = 1 << (scheme.bits - 1)
        if self.checkpoint.only_looked_at:
            self.supposed = True
            return Peculiarities(scheme.symmetric, scheme.act_order, middle)
        codes = self._suffixes(linear)[0]
        small = {
            suffix: self.checkpoint.read(name)
            for suffix, name in stored.items()
            if suffix != codes and self.checkpoint.tensors[name].dtype != torch.float16
        }
        try:
            zeros, rows = formats.FORMATS[scheme.format].peculiarities(small, scheme, k, n)
            for tensor in small.values():
                if tensor.is_floating_point():
                    float16_scales(tensor)
        except FormatError as error:
            raise FormatError(f"{linear}: {error}.", error.hint) from error
        group_rows = k if scheme.group_size == -1 else scheme.group_size
        return Peculiarities(
            symmetric=zeros is None or bool((zeros == middle).all()),
            act_order=rows is not None and not torch.equal(rows.int(), contiguous_groups(k, group_rows)),
            least_zero=middle if zeros is None else int(zeros.min()),
        )

    def stored(self, linear: str) -> dict[str, str]:
        """The names of the tensors that make a packed linear, by suffix."""
        possible = {suffix: f"{linear}.{suffix}" for suffix in self._suffixes(linear)}
        return {suffix: name for suffix, name in possible.items() if name in self.checkpoint.tensors}

    def same(self, one: str, other: str) -> bool:
        """Whether two parameters have the same values in the model's own type; they are read once.

        Of files that are only looked at, the first values speak for all.
        """
        if self.checkpoint.only_looked_at:
            alike = torch.equal(self._first(one), self._first(other))
            self.supposed |= alike
            return alike
        if (one, other) not in self._same:
            a, b = (self.read(name).to(self.own_dtype) for name in (one, other))
            self._same[one, other] = torch.equal(a, b)
        return self._same[one, other]

    def _first(self, name: str) -> Tensor:
        """The first values of a parameter in the model's own type, (count,)."""
        info = self.checkpoint.tensors.get(name)
        if type(info) is not TensorInfo or name in self.scaled or name in self.joined:
            return self.read(name).to(self.own_dtype).flatten()[:LOOKED_AT]  # it is not stored as it is
        count = min(LOOKED_AT, math.prod(info.shape))
        first = replace(info, shape=(count,), end=info.start + count * info.dtype.itemsize)
        return first.read().to(self.own_dtype)

    def check_scales(self) -> None:
        """SourceError when scales of weights in fp8 are no scales; the weights are not read.

        Where files are still to come, each is checked with its weight.
        """
        for scales in self.scaled.values() if self.checkpoint.on_disk else ():
            fp8.read_scales(scales)

    @property
    def stored_in(self) -> str | None:
        """How weights are stored that are read as floats and are none: fp8 and what shares a scale, mxfp4."""
        kinds = sorted({str(scales) for scales in self.scaled.values()})
        return " and ".join([*kinds, *(["mxfp4"] if self.stored_in_mxfp4 else [])]) or None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter; what is packed is unpacked for it."""
        if name in self.checkpoint.tensors:
            return self.checkpoint.tensors[name].shape
        layer = self.quantized(name.removesuffix(".weight"))
        return (layer.n, layer.k)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter as it is stored; what is packed or scaled counts as the model's own type.

        SourceError when that is none of `FLOATS`, nor one of `INTEGERS` that is no weight and no bias.
        """
        if name not in self.checkpoint.tensors or name in self.scaled:
            return self.own_dtype
        info = self.checkpoint.tensors[name]
        if info.code not in FLOATS and not (info.code in INTEGERS and not name.endswith(OF_LINEARS)):
            raise SourceError(
                f"{name} is stored as {info.code}; {', '.join(FLOATS)} are read.",
                "save the model in one of these types with transformers.",
            )
        return info.dtype

    @property
    def own_dtype(self) -> torch.dtype:
        """The type that engines compute the model in: the config's or, where it names none, what is stored.

        That is the type of the largest weight stored as floats, which is the embedding. A model said to be
        float32 whose tensors take half of that is computed in their type. SourceError when it is none of
        `FLOATS`.
        """
        config = self.checkpoint.config
        name = str(config.get("dtype") or config.get("torch_dtype") or "auto").removeprefix("torch.")
        if name not in ("auto", "float16", "bfloat16", "float32"):
            raise SourceError(f"config.json says dtype {name!r}.", "float16, bfloat16 or float32 is meant.")
        if name in ("auto", "float32"):
            weights = [
                (info.end - info.start, name)
                for name, info in self.checkpoint.tensors.items()
                if name.endswith(".weight") and info.code in FLOATS
            ]
            return self.dtype(max(weights)[1]) if weights else torch.float16
        return getattr(torch, name)

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """A parameter as floats: as stored, dequantized to float32, or scaled in the model's own type.

        It goes to the device as it is stored, and becomes floats there; but for mxfp4.
        """
        if name in self.joined:
            parts, dim = self.joined[name]
            return torch.cat([self.read(part, device) for part in parts], dim)
        if name in self.scaled:
            return fp8.read(self.checkpoint.tensors[name], self.scaled[name], self.own_dtype, device)
        if name in self.checkpoint.tensors:
            self.dtype(name)  # it must be one that is read
            return self.checkpoint.read(name).to(device)
        linear = name.removesuffix(".weight")
        if not self.is_packed(linear):
            raise SourceError(f"{name} is not in {self.checkpoint.directory.name}.")
        return self.quantized(linear).to(device).dequantize(torch.float32)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, found without temporaries of its size."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _slices(
    name: str, info: TensorInfo, stack: Stacked, scales: fp8.Scales | None
) -> Iterator[tuple[TensorInfo, fp8.Scales | None]]:
    """What every expert has of a tensor that stacks it, and of its scales in fp8."""
    count, *stored = info.shape
    transposed = tuple(stored) != stack.shape or (stack.transposed and stored == stored[::-1])
    size = (info.end - info.start) // count
    parts = len(stack.roles)
    n, *k = stack.shape
    suffix = "weight" if k else "bias"
    experts = _experts(name, stack)
    for number in range(count):
        for place, role in enumerate(stack.roles):
            first = slice(place * n // parts, (place + 1) * n // parts)
            rows = slice(place, n, parts) if stack.interleaved else first
            called, shape = f"{experts}.{number}.{role}.{suffix}", (n // parts, *k)
            start, end = info.start + number * size, info.start + (number + 1) * size
            one: TensorInfo
            if isinstance(info, mxfp4.Stack):
                one = info.expert(called, number, rows)
            elif transposed or stack.interleaved:  # its rows lie apart: all are read, and these taken
                one = Slice(called, info.code, shape, info.file, start, end, tuple(stored), transposed, rows)
            else:
                start += place * size // parts
                one = TensorInfo(called, info.code, shape, info.file, start, start + size // parts)
            yield one, scales and scales.of_expert(number, transposed, range(n)[rows])


def _experts(name: str, stack: Stacked) -> str:
    """What the experts that a tensor stacks are called on disk, each with its number behind."""
    (around, _, last), (path, _, own) = name.rpartition("."), stack.path.rpartition(".")
    if last == own:
        return around
    around, _, role = around.rpartition(".")
    return f"{around}.experts" if role in stack.roles else path


def _is_dense(checkpoint: Checkpoint) -> bool:
    """Whether every weight is floats, whatever the config says."""
    return all(
        name.rpartition(".")[2] not in CODES
        and info.code not in fp8.CODES
        and (info.code in FLOATS or not name.endswith(".weight"))
        for name, info in checkpoint.tensors.items()
    )


def _layout(checkpoint: Checkpoint) -> str | None:
    """The format whose names and shapes the first packed linear has, whatever the config says."""
    for name, info in checkpoint.tensors.items():
        linear, _, suffix = name.rpartition(".")
        if suffix in CODES and suffix != "qweight":
            return CODES[suffix]
        if (
            suffix == "qweight"
            and (scales := checkpoint.tensors.get(f"{linear}.scales"))
            and info.shape
            and scales.shape
        ):
            # a word holds eight rows in GPTQ, eight columns in AWQ
            columns = {scales.shape[-1]: "gptq", scales.shape[-1] // 8: "awq"}
            return columns.get(info.shape[-1])
    return None


def _is_mlx(checkpoint: Checkpoint) -> bool:
    """Whether weights are words of codes, with scales and biases beside them."""
    return any(
        info.code == "U32" and f"{name.removesuffix('weight')}biases" in checkpoint.tensors
        for name, info in checkpoint.tensors.items()
    )
