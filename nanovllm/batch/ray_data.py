"""`python -m nanovllm.batch.ray_data in.jsonl out_dir --model DIR --num-actors 8`: many engines.

Ray Data gives parts of the input to a pool of actors, each with an `LLM`. The output of a part is a
file of `nanovllm.batch`, so a part that was broken off goes on after its last finished line. This
process reads lines and loads neither torch nor a model.
"""

import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from nanovllm.batch.journal import Journal, remove_journal
from nanovllm.batch.options import EPILOG, Options, add_parameters, options_of
from nanovllm.batch.requests import custom_id_of, parse_line
from nanovllm.batch.result_file import Part, ResultFile, StringSet
from nanovllm.batch.run import Bar, Run, StopSignals, all_done, load_engine, status_of
from nanovllm.command_line import Parser
from nanovllm.errors import ArgumentError
from nanovllm.validation import check_integer

DESCRIPTION = """\
Completes every line of INPUT, a JSON Lines file of requests, by several engines at once, and writes
the results to OUTPUT_DIR/lines-*.jsonl. Run the same command again to resume."""


@dataclass
class Task:
    """A part that an actor completes.

    Attributes:
        output_path: its results.
        num_lines: how many lines have no result yet.
        earlier_ids: custom_ids of its lines that earlier parts have too.
    """

    part: Part
    output_path: str
    num_lines: int
    earlier_ids: list[str]


def encode_task(task: Task) -> str:
    """The task as the text that an actor takes: Ray warns of other objects in a column."""
    return json.dumps(asdict(task))


