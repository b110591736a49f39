# The course in a container. CI does not build this file.
#
# On a CPU, with a slim Python:
#   docker build -t minillm .
# On an NVIDIA GPU, with an image that brings its own torch (2.11 or newer), as in:
#   docker build -t minillm --build-arg BASE=pytorch/pytorch:2.12.0-cuda12.6-cudnn9-devel .
#
# Jupyter listens on the container's loopback and wants the token that it prints. To reach it from this machine, and
# from no other, say both halves yourself (for a GPU, also --gpus all):
#   docker run -it -p 127.0.0.1:8888:8888 minillm make lab LAB_ARGS="--no-browser --ip=0.0.0.0"

ARG BASE=python:3.12-slim

# The system's part, which .devcontainer takes too.
FROM ${BASE} AS machine
# Debian's and Ubuntu's Python comes without venv; the slim image's has it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git make \
        $(python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv) \
    && rm -rf /var/lib/apt/lists/*
# No user id is asked for: some bases have a user 1000 already.
RUN useradd --create-home --shell /bin/bash learner \
    && mkdir /course \
    && chown learner:learner /course
USER learner
WORKDIR /course

FROM machine AS course
COPY --chown=learner:learner . .
# A slim Python gets the CPU build of torch, gigabytes smaller than the one with CUDA.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python3 -m venv --system-site-packages .venv
# The torch and triton of the base are kept: they fit each other and its CUDA. .venv sees them, and their versions
# stand in for those of constraints.txt, so that pip has no reason to fetch others. A slim Python has none to keep.
RUN python3 -m pip list --format=freeze | grep -E '^(torch|triton)==' > .venv/kept.txt || true; \
    if [ -s .venv/kept.txt ]; then grep -vE '^(torch|triton)==' constraints.txt; else cat constraints.txt; fi \
        | cat .venv/kept.txt - > .venv/constraints.txt
# The second command writes the stamp of tools/setup_venv.py: make then finds .venv finished, and makes no other.
RUN .venv/bin/python -m pip install --no-cache-dir --no-compile \
        --constraint .venv/constraints.txt --editable ".[dev,grading,redis,peers]" \
    && .venv/bin/python -c 'from tools.setup_venv import STAMP, fingerprint; STAMP.write_text("\n".join(fingerprint()) + "\n")'
CMD ["make", "lab", "LAB_ARGS=--no-browser"]
