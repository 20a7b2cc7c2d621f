"""How far each technique moves the results in bf16: greedy tokens and log probabilities; by hand:

    PYTHONPATH=. python tests/benchmarks/agreement.py --model DIR [--load-format dummy]

The same greedy requests run with all techniques and with each one changed. "agree" is the share of
completions that are equal to the last token; "tokens" the mean share before the first difference;
then the distance of log probabilities, of the prompts' tokens (prefill) and of sampled ones up to
the first difference (decode). The row "again" repeats the run without a change: it must be exact.
"""

import argparse
import random

import numpy as np
from engine_options import add_engine_options, engine_settings
from variants import VARIANTS, constants_set

from nanovllm import LLM, SamplingParams

Result = tuple[list[list[int]], list[np.ndarray], list[np.ndarray]]


def own_logprobs(entries, token_ids: list[int]) -> np.ndarray:
    """The log probabilities [N] of the tokens themselves; 0 where there is none."""
    return np.array([e[t].logprob if e else 0.0 for e, t in zip(entries, token_ids, strict=True)])


def run(settings: dict, prompts: list[list[int]], max_tokens: int) -> Result:
    """Greedy completions, their log probabilities, and the prompts'.

    Prompts are run again for their log probabilities: asking for them computes the last layer for
    all tokens, and reads no cached prefix.
    """
    greedy = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    with LLM(**settings) as llm:
        fast = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, **greedy))
        sampled = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, logprobs=0, **greedy))
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, **greedy)
        whole = llm.generate(prompts, params)
    assert [out["token_ids"] for out in fast] == [out["token_ids"] for out in sampled], (
        "greedy tokens of the fast sampler and of the one that gives log probabilities differ"
    )
    return (
        [out["token_ids"] for out in fast],
        [own_logprobs(out["logprobs"], out["token_ids"]) for out in sampled],
        [own_logprobs(out.prompt_logprobs, out.prompt_token_ids) for out in whole],
    )


def compare(name: str, base: Result, other: Result) -> None:
    lengths, decode = [], []
    for a, b, x, y in zip(base[0], other[0], base[1], other[1], strict=True):
        same = next((i for i in range(len(a)) if a[i] != b[i]), len(a))
        lengths.append(same / len(a))
        decode.append(np.abs(x[:same] - y[:same]))
    prefill = np.concatenate([np.abs(x - y) for x, y in zip(base[2], other[2], strict=True)])
    steps = np.concatenate(decode)
    print(
        f"{name:18}{np.mean(np.array(lengths) == 1):8.3f}{np.mean(lengths):8.3f}"
        f"{prefill.mean():12.5f}{prefill.max():10.4f}{steps.mean():12.5f}{steps.max():10.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_engine_options(parser)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--shared-prefix", type=int, default=600, help="tokens that all begin with")
    names = [name for name in VARIANTS if name != "no-prefix-caching"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    rng = random.Random(0)
    prefix = [rng.randrange(100, 3000) for _ in range(args.shared_prefix)]
    lengths = [rng.randint(10, 400) for _ in range(args.num_prompts)]
    prompts = [prefix + [rng.randrange(100, 3000) for _ in range(n)] for n in lengths]
    settings = {"model": args.model, "max_num_seqs": 128} | engine_settings(args)
    base = run(settings, prompts, args.max_tokens)
    print(f"{args.num_prompts} prompts of {args.shared_prefix} + 10 to 400 tokens, "
          f"{args.max_tokens} sampled; |difference| of log probabilities")  # fmt: skip
    print(f"{'':18}{'agree':>8}{'tokens':>8}{'prefill mean':>14}{'max':>8}"
          f"{'decode mean':>14}{'max':>8}")  # fmt: skip
    compare("again", base, run(settings, prompts, args.max_tokens))
    for name in args.only:
        with constants_set([name]):
            compare(name, base, run(settings | VARIANTS[name].settings, prompts, args.max_tokens))


if __name__ == "__main__":
    main()
