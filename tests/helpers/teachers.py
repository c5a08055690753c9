"""Teachers in files."""

import warnings

import torch

SHAPE = (1, 8, 8)


def scripted(module, path, *, example=None, frozen=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.trace(module, torch.randn(2, *SHAPE) if example is None else example)
        torch.jit.save(torch.jit.freeze(made.eval()) if frozen else made, path)
    return str(path)
