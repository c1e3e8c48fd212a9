"""Tokens of an 8B model one after another: fp16 against our dense and 2:4 kernels.

usage: python benchmarks/decode.py WORKDIR [--steps make,quantize,decode] [--modes plain,compiled]
                                   [--batches 1,16,64]

WORKDIR gets a random model of Llama-3-8B's shape (16 GB), its MARLIN and Sparse-MARLIN checkpoints by our
`quantize` (10 GB), and decode.json, which is written after every cell; later runs add to it.

Decode: transformers' model, with q/k/v and gate/up fused as engines do, in all variants alike; a static
cache, 64 random tokens, then 64 replays of a CUDA graph of one step, of the operations as they come (plain)
or of what torch.compile makes of them. The bound is Amdahl's: the fp16 step with its linears, which are timed
in a graph of their own, exchanged for those of the variant. On a CPU it can be tried, in proportion:
`--layers 2 --width 256 --batches 1,2`.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils.logging import disable_progress_bar

from marlin_convert.bench.timing import capture
from marlin_convert.checkpoint.writer import write_json
from marlin_convert.kernels.matmul import MarlinLinear, PackedLinear

HERE = Path(__file__).resolve().parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
QUANTIZED = {"dense": [], "sparse": ["--sparsity", "2:4"]}  # and the options of `quantize`
VARIANTS = ("fp16", *QUANTIZED)
PROMPT, DECODED = 64, 64
REPEATS = 5

# Largest relative error of a step's logits, in the 2-norm, from those of a forward without a cache.
LARGEST_ERROR = 5e-2

# What kernels do, by parts of their names; the first that fits. The rest is norms and other small work.
KINDS = {
    "small": ("triton_",),  # named after all that is near them
    "linears": ("marlin_",),
    "attention": ("fmha", "flash", "sdpa", "softmax"),
    "cublas": ("gemm", "gemv", "nvjet", "cutlass", "splitk"),
}


def make(directory: Path, layers: int, width: int) -> None:
    """A random float16 model of Llama-3-8B's proportions, with a small vocabulary's tokenizer."""
    heads = width // 128
    config = LlamaConfig(
        vocab_size=128256 * width // 4096,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="float16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with DEVICE:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(HERE.parent / "examples" / "tinypy-4m").save_pretrained(directory)


def quantize(source: Path, output: Path, options: list[str]) -> None:
    """The whole command, as a user runs it, on little text: the weights are random anyway."""
    command = [sys.executable, "-m", "marlin_convert", "quantize", str(source), "-o", str(output), "-q"]
    command += ["--samples", "16", "--sequence-length", "512", *options]
    subprocess.run(command, check=True, cwd=HERE.parent)


def join(*linears: nn.Module) -> nn.Module:
    """One linear with the outputs of several, one after the other.

    In both layouts 64 outputs are a block of columns, so packed ones are put side by side as they are.
    """
    first = linears[0]
    if not isinstance(first, PackedLinear):
        joined = nn.Linear(1, 1, bias=False)
        joined.weight = nn.Parameter(torch.cat([one.weight for one in linears]), requires_grad=False)
        return joined
    buffers = [[one.get_buffer(suffix) for one in linears] for suffix, _ in first.named_buffers()]
    return type(first)(*(torch.cat(parts, 1) for parts in buffers))


def check_join(*linears: nn.Module) -> None:
    """AssertionError when what join() makes holds other weights than the linears it is made of."""
    if isinstance(linears[0], PackedLinear):
        joined, *weights = [weight(one) for one in (join(*linears), *linears)]
        assert torch.equal(joined, torch.cat(weights))


def weight(linear: nn.Module) -> Tensor:
    """The weight (n, k) that a packed linear holds."""
    B, meta = (linear.B, None) if isinstance(linear, MarlinLinear) else (linear.B_24, linear.B_meta)
    return torch.ops.marlin_convert.weight(B, linear.s, meta, torch.float16)


class Attention(nn.Module):
    """LlamaAttention with one linear for queries, keys and values, and no copies of keys that are shared."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.layer_idx, self.width = old.layer_idx, old.head_dim
        projections = (old.q_proj, old.k_proj, old.v_proj)
        self.qkv, self.o = join(*projections), join(old.o_proj)
        key_heads = old.config.num_key_value_heads
        self.heads = [old.config.num_attention_heads, key_heads, key_heads]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: StaticCache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        batch, length, _hidden = hidden_states.shape
        heads = self.qkv(hidden_states).view(batch, length, -1, self.width).transpose(1, 2)
        query, key, value = heads.split(self.heads, dim=1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        keys, values = key, value
        if past_key_values is not None:
            keys, values = past_key_values.update(key, value, self.layer_idx)
        if length == 1:  # queries that share their keys are rows of one product
            rows = query.reshape(batch, self.heads[1], -1, self.width)
            y = scaled_dot_product_attention(rows, keys, values, attn_mask=attention_mask)
        else:  # the prompt, into an empty cache
            y = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2)
        return self.o(y.reshape(batch, length, -1)), None


