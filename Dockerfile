# The proxy as a container: `docker build -t lakebase-auth-proxy .`
# The demo, which needs no account: `docker build -t lakebase-auth-proxy:demo --target demo .`
#
# Any image of Debian's family with Python 3.11 or newer serves as BASE.
ARG BASE=docker.io/library/python:3.13-slim-bookworm

# What is installed, and what installs it, which stays here. The compiler is for the relay alone:
# every dependency is a wheel. Debian's own Python has its headers in a package, the official base
# has them already. No version of a package: those of the base's release belong together.
FROM ${BASE} AS installed
WORKDIR /source
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libssl-dev \
    && { command -v python3-config || apt-get install --yes --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*
# The environment that goes into the image has no pip: the builder's installs into it.
RUN python3 -m venv /builder && python3 -m venv --without-pip /opt/lakebase-auth-proxy
COPY pyproject.toml README.md LICENSE ./
COPY proxy ./proxy
RUN /builder/bin/pip --python /opt/lakebase-auth-proxy/bin/python install \
    --no-cache-dir --disable-pip-version-check --only-binary :all: .

FROM installed AS installed-demo
RUN /builder/bin/pip --python /opt/lakebase-auth-proxy/bin/python install \
    --no-cache-dir --disable-pip-version-check --only-binary :all: '.[demo]'

# What both images have beside their packages.
FROM ${BASE} AS bare
# No installer stays behind. The number has a name because initdb (of the demo) insists on one.
RUN rm -rf /usr/local/lib/python3*/site-packages /usr/local/lib/python3*/ensurepip \
        /usr/local/bin/pip* \
    && echo 'proxy:x:65532:65532::/nonexistent:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'proxy:x:65532:' >> /etc/group
ENV PATH=/opt/lakebase-auth-proxy/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /
# PostgreSQL; and health, metrics and the page. Both listen on loopback unless told otherwise.
EXPOSE 5432 9090
STOPSIGNAL SIGTERM
# Asks the admin address of the configuration; does not import the SDK. No shell.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["lakebase-auth-proxy", "wait", "--timeout", "3"]
ENTRYPOINT ["lakebase-auth-proxy"]
LABEL org.opencontainers.image.title="lakebase-auth-proxy" \
      org.opencontainers.image.description="A sidecar that logs ordinary Postgres clients in to Databricks Lakebase" \
      org.opencontainers.image.licenses="Apache-2.0"

# Both images: the official base has no compiled standard library, and a read-only file system
# could not keep one, so what the program imports is compiled now, once for every start to come.
# A relay that could not be built, or finds no libssl here, ends the build: no image is slow unnoticed.
# The user is a number, so that Kubernetes can see that it is not root.
FROM bare AS demo
COPY --from=installed-demo /opt/lakebase-auth-proxy /opt/lakebase-auth-proxy
RUN ["/opt/lakebase-auth-proxy/bin/python", "-c", "import sys, proxy.cli, proxy.native, proxy.emulator.lakebase, databricks.sdk; sys.exit(proxy.native.WHY_MISSING or 0)"]
USER 65532:65532
CMD ["demo"]

# The last stage is what a build without --target makes.
FROM bare AS proxy
COPY --from=installed /opt/lakebase-auth-proxy /opt/lakebase-auth-proxy
RUN ["/opt/lakebase-auth-proxy/bin/python", "-c", "import sys, proxy.cli, proxy.native, databricks.sdk; sys.exit(proxy.native.WHY_MISSING or 0)"]
USER 65532:65532
CMD ["run"]
