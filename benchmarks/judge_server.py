"""Serve a GGUF model by llama.cpp on loopback, as a judge for docs/judging.md; it runs in .venv-judge (make judge-env).

.venv-judge/bin/python benchmarks/judge_server.py MODEL.gguf [port]
"""

from __future__ import annotations

import signal
import sys

import xllamacpp

CONTEXT, SLOTS, THREADS = 8192, 1, 1  # tokens of each request; requests at a time; threads


def main(model: str, port: int = 8177) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.model_alias = {"smollm2"}
    settings.n_ctx, settings.n_parallel = CONTEXT * SLOTS, SLOTS
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
    settings.n_gpu_layers = 0
    settings.hostnames, settings.port = ["127.0.0.1"], port
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
