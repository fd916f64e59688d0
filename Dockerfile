# The pipeline on an NVIDIA GPU. The drivers are the host's; torch brings its own CUDA libraries.
#
#   docker build --tag cdm .
#   docker run --gpus all --rm -it --user "$(id -u):$(id -g)" --volume "$PWD":/work cdm dvc repro
#
# The repository is mounted, not copied, so that results, DVC's cache and Git stay on the host.
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/cdm
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY cdm cdm
RUN pip install --no-cache-dir --constraint constraints.txt '.[states,parquet]'

# Folders that any user may write: caches of models and of compiled code, and settings of Git for the mounted folder.
ENV HOME=/home/cdm
RUN mkdir --mode=1777 /home/cdm && git config --system --add safe.directory /work

WORKDIR /work
# The mounted library before the installed one, so that what runs is what Git has.
ENV PYTHONPATH=/work GOMP_SPINCOUNT=20000 TRANSFORMERS_VERBOSITY=error
CMD ["bash"]
