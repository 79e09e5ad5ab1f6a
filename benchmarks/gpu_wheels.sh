#!/bin/sh
# Fetches, on a machine with a network, what `make gpu-check` needs beside torch, transformers,
# safetensors, tokenizers and typer:
#     benchmarks/gpu_wheels.sh DIR [PYTHON_VERSION]
# PYTHON_VERSION, such as 3.12, is that of the machine with the GPU, if it is another.
set -eu
folder=${1:?usage: benchmarks/gpu_wheels.sh DIR [PYTHON_VERSION]}
for_version=
if [ -n "${2:-}" ]; then
    for_version="--python-version $2 --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64"
fi
# shellcheck disable=SC2086  # several words, or none
exec "${PYTHON:-python3}" -m pip --disable-pip-version-check download \
    --only-binary :all: --dest "$folder" $for_version pydantic rich jinja2 llguidance
