# One image for training, serving and the machines of a Ray cluster. docs/image.md has the commands.
# The base must be a Debian-like system with Python 3.11 or newer as python3, its headers and its venv module.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS environment
# The build of PyTorch: cpu, cu130, cu126, … Empty: the one on the package index.
ARG TORCH_BACKEND=cpu
# Ray's launcher needs these to start machines on AWS and Google Cloud; gcsfs opens gs://.
ARG PACKAGES="boto3 gcsfs google-api-python-client"

# The secrets are pip's and uv's own settings, for use with a mirror. They are not stored in any layer.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir uv && \
    python3 -m venv /opt/venv

# Only these two files, so that a change to our code does not rebuild this layer, the largest one. Bytecode is compiled
# now: the container's user cannot write it, and each of Ray's processes would compile it again.
WORKDIR /app
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    mkdir gptcore serve_app train_job && touch README.md gptcore/__init__.py serve_app/__init__.py train_job/__init__.py && \
    /opt/uv/bin/uv pip install --python=/opt/venv --no-cache --compile-bytecode --quiet \
    ${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} --constraints=constraints.txt \
    --editable='.[gpu,hub,s3]' ${PACKAGES} && \
    cd /opt/venv/lib/python3*/site-packages && rm -rf torch/test && \
    find matplotlib networkx numpy pandas pyarrow scipy sklearn sympy -type d -name tests -prune -exec rm -rf {} +

FROM ${BASE_IMAGE}
# g++: for the native kernel and torch.compile. ssh and rsync: for Ray's launcher. wget: for health checks.
RUN apt-get update && \
    apt-get install --yes --no-install-recommends ca-certificates g++ openssh-client rsync wget && \
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log && \
    echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/gpt-foundry.sh && \
    useradd --uid=1000 --user-group --create-home --shell=/bin/bash foundry && \
    install --directory --owner=foundry --group=foundry /data

COPY --from=environment /opt/venv /opt/venv
WORKDIR /app
COPY . .
RUN /opt/venv/bin/python -m compileall -q .

# The service listens on all of the container's addresses. Publish the port only where clients may reach it.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GIT_PYTHON_REFRESH=quiet \
    GPT_FOUNDRY_HOME=/data \
    GPT_HOST=0.0.0.0 \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    RAY_USAGE_STATS_ENABLED=0
# The output of `python -m serve_app.front.haproxy`, except the switch. It sets how the front answers during restarts.
ENV RAY_SERVE_HAPROXY_BINARY_PATH=/opt/venv/bin/gpt-foundry-front \
    RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER=1s \
    RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE=1 \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=330 \
    RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S=60 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.front.unavailable:middleware \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=0.5 \
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 \
    RAY_worker_niceness=0
USER foundry
EXPOSE 8000
# `serve run` shuts down cleanly at SIGINT; at SIGTERM it ends with a stack trace of Ray's.
STOPSIGNAL SIGINT
HEALTHCHECK --start-period=5m --interval=30s --timeout=10s CMD ["/app/deploy/entrypoint.sh", "health"]
ENTRYPOINT ["/app/deploy/entrypoint.sh"]
CMD ["serve"]
