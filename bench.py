"""Throughput on random prompts: 256 requests of 100-1024 tokens in and 100-1024 out by default.

The last line of stdout is the result. Only completion tokens count.
"""

import argparse
import json
import os
import time
from random import randint, seed

from nanovllm import LLM, SamplingParams


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=os.path.expanduser("~/huggingface/Qwen3-0.6B/"),
        help="model directory; with --load-format dummy its config and tokenizer are enough",
    )
    parser.add_argument("--download", action="store_true", help="--model may be a name on the hub")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--num-seqs", type=int, default=256, help="number of requests")
    parser.add_argument("--min-input-len", type=int, default=100)
    parser.add_argument("--max-input-len", type=int, default=1024)
    parser.add_argument("--min-output-len", type=int, default=100)
    parser.add_argument("--max-output-len", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--num-kvcache-blocks", type=int, default=None)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--cpu-offload-gb", type=float, default=0.0)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument(
        "--sampling-params",
        type=json.loads,
        default={},
        metavar="JSON",
        help="further SamplingParams, as '{\"top_p\": 0.9}'",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--no-async-scheduling", action="store_true", help="no overlap")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument(
        "--repeat", type=int, default=1, help="timed runs, a line each; later ones draw new ids"
    )
    return parser.parse_args()


def main() -> None:
    """Draw the requests, warm up, time `generate`, print the line."""
    args = parse_arguments()
    llm = LLM(
        args.model,
        download=args.download or None,
        enforce_eager=args.enforce_eager,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        num_kvcache_blocks=args.num_kvcache_blocks,
        gpu_memory_utilization=args.gpu_memory_utilization,
        cpu_offload_gb=args.cpu_offload_gb,
        tensor_parallel_size=args.tensor_parallel_size,
        data_parallel_size=args.data_parallel_size,
        load_format=args.load_format,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        device=args.device,
        attention_backend=args.attention_backend,
        async_scheduling=not args.no_async_scheduling,
        enable_prefix_caching=not args.no_prefix_caching,
    )
    max_token_id = min(10000, llm.config.get_vocab_size() - 1)

    seed(0)
    prompt_token_ids = [
        [randint(0, max_token_id) for _ in range(randint(args.min_input_len, args.max_input_len))]
        for _ in range(args.num_seqs)
    ]
    sampling_params = [
        SamplingParams(
            temperature=args.temperature,
            ignore_eos=True,
            max_tokens=randint(args.min_output_len, args.max_output_len),
            **args.sampling_params,
        )
        for _ in range(args.num_seqs)
    ]

    llm.generate(["Benchmark: "], SamplingParams())
    total_tokens = sum(params.max_tokens for params in sampling_params)
    for run in range(args.repeat):
        if run > 0:  # or the prefix cache would serve the prompts
            prompt_token_ids = [
                [randint(0, max_token_id) for _ in prompt] for prompt in prompt_token_ids
            ]
        start = time.time()
        llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
        seconds = time.time() - start
        throughput = total_tokens / seconds
        print(f"Total: {total_tokens}tok, Time: {seconds:.2f}s, Throughput: {throughput:.2f}tok/s")


if __name__ == "__main__":
    main()
