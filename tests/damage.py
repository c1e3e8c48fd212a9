"""What can be wrong with the files of a checkpoint: edits that `dice`, a random.Random, chooses."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import note
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlin_convert.checkpoint.reader import DTYPES

# Strings in whose place something is written that json.dumps cannot write.
RAW = {
    "@deep 90": "[" * 90 + "]" * 90,
    "@deep 300": '{"a":' * 300 + "0" + "}" * 300,
    "@deep 900": "[" * 900 + "]" * 900,
    "@deep 100000": "[" * 100_000 + "]" * 100_000,
    "@digits 4000": "9" * 4000,
    "@digits 5000": "9" * 5000,
    "@infinite": "1e999",
    "@constant": "NaN",
    "@wrong": "01",
}
NUMBERS = [
    *(0, 1, 2, 3, 4, 8, 16, 31, 32, 64, 127, 128, 255, 256, 4096, 65535, 2**31 - 1, 2**31, 2**32, 2**40),
    *(2**53, 2**59, 2**60, 2**63 - 1, 2**63, 2**64, 2**64 + 4, 10**30, 10**400, 0.5, 1.0, 4.0, 128.0),
    *(1e-8, 70000.0, 1e30, 1e308, float("nan"), float("inf")),
]
TEXTS = [
    *("", " ", "\0", "a\nb", "\x1b[2J", "\ud800", "é", "x" * 5000, ".", "..", "../outside/new", "/", "a\\b"),
    *str.split(
        "outside 4 -1 nan None True {} model.safetensors ../model/model.safetensors sdpa default yarn"
    ),
    *str.split(
        "gptq gptq_v2 marlin marlin_24 marlin-24 awq compressed-tensors gemm gemv pack-quantized dense group"
    ),
    *("channel", "auto"),
    *str.split(
        "static int float float16 bfloat16 float32 float64 int8 torch.float16 llama qwen3 gemma2 phi3"
    ),
    *DTYPES,
]
KEYS = str.split("""
    bits w_bit group_size q_group_size quant_method method sym desc_act dynamic zero_point version rotation
    checkpoint_format format is_marlin_format modules_to_not_convert config_groups weights strategy symmetric
    actorder num_bits ignore type sparsity_config kv_cache_scheme quantization_status quantization_config
    num_labels num_hidden_layers auto_map rope_parameters rope_scaling rope_theta factor layer_types dtype
    torch_dtype head_dim pad_token_id tie_word_embeddings max_position_embeddings vocab_size num_experts
    text_config __metadata__ weight_map files linears dense recipe source tool calibration rounded_to_nearest
    passed checks size sha256 shape sparsity unpruned
""")
BOMBS = [
    [f"a0: &a0 {first}", *(f"a{i}: &a{i} {line.format(', '.join(8 * [f'*a{i - 1}']))}" for i in range(1, 12))]
    for first, line in (("lol", "[{}]"), ("{a: 1}", "{{<<: [{}]}}"))
]
YAML = [
    *("!!int x", "!!bool maybe", "!!timestamp x", "!!python/name:os.system", "!!set {a}", "! x", "%YAML 9.9"),
    *("*absent", "&a [*a]", "&a {b: *a}", "? [a]", "2001-13-45", "2001-12-14t21:59:43.10-05:00", "\t"),
    *str.split("0x_ 0b_ 1:99 -.inf .nan 1_000 0o17 ~ = | > << ' --- ... @ #"),
    *("0x" + 5000 * "f", "[" * 5000, "{a: " * 5000, "- " * 5000, *map("\n".join, BOMBS)),
]
TORCH_DTYPES = [getattr(torch, name) for code, (name, _) in DTYPES.items() if code != "F8_E8M0"]


class _Key(str):
    """A key that a dict can hold more than once."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def json_text(dice: random.Random, text: bytes) -> bytes:
    """JSON with a few edits of keys and values at any depth."""
    value = json.loads(text)
    for _ in range(dice.choice([1, 1, 2, 3])):
        value = _edit(dice, value)
    return as_text(value)


def as_text(value: Any) -> bytes:
    """JSON text of a value, with what stands for what JSON cannot say."""
    text = json.dumps(value)
    for word, raw in RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text.encode()


def odd(dice: random.Random) -> Any:
    """A value that was not meant."""
    kind = dice.randrange(8)
    if kind < 3:
        number = dice.choice(NUMBERS)
        return -number if dice.randrange(3) == 0 else number
    if kind < 5:
        return dice.choice(TEXTS)
    if kind == 5:
        return dice.choice(list(RAW))
    if kind == 6:
        return dice.choice([None, True, False])
    return dice.choice([[], {}, [[]], [None], [0], ["a"], {"a": {}}, {"": []}, [1, 2, 3], [{}]])


