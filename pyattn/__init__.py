"""pyattn: one typed contract for attention and its kin in PyTorch, on CPU and GPU.

The layers, downwards; a call goes through them in this order::

    attention.py  losses.py      public functions: types, checks, autograd; nn/ has them as modules
      embedding.py  rnn.py
      _types.py  _checks.py      what annotations say, and what they cannot
      masks.py  _problem.py      attention's operands and scalars
      _dispatch.py               which backend runs it, and why the others refuse
      _attention_backends.py     what runs attention
      _cross_entropy.py          operands and scalars of cross-entropy, and what runs it
      _embedding_bag.py          the same of the embedding bag
      _linear_cross_entropy.py   the same with the linear layer before it
      _lstm.py                   the same of the LSTM
        csrc/                    C++ kernels (pyattn._C), one variant per instruction set
        kernels/                 Triton kernels (pyattn.kernels)
        reference.py             the definition, in plain PyTorch
    _ops.py  _transforms.py      the same ops for torch.compile and export, and for torch.func
    _cross_entropy_ops.py  _linear_cross_entropy_ops.py  _embedding_bag_ops.py  _lstm_ops.py
"""

import torch as _torch  # first: the extension then shares torch's OpenMP pool

try:
    from . import _C as _C
except ModuleNotFoundError as error:
    raise ImportError(
        "pyattn's C++ core (pyattn._C) is not built. In the repository: pip install -e . (it takes a C++17 compiler)"
    ) from error

from . import _cross_entropy_ops as _cross_entropy_ops
from . import _embedding_bag_ops as _embedding_bag_ops
from . import _linear_cross_entropy_ops as _linear_cross_entropy_ops
from . import _lstm_ops as _lstm_ops
from . import _ops as _ops
from . import nn as nn
from ._checks import DeviceError, DtypeError, ShapeError
from ._dispatch import Explanation, explain, show_config, use_backend
from .attention import (
    attention,
    attention_with_lse,
    compute_attention,
    dropout_mask,
    scaled_dot_product_attention,
)
from .embedding import embedding_bag
from .losses import cross_entropy, linear_cross_entropy
from .masks import Causal
from .rnn import lstm

__all__ = [
    "Causal",
    "DeviceError",
    "DtypeError",
    "Explanation",
    "ShapeError",
    "attention",
    "attention_with_lse",
    "compute_attention",
    "cross_entropy",
    "dropout_mask",
    "embedding_bag",
    "explain",
    "linear_cross_entropy",
    "lstm",
    "nn",
    "scaled_dot_product_attention",
    "show_config",
    "use_backend",
]

del _torch
