"""Mutates the files of a model directory and looks at what `LLM` makes of them.

`python folder_mutations.py DIRECTORY --count N --seed S` runs N cases in this process: a right
answer or an ArgumentError, within seconds and bounded memory, is what must come of each. It prints
a line for every case that ends otherwise, then a summary, and exits with 1 if there was one.
"""

import argparse
import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 10
MAX_GROWTH = 1 << 30  # bytes
PROMPTS: list[Any] = [[5, 6, 7], "the quick brown fox: 12 BLOCKS\n of équal size"]
MESSAGES = [{"role": "user", "content": "the lazy dog"}]
DEEP = json.loads("[" * 400 + "]" * 400)
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 257, 2**15, 2**31 - 1, 2**31, 2**40),
    *(2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -0.5),
    *(1e-45, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", "x", "y" * 100_000, "\ud800", "\0", "64", "1e3", "../../etc/passwd", "/dev/zero"),
    *("silu", "gelu", "auto", "float16", "float64", "linalg", "LlamaTokenizerFast", "AutoModel"),
    *("AutoModelForCausalLM", "code.Trap", "<|im_end|>"),
    *([], {}, [[]], [None], ["x"], {"a": {}}, {"": 0}, [1] * 1000, {"rope_type": "yarn"}),
    *([0, 2], [10**30], {"AutoConfig": "code.Trap", "AutoTokenizer": ["code.Trap", "code.Trap"]}),
]
KEYS = [
    *(
        "auto_map",
        "configuration_files",
        "tokenizer_class",
        "tokenizer_file",
        "vocab_file",
        "vocab",
    ),
    *("per_layer_config", "num_labels", "id2label", "problem_type", "output_attentions", "to_dict"),
    *("_attn_implementation", "quantization_config", "attn_logit_softcapping", "head_dim", "dtype"),
    *("rope_scaling", "rope_theta", "sliding_window", "layer_types", "torch_dtype", "trust_me"),
    *("added_tokens_decoder", "extra_special_tokens", "init_inputs", "eos_token", "bos_token"),
    *("model_max_length", "chat_template", "add_prefix_space", "fast_tokenizer_files", "type"),
    *(
        "eos_token_id",
        "do_sample",
        "temperature",
        "top_k",
        "pooling_mode",
        "pooling_mode_cls_token",
    ),
]
CODE = "import pathlib; pathlib.Path({!r}).write_text('ran')\nclass Trap: pass\n"


def mutate(directory: Path, rng: random.Random) -> str:
    """Change one file of the directory, or what stands in its place; says which and how."""
    names = sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
    )
    # The small ones are more interesting than bytes of weights.
    name = rng.choice([n for n in names if not n.endswith(".py")])
    path = directory / name
    if rng.random() < 0.12:
        return f"{name}: {_replace_file(path, rng)}"
    with contextlib.suppress(ValueError, struct.error, RecursionError):  # broken by one before
        if name.endswith(".safetensors"):
            return f"{name}: {_mutate_weights(path, rng)}"
        if name.endswith(".json") and rng.random() < 0.8:
            return f"{name}: {_mutate_json(path, rng)}"
    return f"{name}: {_mutate_bytes(path, rng)}"