class MLP(nn.Module):
    """LlamaMLP with one linear for gate and up."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.gate_up, self.down = join(old.gate_proj, old.up_proj), join(old.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


def load_fused(directory: Path) -> nn.Module:
    """The model with fused linears, checked on the first layer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(DEVICE).eval()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    check_join(attention.q_proj, attention.k_proj, attention.v_proj)
    check_join(mlp.gate_proj, mlp.up_proj)
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = Attention(layer.self_attn), MLP(layer.mlp)
    return model


def wait() -> None:
    """Until the GPU has nothing left to do."""
    if CUDA:
        torch.cuda.synchronize()


def release() -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Seconds a call, of so many one after the other."""
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - begin) / times


def recorded(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a call; without a GPU the call."""
    return capture([call]).replay if CUDA else call


def linears_ms(model: nn.Module, batch: int) -> float:
    """Milliseconds of all linears of the blocks, in a graph of nothing else."""
    config = model.config
    hidden, inner = (
        torch.randn(batch, 1, size, dtype=torch.float16, device=DEVICE)
        for size in (config.hidden_size, config.intermediate_size)
    )

    def run() -> None:
        for layer in model.model.layers:
            layer.self_attn.qkv(hidden)
            layer.self_attn.o(hidden)
            layer.mlp.gate_up(hidden)
            layer.mlp.down(inner)

    graph = recorded(run)
    graph()
    return 1e3 * statistics.median(seconds(graph, 10) for _ in range(REPEATS))


def step(model: nn.Module, cache: StaticCache, ids: Tensor) -> Tensor:
    """The logits after ids (batch, 1), which become the most likely next ones."""
    logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
    ids.copy_(logits.argmax(-1, keepdim=True))
    return logits


class Decoding:
    """A prompt in a static cache, and the recorded step that adds a token to it."""

    def __init__(self, model: nn.Module, batch: int, mode: str):
        """AssertionError when the logits of a step are not those of a forward without a cache."""
        draw = torch.Generator().manual_seed(0)
        prompt = torch.randint(model.config.vocab_size, (batch, PROMPT), generator=draw).to(DEVICE)
        self._cache = StaticCache(config=model.config, max_cache_len=PROMPT + DECODED)
        logits = model(prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self._first = logits.argmax(-1, keepdim=True)
        self._ids = self._first.clone()
        one = torch.compile(step, fullgraph=True, dynamic=False) if mode == "compiled" else step
        call = partial(one, model, self._cache, self._ids)
        logits = call()
        expected = self._ids.clone()
        whole = model(torch.cat([prompt, self._first], 1), use_cache=False, logits_to_keep=1).logits[:, -1]
        norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
        self.error = (norm(logits - whole) / norm(whole)).item()
        assert self.error <= LARGEST_ERROR, f"logits are {self.error:.1e} off"
        self.step = recorded(call)
        self.rewind()
        self.step()
        self.same_tokens = (self._ids == expected).float().mean().item()

    def rewind(self) -> None:
        """Back to where the prompt ends."""
        self._ids.copy_(self._first)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def ms(self) -> float:
        """Milliseconds a step."""
        found = []
        for _ in range(REPEATS):
            self.rewind()
            found.append(1e3 * seconds(self.step, DECODED))
        return statistics.median(found)

    def parts(self, steps: int = 4) -> dict[str, Any]:
        """Where the time of a step goes; nothing where the profiler sees no kernels."""
        self.rewind()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            seconds(self.step, steps)
        events = [
            (one.time_range.start, one.time_range.end, one.name)
            for one in profiler.events()
            if one.device_type == torch.autograd.DeviceType.CUDA
        ]
        return parts(events, steps) if events else {}


def parts(events: list[tuple[float, float, str]], steps: int) -> dict[str, Any]:
    """Microseconds of a step by what it does, launches, and the kernels that take longest.

    `events` are begin, end and name of the kernels of so many steps. One counts from where the one before
    ends: ours may begin to load their weights earlier.
    """
    kinds: dict[str, list[float]] = defaultdict(list)
    kernels: dict[str, list[float]] = defaultdict(list)
    events = sorted(events)
    free = begin = events[0][0]
    for start, end, name in events:
        us = max(0.0, end - max(free, start))
        free = max(free, end)
        known = (kind for kind, words in KINDS.items() if any(word in name.lower() for word in words))
        kinds[next(known, "small")].append(us)
        kernels[name].append(us)
    # the head is by far the largest product that cuBLAS makes; the others are the linears of fp16
    products = sorted(kinds.pop("cublas", []))
    kinds["linears"] += products[:-steps]
    kinds["lm_head"] = products[-steps:]
    us_of = {kind: sum(found) / steps for kind, found in sorted(kinds.items())}
    us_of["gaps"] = (free - begin) / steps - sum(us_of.values())
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:16]
    return {
        "us": us_of,
        "launches": len(events) / steps,
        "kernels": [
            {"name": name[:120], "us": sum(us) / steps, "launches": len(us) / steps} for name, us in longest
        ],
    }


