# The coordinator and the command line: no libtorch, no GPU.
#
#   BASE   gcr.io/distroless/cc-debian12, `debug-nonroot` (busybox's shell runs duet-node), by digest
#   RUST   docker.io/library/rust, 1.90 or newer on Debian 12, by digest
#
# deploy/images/build.sh gives both and refuses tags.
ARG BASE
ARG RUST

FROM ${RUST} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends cmake \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ARG STORES=duet-store/s3,duet-store/gcs,duet-store/azure
RUN cargo build --release --locked --features "${STORES}" -p duet-coordinator -p duet-cli \
 && install -D -t /out/bin target/release/duet target/release/duet-coordinator

FROM ${BASE}
COPY --from=build /out/bin/ /usr/local/bin/
COPY --chmod=0755 deploy/images/duet-node /usr/local/bin/duet-node
ENV DUET_LOG_FORMAT=json
USER 65532:65532
WORKDIR /tmp
EXPOSE 7400
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m --retries=5 \
    CMD ["duet", "status", "--json", "http://127.0.0.1:7400"]
ENTRYPOINT ["sh", "/usr/local/bin/duet-node", "run"]
CMD ["duet-coordinator", "--config", "/etc/duet/run.toml", "--resume"]
