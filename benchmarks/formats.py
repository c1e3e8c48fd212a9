"""Pack and unpack of every format at one layer shape, beside memcpy in the same run.

    python benchmarks/formats.py [--inputs 4096] [--outputs 14336] [--threads 2] [--repeats 15]

GB/s counts codes, one byte each; every time includes the allocation of its result. The chain is GPTQ words to
codes to MARLIN words to codes, and both sets of codes compared.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from marlin_convert.formats import FORMATS, Scheme, awq
from marlin_convert.quantized import QuantizedLinear, same_codes

GROUP_SIZE = 128


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest of repeats runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def layer(k: int, n: int, bits: int, zeros: bool, sparse: bool = False) -> QuantizedLinear:
    """A random layer in groups of 128 rows, with or without zero points, all or half of it left."""
    shape = (k // GROUP_SIZE, n)
    codes = torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8)
    if sparse:
        codes.view(-1, 4, n).scatter_(1, torch.rand(k // 4, 4, n).argsort(1)[:, :2], 8)
    return QuantizedLinear(
        codes,
        torch.rand(shape).half() + 0.125,
        GROUP_SIZE,
        bits,
        torch.randint(1, 1 << bits, shape, dtype=torch.uint8) if zeros else None,
    )


def chain(tensors: dict[str, torch.Tensor]) -> None:
    """GPTQ words to codes to MARLIN words to codes: the same codes, or AssertionError."""
    read = FORMATS["gptq"].unpack(tensors, Scheme("gptq", 4, GROUP_SIZE))
    back = FORMATS["marlin"].unpack(FORMATS["marlin"].pack(read), Scheme("marlin", 4, GROUP_SIZE))
    assert same_codes(read.codes, back.codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=14336)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    k, n = options.inputs, options.outputs

    def row(name: str, *runs: Callable[[], object] | None) -> None:
        rates = ["-" if run is None else f"{k * n / 1e9 / seconds(run, options.repeats):.2f}" for run in runs]
        print(f"| {name:<38} | " + " | ".join(f"{rate:>6}" for rate in rates) + " |", flush=True)

    print(f"{k} x {n} codes, groups of {GROUP_SIZE}, torch {torch.__version__}, {options.threads} threads\n")
    print(f"| {'GB/s of codes':<38} | {'pack':>6} | {'unpack':>6} |\n|{'-' * 40}|{'-' * 8}|{'-' * 8}|")
    for name, bits, zeros in (
        ("marlin", 4, False),
        ("marlin-24", 4, False),
        ("gptq", 4, False),
        ("gptq", 4, True),
        ("gptq", 8, False),
        ("compressed-tensors", 4, False),
        ("compressed-tensors", 4, True),
        ("compressed-tensors", 8, False),
    ):
        module, q = FORMATS[name], layer(k, n, bits, zeros, sparse=name == "marlin-24")
        packed, scheme = module.pack(q), Scheme(name, bits, GROUP_SIZE, not zeros)
        row(
            f"{name} {bits}-bit{', zero points' if zeros else ''}",
            partial(module.pack, q),
            partial(module.unpack, packed, scheme),
        )
    q = layer(k, n, 4, False)
    gptq = FORMATS["gptq"].pack(q)
    words = {
        "qweight": gptq["qweight"].view(k, n // 8),
        "qzeros": gptq["qzeros"],
        "scales": gptq["scales"],
    }
    row("awq 4-bit", None, lambda: awq.unpack(words, Scheme("awq", 4, GROUP_SIZE, symmetric=False)))
    print(f"\n| {'GB/s of codes':<38} | {'':>6} |\n|{'-' * 40}|{'-' * 8}|")
    row("chain gptq -> marlin -> codes, equal", lambda: chain(gptq))
    row("quads counted", lambda: q.quad_weights())
    copy = torch.empty_like(q.codes)
    row("memcpy, into memory in use", lambda: copy.copy_(q.codes))
    row("memcpy, into fresh memory", lambda: q.codes.clone())


if __name__ == "__main__":
    main()
