"""The seed of dropout, as the 0-d int64 tensor that ops take."""

import torch
from torch import Tensor


def seed_for(dropout_p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """None without dropout; a seed that was not given is drawn from torch's generator of the device."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    return seed_tensor(seed, device)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64, device=device)
