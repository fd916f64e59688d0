# The environment of the pipeline for NVIDIA GPUs, with the pinned packages. The repository itself comes in as a volume,
# because DVC keeps results in it:
#
#   docker build --build-arg UID="$(id -u)" --tag cdm .
#   docker run --rm --interactive --tty --gpus all --ipc host --volume "$PWD":/cdm cdm dvc repro
#
# Teachers of a hub are downloaded once where its cache is kept, too:
# --volume "$HOME/.cache/huggingface":/home/cdm/.cache/huggingface
# torch's wheel brings CUDA's libraries; the base image tells the container runtime which driver it needs.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Nothing runs as root. What it writes belongs to this user: give the number of your own.
ARG UID=1000
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "${UID}" cdm \
    && install --directory --owner cdm /cdm /opt/cdm
USER ${UID}
WORKDIR /cdm

# Where torch comes from, as for `make`: https://download.pytorch.org/whl/cpu is without CUDA.
ARG TORCH_INDEX=
ENV PATH=/opt/cdm/bin:$PATH
COPY --chown=cdm pyproject.toml constraints.txt README.md LICENSE ./
# The package is installed from the folder that the volume covers, so its code needs no new image.
RUN mkdir cdm && touch cdm/__init__.py \
    && python3 -m venv /opt/cdm \
    && if [ -n "${TORCH_INDEX}" ]; then \
        pip install --no-cache-dir --no-compile --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"; \
    fi \
    && pip install --no-cache-dir --no-compile --constraint constraints.txt --editable .
COPY --chown=cdm . .

CMD ["cdm", "--help"]