def _replace_file(path: Path, rng: random.Random) -> str:
    def as_socket() -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))  # unless the path is too long

    def write(content: bytes) -> Callable[[], object]:
        return lambda: path.write_bytes(content)

    kinds: dict[str, Callable[[], object]] = {
        "FIFO": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "link to itself": lambda: path.symlink_to(path.name),
        "link to nothing": lambda: path.symlink_to("nowhere"),
        "link to a device": lambda: path.symlink_to("/dev/zero"),
        "socket": as_socket,
        "nothing": lambda: None,
        "empty": write(b""),
        "zeros": write(bytes(5000)),
        "git-lfs pointer": write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "GGUF": write(b"GGUF\x03\0\0\0" + bytes(64)),
        "deep": write(b"[" * 200_000),
        "deep object": write(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    }
    kind = rng.choice(sorted(kinds))
    path.unlink()
    kinds[kind]()
    return kind


def _mutate_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(("truncate", "flip", "insert", "repeat"))
    place = rng.randrange(len(content) + 1)
    if kind == "truncate":
        del content[place:]
    elif kind == "flip":
        for _ in range(rng.randint(1, 4) if content else 0):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == "insert":
        content[place:place] = rng.choice((b"\0", b"\xff\xfe", b"{", b"]", b"NaN", b'"', b"1e999"))
    else:
        content = content * 2
    path.write_bytes(bytes(content))
    return f"{kind} at {place}"


def _mutate_json(path: Path, rng: random.Random) -> str:
    value = json.loads(path.read_text())
    mutated, what = _mutate_value(value, rng)
    text = json.dumps(mutated)
    if what.startswith("again"):  # a key twice: the last counts
        text = text.replace("{", f"{{{what.removeprefix('again ')}, ", 1)
    path.write_text(text)
    return what[:160]


def _mutate_value(value: Any, rng: random.Random) -> tuple[Any, str]:
    """`value` with a change at a random place in it, and what it is."""
    holder: dict[str, Any] = {"top": value}
    parent, key = _place(holder, rng)
    kind = rng.choice(("replace", "replace", "replace", "delete", "add", "nest", "scale", "again"))
    old = parent[key]
    if kind == "delete" and parent is not holder:
        del parent[key]
        return holder["top"], f"delete {key!r}"
    if kind == "add" and isinstance(old, dict):
        name, new = rng.choice(KEYS), rng.choice(VALUES)
        old[name] = new
        return holder["top"], f"add {name!r}: {str(new)[:60]!r} to {key!r}"
    if kind == "nest":
        parent[key] = rng.choice(([old], {"a": old}, DEEP))
        return holder["top"], f"nest {key!r}"
    if kind == "scale" and type(old) in (int, float):
        parent[key] = old * rng.choice((2, -1, 3, 1000, 10**9, 0.5, 10**18))
        return holder["top"], f"scale {key!r} from {old} to {parent[key]}"
    if kind == "again" and isinstance(key, str) and parent is holder["top"]:
        return holder["top"], f"again {json.dumps(key)}: {json.dumps(rng.choice(VALUES))}"
    parent[key] = rng.choice(VALUES)
    return holder["top"], f"replace {key!r}, {str(old)[:40]!r}, by {str(parent[key])[:60]!r}"


def _place(holder: Any, rng: random.Random) -> tuple[Any, Any]:
    parent, key = holder, next(iter(holder))
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    return parent, key


def _mutate_weights(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    [size] = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = rng.choice(("header", "header", "header", "size", "truncate", "twice"))
    if kind == "truncate":
        place = rng.randrange(len(content))
        path.write_bytes(content[:place])
        return f"truncate at {place}"
    if kind == "size":
        wrong = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", wrong) + content[8:])
        return f"header of {wrong} bytes"
    what = "a name twice"
    if kind == "header":
        header, what = _mutate_value(header, rng)
    text = json.dumps(header)
    if kind == "twice":
        name = rng.choice([name for name in header if name != "__metadata__"])
        text = text.replace("{", f"{{{json.dumps(name)}: {json.dumps(header[name])}, ", 1)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return what


def answers(directory: Path) -> dict[str, Any]:
    """What an engine on the directory gives: greedy completions, a chat, an embedding."""
    from nanovllm import LLM, ArgumentError, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(str(directory), device="cpu", num_kvcache_blocks=8, max_model_len=512) as llm:
        given: dict[str, Any] = {
            "ids": llm.tokenizer.encode(PROMPTS[1]),
            "tokens": [o["token_ids"] for o in llm.generate(PROMPTS, params, use_tqdm=False)],
            "eos": sorted(llm.config.eos_token_ids),
        }
        for name, call in (
            ("chat", lambda: llm.chat(MESSAGES, params, use_tqdm=False)[0]["token_ids"]),
            ("embedding", lambda: llm.embed(PROMPTS[:1], use_tqdm=False)[0].outputs.embedding),
        ):
            try:
                given[name] = call()
            except ArgumentError:
                given[name] = "refused"
        try:
            llm.get_default_sampling_params()
        except ArgumentError:
            pass
    return given


def reference(directory: Path, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Greedy completions by transformers."""
    from tiny_models import reference_greedy

    return reference_greedy(directory, prompt_ids, 6)


def is_right(directory: Path, base: dict[str, Any], found: dict[str, Any]) -> str:
    """Nothing if the answers are those from before or what transformers gives; else why not."""
    from transformers import AutoTokenizer

    if found["tokens"] == base["tokens"] and found["ids"] == base["ids"]:
        return ""
    try:
        ids = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).encode(PROMPTS[1])
    except BaseException as error:
        return f"transformers cannot load the tokenizer: {error!r}"[:300]
    if ids != found["ids"]:
        return f"transformers encodes to {ids}, not {found['ids']}"
    try:
        expected = reference(directory, [PROMPTS[0], ids])
    except BaseException as error:
        return f"transformers cannot run it: {error!r}"[:300]
    return "" if expected == found["tokens"] else f"transformers gives {expected}, not {found}"


def run_case(source: Path, case: int, base: dict[str, Any]) -> tuple[str, str, str]:
    """How a mutation ended ("same", "refused", or "wrong"), what it was, and the error."""
    from nanovllm import ArgumentError

    rng = random.Random(case)
    with tempfile.TemporaryDirectory() as folder:
        directory, ran = Path(folder) / "model", Path(folder) / "ran"
        shutil.copytree(source, directory)
        (directory / "code.py").write_text(CODE.format(str(ran)))
        what = " and ".join(mutate(directory, rng) for _ in range(rng.choice((1, 1, 1, 2))))
        start = time.monotonic()
        signal.alarm(SECONDS)
        try:
            found = answers(directory)
            signal.alarm(0)
            why = is_right(directory, base, found)
            ended = "wrong" if why else "same"
        except ArgumentError as error:
            ended, why = "refused", str(error)
            if len(why) > 1500:
                ended, why = "wrong", f"a message of {len(why)} characters: {why[:300]}"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            ended, why = "wrong", f"{error!r}"[:300] + f" at {last.filename}:{last.lineno}"
        finally:
            signal.alarm(0)
        if ended != "wrong" and time.monotonic() - start > SECONDS:
            ended, why = "wrong", "too slow"
        if ran.exists():
            ended, why = "wrong", "code of the directory ran"
    return ended, what, why


def _out_of_time(*_: Any) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def main(arguments: list[str] | None = None) -> int:
    """Try the cases that the arguments ask for; 1 if one went wrong, else 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(arguments)
    previous = signal.signal(signal.SIGALRM, _out_of_time)
    try:
        return _try_cases(args)
    finally:
        signal.signal(signal.SIGALRM, previous)


def _try_cases(args: argparse.Namespace) -> int:
    base = answers(args.directory)
    assert is_right(args.directory, base | {"tokens": []}, base) == ""
    Path("/proc/self/clear_refs").write_text("5")  # what this process had before is no peak
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str] = Counter()
    for case in range(args.seed, args.seed + args.count):
        ended, what, why = run_case(args.directory, case, base)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MAX_GROWTH:
            ended, why = "wrong", f"{grown / 2**30:.1f} GiB more memory"
            before += grown // 1024
        ends[ended] += 1
        if ended == "wrong" or args.verbose:
            print(f"{case} {ended}: {what}\n    {why}", flush=True)
    print(json.dumps(ends))
    return int(ends["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
