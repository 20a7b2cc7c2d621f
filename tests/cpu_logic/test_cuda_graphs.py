"""The batch sizes that CUDA graphs are captured for."""

import pytest

from nanovllm.engine.cuda_graphs import batch_sizes


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 9, 15, 16, 17, 256, 511, 512, 513, 700, 1024])
def test_every_batch_has_a_size_and_little_padding(max_num_seqs):
    sizes = batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for batch in range(1, max_num_seqs + 1):
        assert min(size for size in sizes if size >= batch) - batch < max(batch / 4, 16)


def test_the_default_has_few_graphs_of_many_rows():
    assert len(batch_sizes(1024)) == 32
    assert [size for size in batch_sizes(1024) if size > 480] == [512, 640, 768, 896, 1024]
