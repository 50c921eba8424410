"""transformers' flash and flex attention on CPUs, for tests: their own code around kernels in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as hf_flex


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> torch.Tensor:
    """`flash_attn_func` on [B, T, n, D]."""
    assert causal and q.shape[1] == k.shape[1] and q.shape[2] % k.shape[2] == 0 and dropout_p == 0
    places = torch.arange(q.shape[1])
    distance = places[:, None] - places
    seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    core = torch.nn.functional.scaled_dot_product_attention
    return core(q.transpose(1, 2), k, v, attn_mask=seen, scale=softmax_scale).transpose(1, 2)


def flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> torch.Tensor:
    """`flash_attn_varlen_func` on [tokens, n, D]."""
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) == len(k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    bounds = cu_seqlens_q.tolist()
    found = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = [x[None, start:end] for x in (q, k, v)]
        found.append(flash(*part, dropout_p, softmax_scale, causal, window_size, deterministic)[0])
    return torch.cat(found)


@contextlib.contextmanager
def installed(implementation: str, *, once: bool) -> Iterator[None]:
    """Let an attention function run here.

    Args:
        once: forbid flash attention to look for packed samples in each layer.
    """
    patches: list[Any] = []
    if implementation.startswith("flash_attention"):
        process = flash_utils._lazy_define_process_function(flash_varlen)
        functions = (flash, flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
        found = functions, (process, process)
        patches.append(mock.patch.object(flash_utils, "lazy_import_flash_attention", lambda *args: found))
        if once:
            look = flash_utils._is_packed_sequence

            def looked(position_ids: Any, batch_size: int) -> Any:
                assert position_ids is None, "looked for packed samples in a layer"
                return look(position_ids, batch_size)

            patches.append(mock.patch.object(flash_utils, "_is_packed_sequence", looked))
    if implementation == "flex_attention":

        def uncompiled(*args: Any, training: bool = False, **kwargs: Any) -> Any:
            return torch_flex.flex_attention(*args, **kwargs)

        def make_mask(*args: Any, **kwargs: Any) -> Any:
            return torch_flex.create_block_mask(*args, **{**kwargs, "_compile": False})

        # PyTorch refuses the backward pass on CPUs for the compiled kernel's sake.
        patches.append(mock.patch.object(torch_flex, "_validate_device", lambda *args: None))
        patches.append(mock.patch.object(hf_flex, "compile_friendly_flex_attention", uncompiled))
        patches.append(mock.patch.object(masking_utils, "create_block_mask", make_mask))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
