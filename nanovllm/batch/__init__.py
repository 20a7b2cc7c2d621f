"""`python -m nanovllm.batch in.jsonl out.jsonl --model DIR`: a file of requests, one a line.

The work of a night: killed at any moment and started again, it goes on where it was, and no
finished line is computed twice. Memory does not grow with the files, but for 8 bytes a line.
"""