class LLMActor:
    """An engine that completes one part after the other.

    Args:
        options: of the run.
        settings: what the records' ids begin with.
    """

    def __init__(self, options: Options, settings: str) -> None:
        self.options = options
        self.settings = settings
        engine = options.engine
        if "record" in engine:  # each actor has its own
            stem, suffix = os.path.splitext(engine["record"])
            engine = engine | {"record": f"{stem}-{os.uname().nodename}-{os.getpid()}{suffix}"}
        self.llm = load_engine(**engine)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Complete the one part of the batch, and count its lines with an error record."""
        [text] = batch["task"]
        task = Task(**json.loads(text))
        source, part = self.options.input_path, Part(*task.part)
        with ResultFile(task.output_path, self.settings) as results:
            _, last_line = results.count_lines(source, part)
            for custom_id in task.earlier_ids:
                results.custom_ids.add(custom_id)
            bar = Bar(False, 0, 0)
            with Journal(results) as journal:
                run = Run(self.llm, self.options, results, journal, part, last_line, bar)
                run.work(StopSignals())
            return {"num_lines": [task.num_lines], "num_errors": [results.num_errors]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, as `options.EPILOG` lists them.

    Args:
        arguments: of the command line; default `sys.argv[1:]`.
    """
    return status_of(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m nanovllm.batch.ray_data",
        usage="%(prog)s INPUT OUTPUT_DIR --model DIR [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_parameters(parser)
    parser.add_argument("output", metavar="OUTPUT_DIR", help="folder of the results")
    parser.add_argument("--num-actors", type=int, default=1, metavar="N", help="engines")
    parser.add_argument("--part-lines", type=int, default=4096, metavar="N", help="lines of a part")
    given = parser.values_of(sys.argv[1:] if arguments is None else arguments)
    for name in ("num_actors", "part_lines"):
        check_integer(name, given[name], minimum=1)
    options = options_of(given | _absolute_paths(given))
    options = replace(options, input_path=os.path.abspath(options.input_path))
    settings = _digest(options, given["part_lines"])
    os.makedirs(options.output_path, exist_ok=True)

    plan = _Plan(options, settings, given["part_lines"])
    if plan.tasks:
        check_engine(**options.engine)
        num_actors = min(given["num_actors"], len(plan.tasks))
        with tqdm(
            total=plan.num_lines,
            initial=plan.num_finished,
            desc="Batch",
            unit="line",
            smoothing=0,
            disable=not options.shows_progress,
        ) as bar:
            for row in _completed(plan.tasks, options, settings, num_actors):
                plan.num_errors += row["num_errors"]
                bar.update(row["num_lines"])
    return all_done(plan.num_lines, plan.num_errors)


def _absolute_paths(given: dict[str, Any]) -> dict[str, str]:
    """The paths among the options, for actors that work in another directory."""
    names = ["model", "output", "tokenizer", "record"]
    if given.get("generation_config") not in ("auto", "vllm"):
        names.append("generation_config")
    template = given.get("chat_template", "")
    # A path with a brace or a line end would be taken for the template itself.
    if os.path.isfile(template) and {"{", "}", "\n"}.isdisjoint(os.path.abspath(template)):
        names.append("chat_template")
    return {name: os.path.abspath(given[name]) for name in names if name in given}


def check_engine(model: str, **keywords: Any) -> None:
    """ArgumentError for what `LLM` would refuse before it loads, in every actor."""
    from nanovllm.config import Config  # after every other check: it loads torch

    Config.from_kwargs(model, keywords)


def _digest(options: Options, part_lines: int) -> str:
    """8 hex digits that differ as `Options.digest` does, and when the parts do."""
    text = f"{options.digest}:{part_lines}"
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


class _Plan:
    """The work that is left, by the files that are there.

    Attributes:
        tasks: the parts that lack results.
        num_lines: of the input that are not blank.
        num_finished: how many have a result.
        num_errors: how many of the finished parts' lines have an error record.
    """

    def __init__(self, options: Options, settings: str, part_lines: int) -> None:
        self.tasks: list[Task] = []
        self.num_lines = self.num_finished = self.num_errors = 0
        strangers = set(glob.glob(os.path.join(glob.escape(options.output_path), "lines-*.jsonl")))
        for part, num_lines, earlier_ids in _split(options.input_path, part_lines):
            path = os.path.join(options.output_path, f"lines-{part.first:012}.jsonl")
            num_finished = num_errors = 0
            if path in strangers:
                strangers.remove(path)
                with ResultFile(path, settings) as results:
                    results.count_lines(options.input_path, part)
                    num_finished, num_errors = results.num_finished, results.num_errors
            self.num_lines += num_lines
            self.num_finished += num_finished
            if num_finished < num_lines:
                self.tasks.append(Task(part, path, num_lines - num_finished, earlier_ids))
            else:
                remove_journal(path)
                self.num_errors += num_errors
        if strangers:
            raise ArgumentError(
                f"{min(strangers)!r} belongs to another input or other --part-lines; choose "
                "another output"
            )


def _split(path: str, part_lines: int) -> Iterator[tuple[Part, int, list[str]]]:
    """Each part, how many of its lines are not blank, and its custom_ids of earlier parts."""
    seen = StringSet()
    first, offset = 1, 0
    with open(path, "rb") as file:
        while lines := list(itertools.islice(file, part_lines)):
            contents = [line.strip() for line in lines if not line.isspace()]
            custom_ids = sorted({name for line in contents if (name := _custom_id(line))})
            earlier_ids = [name for name in custom_ids if not seen.add(name)]
            yield Part(first, first + len(lines) - 1, offset), len(contents), earlier_ids
            first += len(lines)
            offset += sum(map(len, lines))


def _custom_id(line: bytes) -> str | None:
    try:
        return custom_id_of(parse_line(line))
    except ArgumentError:  # the line will have an error record
        return None


def _completed(
    tasks: list[Task], options: Options, settings: str, num_actors: int
) -> Iterator[dict[str, int]]:
    """A row for each task that an actor has completed, in any order.

    Ray starts a dead actor again, which takes up its part where the file ends.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext, from_items
    except ImportError:
        raise ArgumentError('Ray is not installed: pip install "nanovllm[ray]"') from None

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False)
    try:
        num_gpus = _gpus_of_an_actor(options.engine, num_actors, ray.cluster_resources())
        DataContext.get_current().enable_progress_bars = False
        rows = [{"task": encode_task(task)} for task in tasks]
        yield from (
            from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                LLMActor,
                fn_constructor_args=(options, settings),
                compute=ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
                batch_size=1,
                num_cpus=1,
                num_gpus=num_gpus,
            )
            .iter_rows()
        )
    finally:
        if is_ours:
            ray.shutdown()


def _gpus_of_an_actor(engine: dict[str, Any], num_actors: int, resources: dict[str, float]) -> int:
    """How many an engine takes; ArgumentError if the cluster cannot hold `num_actors` engines."""
    device = engine.get("device", "auto")
    on_gpu = device == "cuda" or (device == "auto" and resources.get("GPU", 0) > 0)
    num_ranks = engine.get("tensor_parallel_size", 1) * engine.get("data_parallel_size", 1)
    num_gpus = num_ranks if on_gpu else 0
    for name, number in {"CPU": 1, "GPU": num_gpus}.items():
        available = int(resources.get(name, 0))
        if num_actors * number > available:
            raise ArgumentError(
                f"num_actors must be <= {available // number}: each takes {number} {name}s, and "
                f"Ray has {available}; got {num_actors}"
            )
    return num_gpus


if __name__ == "__main__":
    from nanovllm.batch import ray_data  # so that the actors find the classes by their module

    sys.exit(ray_data.main())
