"""Seeds of sequences whose requests name none."""

import hashlib


def derived_seed(engine_seed: int, request_id: int, index: int) -> int:
    """64 bits that differ for every sequence of an engine, and between engine seeds."""
    message = engine_seed.to_bytes(8, "little", signed=True) + request_id.to_bytes(8, "little")
    if index:
        message += index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
