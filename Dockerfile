# vLLM with m3quant's guard, from this checkout. `m3quant serve CKPT --write-compose FILE` writes a compose file that builds it.
#
#   docker build -t m3quant .
#   docker run --gpus all --ipc host -p 127.0.0.1:8000:8000 -v /data/m3-awq:/model:ro m3quant \
#       /model --block-size 128 --middleware m3quant.runtime.guard.Guard
#
# BASE is the newest vLLM that was read. m3quant is pure Python and the guard runs with the engine's own libraries, so nothing else is
# installed: another release of either would change the engine.
ARG BASE=vllm/vllm-openai:v0.33.0

FROM python:3.12-slim AS package
WORKDIR /source
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY m3quant m3quant
COPY calibration calibration
COPY runtime runtime
COPY recipes recipes
RUN pip install --no-cache-dir --no-deps --target /opt/m3quant .

FROM ${BASE}
COPY --from=package /opt/m3quant /opt/m3quant
ENV PYTHONPATH=/opt/m3quant
ENTRYPOINT ["vllm", "serve"]
