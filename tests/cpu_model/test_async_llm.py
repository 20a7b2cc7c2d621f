"""Coroutines of `AsyncLLM`: results are those of `LLM.generate`, pauses stop the steps."""

import asyncio

import pytest
from engine_checks import check_nothing_is_held, greedy, random_prompts

from nanovllm import ArgumentError, AsyncEngineArgs, AsyncLLM, SamplingParams
from nanovllm.sampling_params import RequestOutputKind

PROMPTS = random_prompts([5, 300, 40], seed=3)
DELTA = RequestOutputKind.DELTA


@pytest.fixture(scope="module")
def engine(tiny_dir):
    args = AsyncEngineArgs(
        str(tiny_dir), max_num_batched_tokens=64, max_model_len=1024, max_num_seqs=8, device="cpu"
    )
    args.num_gpu_blocks_override = 64
    engine = AsyncLLM.from_engine_args(args)
    yield engine
    engine.shutdown()


def wait_for(coroutine):
    """Its result; an error if it takes longer than the whole of it may."""

    async def within_limit():
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(within_limit())


async def collect(engine, name, prompt, params):
    return [output async for output in engine.generate(prompt, params, name)]


def check_nothing_runs(engine):
    assert engine.get_num_unfinished_requests() == 0
    check_nothing_is_held(engine.engine.llm)


def test_coroutines_get_what_generate_gives(engine):
    expected = engine.engine.llm.generate(PROMPTS, greedy(6), use_tqdm=False)

    async def run():
        calls = [collect(engine, str(i), prompt, greedy(6)) for i, prompt in enumerate(PROMPTS)]
        params = greedy(6)
        params.output_kind = DELTA
        return await asyncio.gather(*calls, collect(engine, "delta", PROMPTS[1], params))

    *all_outputs, deltas = wait_for(run())
    assert [outputs[-1] for outputs in all_outputs] == expected
    assert [outputs[-1].request_id for outputs in all_outputs] == ["0", "1", "2"]
    assert all(len(outputs) > 1 and outputs[-1].finished for outputs in all_outputs)
    assert [i for delta in deltas for i in delta.outputs[0].token_ids] == expected[1]["token_ids"]
    check_nothing_runs(engine)


@pytest.mark.parametrize("clear_cache", [False, True])
def test_a_pause_keeps_requests(engine, clear_cache):
    [expected] = engine.engine.llm.generate([PROMPTS[1]], greedy(12), use_tqdm=False)
    outputs = []

    async def read():
        async for output in engine.generate(PROMPTS[1], greedy(12), "kept"):
            outputs.append(output)

    async def run():
        reading = asyncio.create_task(read())
        while len(outputs) < 3:
            await asyncio.sleep(0)
        await engine.pause_generation(mode="keep", clear_cache=clear_cache)
        assert await engine.is_paused()
        num_outputs = len(outputs)
        later = asyncio.create_task(collect(engine, "later", PROMPTS[0], greedy(2)))
        await asyncio.sleep(0.1)
        assert len(outputs) == num_outputs < 12 and not later.done()
        await engine.resume_generation()
        await asyncio.gather(reading, later)

    wait_for(run())
    assert outputs[-1] == expected and outputs[-1].finished
    check_nothing_runs(engine)


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("wait", "length")])
def test_a_pause_ends_requests(engine, mode, reason):
    async def run():
        first = engine.generate(PROMPTS[0], greedy(40), "first")
        async for _ in first:
            break
        rest = asyncio.create_task(collect_rest(first))
        await asyncio.sleep(0)
        await engine.pause_generation(mode=mode)
        outputs = await rest  # nothing runs any more
        later = asyncio.create_task(collect(engine, "later", PROMPTS[0], greedy(2)))
        await asyncio.sleep(0.05)
        assert not later.done() and engine.get_num_unfinished_requests() == 0
        await engine.resume_generation()
        assert (await later)[-1].outputs[0].finish_reason == "length"
        return outputs[-1]

    async def collect_rest(outputs):
        return [output async for output in outputs]

    output = wait_for(run())
    assert output.finished and output.outputs[0].finish_reason == reason
    assert (len(output.outputs[0].token_ids) == 40) == (mode == "wait")
    check_nothing_runs(engine)


def test_who_leaves_ends_the_request(engine):
    async def run():
        outputs = engine.generate(PROMPTS[0], greedy(200), "left")
        async for _ in outputs:
            break
        await outputs.aclose()
        cancelled = asyncio.create_task(collect(engine, "cancelled", PROMPTS[0], greedy(200)))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        check_nothing_runs(engine)
        ended = asyncio.create_task(collect(engine, "ended", PROMPTS[0], greedy(200)))
        await asyncio.sleep(0.05)
        await engine.abort(["ended", "unknown"])
        return (await ended)[-1]

    assert wait_for(run()).outputs[0].finish_reason == "abort"
    check_nothing_runs(engine)


def test_errors_are_those_of_the_engine(engine):
    async def run():
        with pytest.raises(ArgumentError, match="token id 999999"):
            await collect(engine, "wrong", [999999], greedy(2))
        running = asyncio.create_task(collect(engine, "twice", PROMPTS[0], greedy(20)))
        await asyncio.sleep(0)
        with pytest.raises(ArgumentError, match="an unfinished request 'twice' already"):
            await collect(engine, "twice", PROMPTS[0], greedy(2))
        with pytest.raises(ArgumentError, match="mode must be one of abort, wait, keep, got 5"):
            await engine.pause_generation(mode=5)
        return await running

    outputs = wait_for(run())
    assert len(outputs[-1].outputs[0].token_ids) == 20
    check_nothing_runs(engine)


def test_sleep_is_a_pause(engine):
    async def run():
        await engine.sleep(level=1)
        assert await engine.is_sleeping() and await engine.is_paused()
        later = asyncio.create_task(collect(engine, "later", PROMPTS[0], SamplingParams(0.0, 2)))
        await asyncio.sleep(0.05)
        assert not later.done()
        assert await engine.wake_up() and not await engine.is_paused()
        return await later

    assert wait_for(run())[-1].finished
    check_nothing_runs(engine)
