# The proxy as a container: `docker build -t lakebase-auth-proxy .`
# The demo, which needs no account: `docker build -t lakebase-auth-proxy:demo --target demo .`
#
# BASE may be any Debian-based image with Python 3.11 or newer; a release gives it by digest
# (NAME@sha256:...). SOURCE and REVISION are the repository and the commit, for the image's labels.
ARG BASE=docker.io/library/python:3.13-slim-bookworm

# The build stage; its compiler and pip do not get into the image. The compiler is for the relay
# alone: every dependency is a wheel. Debian's own Python has its headers in a package, the official
# base includes them. Package versions are not pinned: those of the base's release fit together.
FROM ${BASE} AS installed
WORKDIR /source
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libssl-dev \
    && { command -v python3-config || apt-get install --yes --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*
# The environment that is copied into the image has no pip: the builder's pip installs into it. Each
# package has a version and hashes in requirements/ (`make lock`), those that build the wheel as well.
COPY requirements ./requirements
RUN python3 -m venv /builder && python3 -m venv --without-pip /opt/lakebase-auth-proxy \
    && /builder/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --require-hashes --requirement requirements/build.txt \
    && /builder/bin/pip --python /opt/lakebase-auth-proxy/bin/python install \
        --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --require-hashes --requirement requirements/proxy.txt
COPY pyproject.toml README.md LICENSE ./
COPY proxy ./proxy
RUN /builder/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /builder/bin/pip --python /opt/lakebase-auth-proxy/bin/python install \
        --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM installed AS installed-demo
RUN /builder/bin/pip --python /opt/lakebase-auth-proxy/bin/python install \
    --no-cache-dir --disable-pip-version-check --only-binary :all: \
    --require-hashes --requirement requirements/demo.txt

# The parts that both images share, without their Python packages.
FROM ${BASE} AS bare
# No installer stays in the image. The user id has a name because initdb (of the demo) requires one.
RUN rm -rf /usr/local/lib/python3*/site-packages /usr/local/lib/python3*/ensurepip \
        /usr/local/bin/pip* \
    && echo 'proxy:x:65532:65532::/nonexistent:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'proxy:x:65532:' >> /etc/group
ENV PATH=/opt/lakebase-auth-proxy/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /
# The PostgreSQL port and the admin port (health, metrics, status page). Both are on loopback by
# default.
EXPOSE 5432 9090
STOPSIGNAL SIGTERM
# Requests the configured admin address; does not import the SDK and needs no shell.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["lakebase-auth-proxy", "wait", "--timeout", "3"]
ENTRYPOINT ["lakebase-auth-proxy"]
ARG BASE
ARG VERSION=0.1.0
ARG SOURCE=
ARG REVISION=
LABEL org.opencontainers.image.title="lakebase-auth-proxy" \
      org.opencontainers.image.description="A sidecar that logs ordinary Postgres clients in to Databricks Lakebase" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"

# Both images: the official base has no byte-compiled standard library, and on a read-only file
# system Python could not write it. So the modules that the program imports are byte-compiled now.
# If the relay was not compiled, or finds no libssl here, the build fails: otherwise the image would
# be slow without notice. The user is numeric, so that Kubernetes can verify that it is not root.
FROM bare AS demo
COPY --from=installed-demo /opt/lakebase-auth-proxy /opt/lakebase-auth-proxy
RUN ["/opt/lakebase-auth-proxy/bin/python", "-c", "import sys, proxy.cli, proxy.native, proxy.emulator.lakebase, databricks.sdk; sys.exit(proxy.native.WHY_MISSING or 0)"]
USER 65532:65532
CMD ["demo"]

# The last stage is the one that a build without --target makes.
FROM bare AS proxy
COPY --from=installed /opt/lakebase-auth-proxy /opt/lakebase-auth-proxy
RUN ["/opt/lakebase-auth-proxy/bin/python", "-c", "import sys, proxy.cli, proxy.native, databricks.sdk; sys.exit(proxy.native.WHY_MISSING or 0)"]
USER 65532:65532
CMD ["run"]