def decode(
    work: Path, modes: list[str], batches: list[int], found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measure every variant, batch and mode."""
    for variant in VARIANTS:
        model = load_fused(work / variant)
        for batch, mode in product(batches, modes):
            torch.compiler.reset()
            begin = time.perf_counter()
            decoding = Decoding(model, batch, mode)
            cell = {
                "prepared_s": time.perf_counter() - begin,
                "error": decoding.error,
                "same_tokens": decoding.same_tokens,
                "ms": decoding.ms(),
                "linears_ms": linears_ms(model, batch),
                **(decoding.parts() if CUDA else {}),
            }
            found.setdefault(mode, {}).setdefault(str(batch), {})[variant] = cell
            save()
            print(f"{mode}, {variant}, batch {batch}: {cell['ms']:.3f} ms", flush=True)
            del decoding
            release()
        del model
        release()


def show(found: dict[str, Any]) -> None:
    """For every mode a table, and where the time of each cell goes."""
    for mode, batches in found.items():
        print(f"\n{mode:6}{'batch':>6} {'ms':>8} {'linears':>8} {'speed-up':>9} {'bound':>6} {'of it':>6}")
        for batch, cells in batches.items():
            base = cells["fp16"]
            for variant, cell in cells.items():
                speedup = base["ms"] / cell["ms"]
                bound = base["ms"] / (base["ms"] - base["linears_ms"] + cell["linears_ms"])
                print(
                    f"{variant:8}{batch:>4} {cell['ms']:8.3f} {cell['linears_ms']:8.3f} {speedup:8.2f}x "
                    f"{bound:5.2f}x {speedup / bound:6.1%}"
                )
                if "us" in cell:
                    us = ", ".join(f"{kind} {us:.0f}" for kind, us in cell["us"].items())
                    print(f"{'':13}us: {us}; {cell['launches']:.0f} launches")


@torch.no_grad()
def main() -> None:
    """Run the steps and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", default="make,quantize,decode")
    parser.add_argument("--modes", default="plain,compiled")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    chosen = parser.parse_args()
    disable_progress_bar()
    steps, work = chosen.steps.split(","), chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = work / "decode.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    found["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    save = partial(write_json, results, found)
    print(found["device"], "torch", torch.__version__, flush=True)
    if "make" in steps:
        found["make_s"] = seconds(partial(make, work / "fp16", chosen.layers, chosen.width))
        save()
        release()
        print(f"fp16 made: {found['make_s']:.1f} s", flush=True)
    if "quantize" in steps:
        for variant, options in QUANTIZED.items():
            took = seconds(partial(quantize, work / "fp16", work / variant, options))
            found.setdefault("quantize_s", {})[variant] = took
            save()
            print(f"{variant} quantized: {took:.1f} s", flush=True)
    if "decode" in steps:
        batches = [int(batch) for batch in chosen.batches.split(",")]
        decode(work, chosen.modes.split(","), batches, found.setdefault("decode", {}), save)
        show(found["decode"])


if __name__ == "__main__":
    main()
