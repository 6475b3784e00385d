# The project with its environment, also for .devcontainer/. The image contains .git, which DVC needs.
#   docker build -t lm-repro . && docker run --rm -it lm-repro make
FROM python:3.11-slim

RUN apt-get update \
 && apt-get install -y --no-install-recommends git make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --shell /bin/bash lm \
 && install -d -o lm -g lm /home/lm/lm-repro
USER lm
WORKDIR /home/lm/lm-repro

# A layer of its own: it is built again only if the pinned versions or the Makefile change. Hashes are checked.
COPY --chown=lm:lm Makefile requirements.txt ./
RUN PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 make env
ENV PATH=/home/lm/lm-repro/.venv/bin:$PATH

COPY --chown=lm:lm . .
CMD ["bash"]
