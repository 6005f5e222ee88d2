# finelip serve on a CPU, from the wheel: docker build -t finelip-fast:cpu .
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY finelip_fast finelip_fast
COPY kernels kernels
COPY training training
COPY export export
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON} AS environment
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/finelip
# PyTorch without CUDA, which PyPI does not have for Linux: 200 MB instead of 5 GB.
RUN /opt/finelip/bin/pip install --index-url https://download.pytorch.org/whl/cpu "torch>=2.11" torchvision
COPY --from=wheel /wheels /wheels
RUN /opt/finelip/bin/pip install "$(echo /wheels/*.whl)[serve,onnx,formats]"

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="finelip-fast" \
      org.opencontainers.image.description="Search pictures with long descriptions, in a browser and over HTTP (CPU)" \
      org.opencontainers.image.licenses="Apache-2.0"
# Folders of an ordinary user, whose rights new volumes take over; nothing else is ever written.
RUN useradd --system --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin finelip \
    && install -d -o finelip -g finelip -m 0700 /cache /index
COPY --from=environment /opt/finelip /opt/finelip
ENV PATH=/opt/finelip/bin:$PATH \
    FINELIP_CACHE=/cache/finelip_fast \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
USER finelip
WORKDIR /cache
VOLUME ["/index", "/cache"]
EXPOSE 8000
# It really encodes and searches; loading a model takes a while at first.
HEALTHCHECK --interval=30s --timeout=15s --start-period=180s --retries=3 CMD ["python", "-I", "-c", \
    "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/health/ready', timeout=12)"]
ENTRYPOINT ["finelip"]
# Beyond the container's own loopback: a key is required, in FINELIP_API_KEY or by --api-key-file.
CMD ["serve", "--index", "/index", "--host", "0.0.0.0"]
