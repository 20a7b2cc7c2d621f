"""Requests to tokens: queues, blocks, steps, ranks."""
