# The gateway's image. PYTHON_IMAGE may be any image with Python 3.11 or newer as python3, with venv.
ARG PYTHON_IMAGE=python:3.13.16-slim-trixie

FROM ${PYTHON_IMAGE} AS build
# Packages come first, because they change less often than the code, so this layer is usually cached.
COPY requirements/gateway.txt /build/
# The image has no pip: it installs from one environment into another one without pip.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /build/pip && python3 -m venv --without-pip /opt/venv && \
    /build/pip/bin/pip --python /opt/venv/bin/python install --quiet --disable-pip-version-check \
        --no-compile --require-hashes --requirement /build/gateway.txt
COPY gateway /opt/gateway/gateway
# The `stack` command, from any directory.
RUN printf '#!/opt/venv/bin/python\nimport sys\nsys.path.insert(0, "/opt/gateway")\nfrom gateway.cli.main import main\nmain()\n' \
        >/opt/venv/bin/stack && chmod 0755 /opt/venv/bin/stack
# Every user may read the files, also if the clone was made under umask 077. They are compiled here, because the running
# container cannot write. With unchecked-hash, Python does not compare them with the sources.
RUN chmod -R a+rX /opt/gateway && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /opt/gateway

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/gateway /opt/gateway
# A new named volume takes the owner of the directory that it covers.
RUN mkdir -m 0700 /var/lib/stack && chown 10001:10001 /var/lib/stack
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STACK_BIND=0.0.0.0:9000
WORKDIR /opt/gateway
USER 10001:10001
EXPOSE 9000
# The program checks itself, so the image needs no shell and no curl.
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 CMD ["python", "-IS", "gateway/server/healthcheck.py"]
ENTRYPOINT ["python", "-m", "gateway"]
