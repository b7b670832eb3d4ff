"""Where randomness comes from: every draw is a pure function of the run's seed and what it is for.

No generator's state is carried from step to step, so a resumed run has none to restore, and the draws of a step are the
same on any number of processes.
"""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(0, "order", epoch)`; different purposes are independent."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose: the same numbers whatever device they are used on."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
