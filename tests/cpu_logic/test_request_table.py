"""Where requests are: unfinished, finished for `take` or for their owner, known to `find`."""

import pytest

from nanovllm.engine.request import Request, RequestTable
from nanovllm.sampling_params import SamplingParams


@pytest.fixture
def table():
    return RequestTable()


def added(table: RequestTable, request_id: int, n: int = 1) -> Request:
    request = Request(None, [1, 2], SamplingParams(n=n), max_length=5)
    request.number(request_id, engine_seed=0)
    table.add(request)
    return request


def end(table: RequestTable, request: Request, index: int = 0) -> None:
    request.sequences[index].finish_reason = "stop"
    table.finish(request.sequences)


def test_a_request_ends_with_its_last_sequence(table):
    request = added(table, 0, n=2)
    end(table, request, 1)
    assert not table.has_finished and table.take() == []
    assert table.sequences() == request.sequences
    assert request.metrics.finished_time is None
    end(table, request, 0)
    assert table.has_finished and not table.unfinished
    assert request.metrics.finished_time is not None
    table.finish(request.sequences)  # again: nothing is given twice
    assert table.take() == [request] and table.take() == []


def test_requests_are_taken_in_the_order_in_which_they_ended(table):
    first, second, third = (added(table, i) for i in range(3))
    for request in (third, first):
        end(table, request)
    assert table.take() == [third, first]
    assert table.unfinished == {1: second}


def test_claimed_requests_are_their_owners(table):
    requests = [added(table, i) for i in range(3)]
    waiting = {0, 2}
    table.claim(waiting)
    end(table, requests[0])
    assert waiting == {2} and not table.has_finished
    end(table, requests[1])
    assert table.take() == [requests[1]]
    assert table.drop([requests[2]]) == [requests[2]] and waiting == set()
    assert table.drop(requests) == []


def test_outputs_are_known_until_the_next_ones(table):
    first, second, aborted = (added(table, i) for i in range(3))
    assert table.find(0) is first and table.find(3) is None
    end(table, first)
    assert table.find(0) is first  # not yet taken
    table.take()
    assert table.find(0) is first
    assert table.take() == [] and table.find(0) is first
    table.keep(table.drop([aborted]))
    assert table.find(2) is aborted
    end(table, second)
    table.take()
    assert [table.find(i) for i in range(3)] == [None, second, None]
    table.forget()
    assert table.find(1) is None


def test_only_the_very_request_is_dropped(table):
    """Not another of its number."""
    old = added(table, 0)
    table.drop([old])
    new = added(table, 0)
    assert table.drop([old]) == [] and table.unfinished == {0: new}


def test_sequences_of_no_request_are_passed_over(table):
    [stranger] = Request(None, [1], SamplingParams(), max_length=5).sequences
    stranger.request_id, stranger.finish_reason = 7, "stop"
    table.finish([stranger])
    assert not table.has_finished
