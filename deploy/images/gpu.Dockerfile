# Workers on GPU nodes: rollout, reward, trainer, and `duet` for probes and draining.
#
#   BASE   docker.io/nvidia/cuda, 13.0, `base` on Ubuntu 24.04 (CPython 3.12), by digest
#   RUST   docker.io/library/rust, 1.90 or newer on Debian 12, by digest
#
# deploy/images/build.sh gives both and refuses tags.
ARG BASE
ARG RUST

# libtorch 2.11.0+cu130 with its CUDA libraries, each wheel by hash.
FROM ${BASE} AS torch
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY deploy/images/torch-cu130.txt /tmp/torch-cu130.txt
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --no-deps --no-compile --require-hashes \
      --target /opt/torch -r /tmp/torch-cu130.txt

# Linked against the very libtorch that it will run with; the run path is /opt/torch/torch/lib.
FROM ${RUST} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends cmake g++ \
 && rm -rf /var/lib/apt/lists/*
COPY --from=torch /opt/torch /opt/torch
WORKDIR /src
COPY . .
ENV LIBTORCH=/opt/torch/torch
ARG STORES=duet-store/s3,duet-store/gcs,duet-store/azure
RUN cargo build --release --locked --features "${STORES}" \
      -p duet-rollout-worker -p duet-reward-worker -p duet-trainer -p duet-cli \
 && install -D -t /out/bin target/release/duet target/release/duet-rollout-worker \
      target/release/duet-reward-worker target/release/duet-trainer

FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libgomp1 libstdc++6 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 65532 duet \
 && useradd --uid 65532 --gid 65532 --no-create-home --shell /usr/sbin/nologin duet
COPY --from=torch /opt/torch /opt/torch
COPY --from=build /out/bin/ /usr/local/bin/
COPY --chmod=0755 deploy/images/duet-node /usr/local/bin/duet-node
# The driver of the node brings its own libraries: which of them, the container runtime must be told.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DUET_LOG_FORMAT=json
USER 65532:65532
WORKDIR /tmp
# Outside Kubernetes (which ignores this): give ROLE, DUET_RANK and COORDINATOR to have it asked.
HEALTHCHECK --interval=60s --timeout=10s --start-period=15m --retries=5 \
    CMD ["sh", "-c", "exec duet-node alive \"${COORDINATOR:-}\" \"${ROLE:-}\""]
ENTRYPOINT ["sh", "/usr/local/bin/duet-node", "run"]
CMD ["duet-rollout-worker", "--help"]
