# With CUDA:    docker build -t megatron-omega .
# For CPUs:     docker build --build-arg BASE=python:3.11-slim -t megatron-omega:cpu .
# Then:         docker run --rm -it --shm-size 2g -v "$PWD":/work megatron-omega demo     (with GPUs: --gpus all)
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ make pdsh openssh-client \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/omega
ENV PATH=/opt/omega/bin:$PATH OMP_NUM_THREADS=1
ARG TORCH=torch==2.13.0
# DeepSpeed's build asks the installed torch what to build for, so torch comes first; its C++ operators are not needed.
RUN pip install --no-cache-dir "${TORCH}" setuptools wheel numpy packaging
COPY . /src
RUN cd /src && DS_BUILD_OPS=0 pip install --no-cache-dir --no-build-isolation --constraint constraints.txt '.[serve]'
WORKDIR /work
ENTRYPOINT ["megatron-omega"]
CMD ["--help"]
