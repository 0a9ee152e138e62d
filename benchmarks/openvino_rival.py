"""OpenVINO GenAI as a rival of ``sampling.py``, which starts this with the interpreter that has it (.venv-openvino).

Standard input: {"folder", "queries" (token ids), "policy", "new_tokens", "sequences" (most at once), "options"
(properties of the pipeline, such as KV_CACHE_PRECISION)}. Prints the seconds of all requests together.
"""

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai as genai


def main() -> None:
    job = json.load(sys.stdin)
    scheduler = genai.SchedulerConfig()  # its own defaults otherwise: parts of prompts beside tokens, keys taken over
    scheduler.max_num_seqs = job["sequences"]
    scheduler.max_num_batched_tokens = max(2048, job["sequences"])
    pipeline = genai.ContinuousBatchingPipeline(job["folder"], scheduler, "CPU", job["options"])
    config = genai.GenerationConfig(
        max_new_tokens=job["new_tokens"], min_new_tokens=job["new_tokens"], ignore_eos=True, apply_chat_template=False
    )
    config.num_return_sequences = 4
    if job["policy"] == "top-p":
        config.do_sample, config.temperature, config.top_p = True, 0.8, 1.0
    else:
        config.num_beams = 4
        config.num_beam_groups = 4 if job["policy"] == "diverse-beam" else 1
        config.diversity_penalty = 1.0 if job["policy"] == "diverse-beam" else 0.0

    def run(queries: list[list[int]]) -> None:
        handles = []
        for number, query in enumerate(queries):
            config.rng_seed = number
            handles.append(pipeline.add_request(number, openvino.Tensor(np.array([query], dtype=np.int64)), config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        for handle in handles:
            lengths = [len(output.generated_ids) for output in handle.read_all()]
            # Its diverse beams end earlier now and then, whatever ignore_eos says; they are counted as whole.
            assert len(lengths) == 4 and max(lengths) == job["new_tokens"], lengths

    run(job["queries"][:2])
    begin = time.perf_counter()
    run(job["queries"])
    print(time.perf_counter() - begin)


main()