def _edit(dice: random.Random, value: Any) -> Any:
    """The value, a dict or list, with one thing inside it changed, or something else instead."""
    if not isinstance(value, dict | list) or dice.randrange(60) == 0:
        return odd(dice)
    inside, key = _place(dice, value)
    if key is None:
        if isinstance(inside, dict):
            inside[dice.choice(KEYS)] = odd(dice)
        else:
            inside.append(odd(dice))
        return value
    kind = dice.randrange(12)
    _, other_key = other = _place(dice, value)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[_Key(key)] = odd(dice) if dice.randrange(2) else inside[key]
    elif kind == 2 and isinstance(inside, dict):
        inside[_Key(dice.choice(TEXTS + KEYS + list(inside)))] = inside.pop(key)
    elif kind == 3 and isinstance(inside, list):
        inside.insert(key, inside[key])
    elif kind == 4 and other_key is not None:
        # as text, so that nothing holds itself
        inside[key] = json.loads(json.dumps(other[0][other_key]))
    elif kind == 5:
        inside[key] = [inside[key]] if dice.randrange(2) else {"a": inside[key]}
    elif kind < 9:
        inside[key] = _beside(dice, inside[key])
    else:
        inside[key] = odd(dice)
    return value


def _place(dice: random.Random, value: dict | list) -> tuple[Any, Any]:
    """Some dict or list inside `value` and a key of it; None when a new one is meant."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys or dice.randrange(12) == 0:
            return value, None
        deep = [key for key in keys if isinstance(value[key], dict | list)]
        key = dice.choice(deep if deep and dice.randrange(2) else keys)
        if not isinstance(value[key], dict | list) or dice.randrange(6) == 0:
            return value, key
        value = value[key]


def _beside(dice: random.Random, value: Any) -> Any:
    """A value near this one, or the same in another type."""
    if isinstance(value, bool | None):
        return dice.choice([0, 1, "true", not value])
    if isinstance(value, int | float):
        whole = float(value) if abs(value) < 2**53 else value
        return dice.choice([value + 1, value - 1, value + 8, 2 * value, -value, whole, str(value)])
    if isinstance(value, str):
        return dice.choice(
            [value[:-1], value + "x", value.upper(), value + "\0", f"../{value}", value + "/."]
        )
    return odd(dice)


def yaml_text(dice: random.Random, text: str) -> bytes:
    """A recipe with values and lines that were not meant."""
    lines = text.splitlines()
    for _ in range(dice.choice([1, 1, 2, 3])):
        at = dice.randrange(len(lines) + 1)
        value = dice.choice([*YAML, as_text(odd(dice)).decode()])
        name = dice.choice(re.findall(r"^\w+", text, re.MULTILINE))
        lines[at : at + dice.randrange(3)] = [dice.choice([f"{name}: {value}", f"{name}: [{value}]", value])]
    return "\n".join(lines).encode(errors="replace")


def data(dice: random.Random, content: bytes) -> bytes:
    """A file with a few bytes changed, cut, added or repeated, mostly near its beginning."""
    content = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at = dice.randrange(min(len(content), dice.choice([12, 300, 5000, 1 << 30])) + 1)
        length = dice.choice([1, 1, 2, 8, 100])
        kind = dice.randrange(8)
        if kind < 3 and at < len(content):
            content[at] ^= 1 << dice.randrange(8)
        elif kind == 3 and at < len(content):
            content[at] = dice.choice(b' "0123456789[]{},:-eaF\\\x00\x7f\x80\xff')
        elif kind == 4:
            del content[at : at + length if dice.randrange(2) else None]
        elif kind == 5:
            content[at:at] = dice.choice([b"\0", b"0", b"9", b"[", b"{", b'"', b"\xff\xfe", b" "]) * length
        elif kind == 6:
            content[at:at] = content[at : at + length]
        else:
            content[at : at + length] = bytes(dice.randrange(256) for _ in range(length))
    return bytes(content)


def header(dice: random.Random, content: bytes) -> bytes:
    """A safetensors file with edits of its JSON, or a length that lies."""
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length]
    if dice.randrange(8) == 0:
        lies = [0, 1, max(length - 1, 0), length + 1, len(content), 2**31, 2**63, 2**64 - 1]
        length = min(dice.choice(lies), 2**64 - 1)
    else:
        text = json_text(dice, text)
        length = len(text)
    return length.to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def tensors(dice: random.Random, path: Path) -> None:
    """Change the tensors of a valid file, which stays a valid file."""
    found = load_file(path)
    for _ in range(dice.choice([1, 1, 2, 4])):
        if found:
            _edit_tensors(dice, found)
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, path, {"format": "pt"})


def _edit_tensors(dice: random.Random, found: dict[str, Tensor]) -> None:
    name = dice.choice(list(found))
    other = dice.choice(list(found))
    linear, _, suffix = name.rpartition(".")
    kind = dice.randrange(9)
    if kind == 0:
        del found[name]
    elif kind == 1:
        found[other] = found[name]
    elif kind == 2:
        suffixes = (
            "weight",
            "bias",
            "g_idx",
            "qzeros",
            "weight_g_idx",
            "weight_zero_point",
            "scales",
            suffix[:1],
        )
        found[f"{dice.choice([linear, other, other.rpartition('.')[0]])}.{dice.choice(suffixes)}"] = found[
            name
        ]
    elif kind == 3:
        found[name], found[other] = found[other], found[name]
    elif kind < 6:
        found[name] = _reshaped(dice, found[name])
    else:
        found[name] = _revalued(dice, found[name])
    note(f"tensors, kind {kind}: {name} {other}")


def _reshaped(dice: random.Random, tensor: Tensor) -> Tensor:
    """The same values or bytes in another type or shape."""
    shapes: list[Callable[[Tensor], Tensor]] = [
        lambda tensor: tensor.mT if tensor.dim() > 1 else tensor,
        lambda tensor: tensor.flatten(),
        lambda tensor: tensor[None],
        lambda tensor: tensor[:-1] if tensor.dim() else tensor,
        lambda tensor: tensor[:0] if tensor.dim() else tensor,
        lambda tensor: tensor.flatten()[:1].reshape(()) if tensor.numel() else tensor,
        lambda tensor: tensor[..., :-8] if tensor.dim() else tensor,
        lambda tensor: torch.cat((tensor, tensor)) if tensor.dim() else tensor,
        lambda tensor: tensor.reshape(-1, 2) if not tensor.numel() % 2 else tensor,
    ]
    dtype = dice.choice(TORCH_DTYPES)
    kind = dice.randrange(3)
    if kind == 0:
        return dice.choice(shapes)(tensor)
    if kind == 1:
        return tensor.to(dtype)
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return raw[: len(raw) // 16 * 16].view(dtype)


def _revalued(dice: random.Random, tensor: Tensor) -> Tensor:
    """Other values in the same type and shape."""
    tensor = tensor.contiguous().clone()
    flat = tensor.view(-1)
    kind = dice.randrange(4)
    if not len(flat) or kind == 0:
        return tensor[list(range(len(tensor)))[::-1]] if tensor.dim() else tensor
    if kind == 1:
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(dice.randrange(100)))
        return flat[order].reshape(tensor.shape)
    numbers = [0, 1, -1, 3, 8, 127, 1000, -(2**31), 2**31 - 1, 0x77777777]
    if tensor.is_floating_point():
        numbers += [6e-8, 70000.0, 1e30, float("nan"), float("inf"), -float("inf")]
    number = dice.choice(numbers)
    at = dice.randrange(len(flat))
    if dice.randrange(4) == 0:
        number = flat[at].item() + dice.choice([-1, 1])
    flat[slice(None) if kind == 2 else at] = torch.tensor(number).to(tensor.dtype)
    return tensor


def directory(dice: random.Random, home: Path) -> None:
    """A file gone, or something else in its place, or one too many."""
    path = dice.choice(sorted(home.iterdir()))
    name = path.name
    kind = 3 + dice.randrange(4) if name.endswith(".tmp") else dice.randrange(7)
    note(f"files, kind {kind}: {name}")
    if kind == 0:
        names = [
            b"license\xff",
            b"tokenizer\n.json",
            b"a.safetensors",
            b"quantize_config.json",
            b"vocab.json",
        ]
        Path(os.fsdecode(os.fsencode(home) + b"/" + dice.choice(names))).write_bytes(b"{}")
    elif kind == 1:
        path.rename(path.with_name(dice.choice(["x", "x.json", "x.safetensors", "quant_config.json"])))
    elif kind == 2:
        (home / f"{name[:50]}.tmp").symlink_to("../outside/secret")
    elif not path.is_dir():
        path.unlink()
        if kind == 3:
            path.mkdir()
        elif kind == 4:
            os.mkfifo(path)
        elif kind == 5:
            path.symlink_to(dice.choice(["../outside/secret", name, "nowhere", "config.json", "."]))
