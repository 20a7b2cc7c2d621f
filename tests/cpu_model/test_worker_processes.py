"""Workers start without the user's script, listen to nobody else, and end with rank 0."""

import multiprocessing
import os
import signal
from functools import partial

import pytest
import rank_functions
from engine_checks import (
    descendants,
    fork_script,
    generate,
    greedy,
    is_running,
    random_prompts,
    read_until,
    start_script,
    tiny_engine,
    wait_until,
    worker_pids,
)
from sockets import are_on_the_loopback, listeners
from tiny_models import reference_greedy

pytestmark = pytest.mark.slow
PROMPTS = random_prompts((5, 300), seed=95)
ORPHAN_SECONDS = 5


# ---- sockets ----------------------------------------------------------------------------------


def test_ranks_listen_on_the_loopback_only_and_not_after_the_end(tiny_dir):
    before = set(listeners())  # a test before may have left some to a finalizer
    with tiny_engine(tiny_dir, tensor_parallel_size=2) as llm:
        generate(llm, PROMPTS, greedy(3))
        found = listeners(os.getpid(), *worker_pids().values())
        assert set(found) - before
        assert are_on_the_loopback(found), found
        # The start of a worker makes no garbage.
        assert llm.collective_rpc(rank_functions.num_frozen_objects)[1] > 100_000
    assert set(listeners()) <= before


# ---- the user's script ------------------------------------------------------------------------


def run_script(start, folder, text, *arguments):
    """The exit status and the output's lines of a script."""
    path = folder / "script.py"
    path.write_text(text)
    with start(path, *arguments) as process:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            process.kill()
    return process.returncode, output.splitlines()


UNGUARDED = """
import sys
from engine_checks import generate, greedy, tiny_engine
print("the script runs", flush=True)

class Doubled:
    def __init__(self, number):
        self.number = 2 * number

def double_rank(worker, number):
    return Doubled(worker.rank + number.number)

{guard}
    llm = tiny_engine(sys.argv[1], tensor_parallel_size=2)
    print(generate(llm, [[1, 2, 3]], greedy(3)), flush=True)
    results = llm.collective_rpc(double_rank, args=(Doubled(5),))
    print([result.number for result in results], flush=True)
    llm.exit()
"""


def test_a_script_needs_a_guard_only_for_what_it_sends_to_the_workers(tiny_dir, tmp_path):
    """Files beside it, in the folder where it runs, replace no module in a worker."""
    for name in ("signal", "ctypes", "nanovllm", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong file')")
    folder = tmp_path / "scripts"
    folder.mkdir()
    start = partial(start_script, cwd=tmp_path)
    status, lines = run_script(start, folder, UNGUARDED.format(guard="if True:"), str(tiny_dir))
    expected = str(reference_greedy(tiny_dir, [[1, 2, 3]], 3))
    assert lines[:2] == ["the script runs", expected], lines
    # Only for the call a worker imports the script, which would make another engine.
    assert lines.count("the script runs") == 2
    assert status == 1
    assert 'if __name__ == "__main__":' in lines[-1], lines


def test_with_a_guard_what_the_script_defines_can_be_sent(tiny_dir, tmp_path):
    text = UNGUARDED.format(guard='if __name__ == "__main__":')
    status, lines = run_script(fork_script, tmp_path, text, str(tiny_dir))
    assert status == 0, lines
    assert lines[0] == "the script runs"
    assert lines[-1] == "[20, 22]"


DAEMON = """
import os
import sys
os.closerange(0, 3)
from engine_checks import generate, greedy, tiny_engine
from rank_functions import print_to_descriptors

model, output = sys.argv[1:]
with tiny_engine(model, tensor_parallel_size=2) as llm:
    llm.collective_rpc(print_to_descriptors)
    [tokens] = generate(llm, [[5, 6]], greedy(3))
    open(output, "w").write(str(tokens))
"""


def test_a_process_without_standard_files_has_workers(tiny_dir, tmp_path):
    """What they print must not get into the pipes and the memory that they share with rank 0."""
    output = tmp_path / "output"
    run_script(fork_script, tmp_path, DAEMON, str(tiny_dir), str(output))
    assert output.exists()
    assert output.read_text() == str(reference_greedy(tiny_dir, [[5, 6]], 3)[0])


def test_a_process_that_imports_an_unguarded_script_names_the_guard(tiny_dir, monkeypatch):
    """One that the user's script has started by multiprocessing."""
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match='put .* under `if __name__ == "__main__":`'):
        tiny_engine(tiny_dir, tensor_parallel_size=2)


# ---- rank 0 is killed -------------------------------------------------------------------------

KILLED = """
import sys
import hanging_workers
from engine_checks import tiny_engine
from nanovllm.parallel import workers

model, place = sys.argv[1:]
if place != "anywhere":
    workers._worker_main = getattr(hanging_workers, "hang_in_" + place)
tiny_engine(model, tensor_parallel_size=2)
"""


@pytest.mark.parametrize(
    ("place", "is_stopped"),
    [("start", False), ("load", True)],
)
def test_workers_do_not_outlive_a_rank_0_that_is_killed(tiny_dir, tmp_path, place, is_stopped):
    """Also if they hang with Python's lock held, or are stopped."""
    path = tmp_path / "script.py"
    path.write_text(KILLED)
    with fork_script(path, str(tiny_dir), place) as process:
        pids = []
        try:
            worker = int(read_until(process, "hangs").split()[1])
            pids = descendants(process.pid)
            assert worker in pids
            if is_stopped:
                os.kill(worker, signal.SIGSTOP)
            process.kill()
            wait_until(lambda: not any(map(is_running, pids)), ORPHAN_SECONDS)
        finally:
            for pid in filter(is_running, pids):
                os.kill(pid, signal.SIGKILL)


def test_a_worker_that_has_just_been_started_does_not_outlive_rank_0(tiny_dir, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(KILLED)
    with fork_script(path, str(tiny_dir), "anywhere", forks_workers=False) as process:
        wait_until(lambda: descendants(process.pid), 120)
        pids = descendants(process.pid)
        process.kill()
        wait_until(lambda: not any(map(is_running, pids)), ORPHAN_SECONDS)
