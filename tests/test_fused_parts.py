"""Norms, rotary embeddings and gated MLPs around the experts: which are fused, and what they compute.

Kernels on a GPU, or on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import batch, relative_error, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm4v.modeling_glm4v import Glm4VisionMlp as Glm4vVisionMlp
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRMSNorm, rotate_half

import fluid_hf
from fluid_hf import UnsupportedModelError
from fluid_hf.models import fused_parts
from fluid_hf.models.attention_forms import find_attention_form
from fluid_hf.models.fused_parts import bind_parts, gated_forward, is_fused, norm_forward, unbind_parts
from fluid_hf.moe.block_parts import fuses_norm, fuses_rotary, fuses_swiglu, rms_norm, rotary, swiglu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
needs_kernels = pytest.mark.skipif(not AVAILABLE, reason="needs Triton and a GPU, or its interpreter")


class Settings:
    hidden_size, intermediate_size, out_hidden_size, hidden_act = 24, 40, 24, "silu"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_norms_and_dense_experts_are_fused_and_given_back(family: str) -> None:
    model = tiny_model(family)
    expected = model(input_ids=batch(0, 1)).logits
    forms = {name: norm_forward for name, part in model.named_modules() if type(part).__name__.endswith("RMSNorm")}
    forms |= {name: gated_forward for name, part in model.named_modules() if type(part) is Qwen2MoeMLP}
    fluid_hf.patch_model(model)
    found = {name: vars(part)["forward"].__func__ for name, part in model.named_modules() if "forward" in vars(part)}
    attention = {name: found.pop(name) for name in list(found) if name.endswith("self_attn")}
    assert found == forms and len(forms) > 2 and len(attention) == model.config.num_hidden_layers
    assert len(set(attention.values())) == 1
    assert relative_error(model(input_ids=batch(0, 1)).logits, expected) <= 1e-5
    fluid_hf.unpatch_model(model)
    assert not any("forward" in vars(part) for part in model.modules())


def test_other_norms_and_what_somebody_patched_keep_their_forward() -> None:
    def own(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    class Scaled(Qwen3MoeRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    patched = Qwen3MoeRMSNorm(8)
    patched.forward = MethodType(own, patched)
    parts = nn.ModuleList([GemmaRMSNorm(8), Scaled(8), patched, nn.LayerNorm(8), GptOssRMSNorm(8)])
    bind_parts(parts)
    assert [is_fused(part) for part in parts] == [False] * 4 + [True]
    parts[4].forward = MethodType(own, parts[4])  # by somebody, since
    unbind_parts(parts)
    assert all(vars(part)["forward"].__func__ is own for part in (parts[4], patched))


def test_what_somebody_wrapped_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`functools.wraps` makes a wrapper read like what it wraps."""

    def halved(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = forward(self, *args, **kwargs)
            return (result[0] / 2, *result[1:]) if isinstance(result, tuple) else result / 2

        return wrapper

    model = tiny_model("qwen3_moe")
    attention = model.model.layers[0].self_attn
    assert find_attention_form(attention) is not None
    monkeypatch.setattr(Qwen3MoeRMSNorm, "forward", halved(Qwen3MoeRMSNorm.forward))
    assert find_attention_form(attention) is None, "sequence parallelism would compute the norm itself"
    for kind in (Qwen3MoeAttention, Qwen2MoeMLP):
        monkeypatch.setattr(kind, "forward", halved(kind.forward))
    expected = model(input_ids=batch(0, 1)).logits
    fluid_hf.patch_model(model)
    assert not any(map(is_fused, model.modules()))
    assert relative_error(model(input_ids=batch(0, 1)).logits, expected) <= 1e-5


def test_whatever_a_model_holds_it_is_patched_whole(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.scripted = torch.jit.script(nn.Linear(3, 3))
    spec = importlib.util.spec_from_loader("nowhere", loader=None)
    assert spec is not None
    nowhere = importlib.util.module_from_spec(spec)  # in no file, and not among the imported ones
    exec(
        "class Odd(Base):\n    def forward(self, x):\n        return x",
        vars(nowhere) | (space := {"Base": nn.Module}),
        space,
    )
    model.odd = space["Odd"]()
    model.odd.q_proj = nn.Linear(2, 2)
    fluid_hf.patch_model(model)
    assert is_fused(model.model.norm) and not is_fused(model.odd)
    fluid_hf.unpatch_model(model)


def test_a_subclass_defined_elsewhere_calls_what_its_parent_calls() -> None:
    class Attention(Qwen3MoeAttention):
        """In this file, which has neither interface nor rotary embedding by those names."""

    model = tiny_model("qwen3_moe").eval()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention
    expected = model(input_ids=batch(0, 1)).logits
    bind_parts(model)
    assert is_fused(model.model.layers[0].self_attn)
    assert torch.equal(model(input_ids=batch(0, 1)).logits, expected)


def test_callers_may_name_the_argument() -> None:
    named = Qwen2MoeMLP(Settings()), Glm4vVisionMlp(Settings()), Qwen3MoeRMSNorm(24)
    for module, name in zip(named, ("x", "hidden_state", "hidden_states"), strict=True):
        rows = torch.randn(2, 24)
        expected = module(**{name: rows})
        bind_parts(module)
        assert torch.equal(module(**{name: rows}), expected)


def test_nothing_of_it_is_left_in_copies_pickles_and_hooks() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"))
    add_hook_to_module(model.model.norm, ModelHook())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"], r=2))
    file = io.BytesIO()
    torch.save(model.model.layers[0].self_attn, file)
    fluid_hf.unpatch_model(adapted)
    remove_hook_from_module(model.model.norm)
    assert not any(map(is_fused, adapted.modules()))
    rows = torch.randn(2, adapted.config.hidden_size)
    assert torch.equal(model.model.norm(rows), type(model.model.norm).forward(model.model.norm, rows))
    file.seek(0)
    assert not is_fused(torch.load(file, weights_only=False))


def test_data_parallel_is_refused_by_name() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    layer = next(iter(model.fluid.layers.values()))
    with pytest.raises(UnsupportedModelError, match=r"cannot run under torch\.nn\.DataParallel.*one process per GPU"):
        layer._replicate_for_data_parallel()


@pytest.mark.parametrize("module", [Qwen3MoeRMSNorm(24), GptOssRMSNorm(24), Qwen2MoeMLP(Settings())])
def test_what_the_kernels_do_not_serve_is_the_modules_own(module: Any) -> None:
    rows = torch.randn(5, 24, dtype=torch.float64)
    module = module.double()
    expected = module(rows)
    bind_parts(module)
    assert is_fused(module) and torch.equal(module(rows), expected)
    unbind_parts(module)
    assert "forward" not in vars(module)


def test_hooks_on_the_activation_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = Qwen2MoeMLP(Settings()), []
    bind_parts(module)
    monkeypatch.setattr(fused_parts, "fuses_swiglu", lambda gate, up: True)
    monkeypatch.setattr(fused_parts, "swiglu", lambda gate, up: seen.append("fused") or gate)
    module(torch.randn(2, 24))
    handle = module.act_fn.register_forward_hook(lambda *_: seen.append("hook"))
    module(torch.randn(2, 24))
    handle.remove()
    module.act_fn.forward = lambda gate: seen.append("own") or gate
    module(torch.randn(2, 24))
    module.act_fn = type("SiLU", (nn.Module,), {"forward": lambda self, gate: seen.append("alike") or gate})()
    module(torch.randn(2, 24))
    assert seen == ["fused", "hook", "own", "alike"]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_attention_calls_what_transformers_calls(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and with a cache, bit for bit; and the fused embedding where it serves."""
    model = tiny_model(family).eval()
    ids, calls = batch(0, 2), []
    expected = [model(input_ids=ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)]
    bind_parts(model)
    found = [model(input_ids=ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)]
    assert all(map(torch.equal, found, expected))

    def counted(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, Any]:
        calls.append(q.shape)
        return plain_rotary(q, k, cos, sin)

    monkeypatch.setattr(fused_parts, "fuses_rotary", lambda *_: True)
    monkeypatch.setattr(fused_parts, "rotary", counted)
    assert torch.equal(model(input_ids=ids).logits, expected[0])
    assert len(calls) == model.config.num_hidden_layers
    unbind_parts(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_tensors_that_the_kernels_take_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight, heads, table = torch.randn(3, 8), torch.ones(8), torch.randn(2, 4, 3, 8), torch.randn(1, 3, 8)
    assert not fuses_norm(rows, weight) and not fuses_swiglu(rows, rows), "the plain code serves a CPU"
    assert not fuses_rotary(heads, heads, table, table)
    monkeypatch.setattr("fluid_hf.moe.block_parts.use_kernels", lambda tensor: True)
    assert fuses_norm(rows, weight) and fuses_swiglu(rows, rows) and fuses_rotary(heads, heads, table, table)
    assert not fuses_norm(rows.half(), weight) and not fuses_norm(rows[:, :4], weight)
    assert not fuses_swiglu(rows, rows.half()) and not fuses_swiglu(rows, rows[:2]) and not fuses_swiglu(rows.T, rows.T)
    others = [(heads.half(), table), (heads, table[:, :2]), (heads, table[..., :6]), (heads[..., ::2], table[..., :4])]
    others += [(heads, table.expand(3, -1, -1)), (heads, table.clone().requires_grad_())]
    for other, angles in others:
        assert not fuses_rotary(other, other, angles, angles)
    seen: list[bool] = []
    torch.func.grad(lambda gate: seen.append(fuses_swiglu(gate, gate)) or gate.sum())(rows)
    with forward_ad.dual_level():
        seen.append(fuses_swiglu(rows, rows))
    assert seen == [False, False], "the plain code: the experts refuse transforms by name later"


def test_compiled_models_are_fused_by_their_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing breaks the graph, and nothing of ours is in it."""
    model = tiny_model("qwen2_moe").model.layers[0].mlp.shared_expert
    rows = torch.randn(5, model.gate_proj.in_features)
    expected = model(rows)
    bind_parts(model)
    monkeypatch.setattr("fluid_hf.moe.block_parts.use_kernels", lambda tensor: True)
    monkeypatch.setattr("fluid_hf.moe.block_parts.kernel_module", lambda name: pytest.fail("a kernel of ours"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(rows), expected)
    norm = Qwen3MoeRMSNorm(rows.shape[1])
    expected = norm(rows)
    bind_parts(norm)
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(rows), expected)


def gradients(call: Callable[..., torch.Tensor], grad: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = call(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad.to(result.dtype))]


def compare(ours: Callable[..., Any], plain: Callable[..., Any], grad: torch.Tensor, *tensors: torch.Tensor) -> None:
    """Rounded once, or no further from float64 than the plain code is."""
    once = max(1e-6, torch.finfo(grad.dtype).eps / 2)
    found, again = gradients(ours, grad, *tensors), gradients(ours, grad, *tensors)
    theirs = gradients(plain, grad, *tensors)
    exact = gradients(plain, grad.double(), *[tensor.double() for tensor in tensors])
    for mine, second, other, right in zip(found, again, theirs, exact, strict=True):
        assert torch.equal(mine, second) and mine.dtype == grad.dtype and mine.shape == right.shape
        size = right.norm().clamp(min=1e-30)
        error, allowed = (mine - right).norm() / size, (other - right).norm() / size
        assert error <= max(1.05 * allowed, once), (error, allowed)


def plain_norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = rows if rows.dtype == torch.float64 else rows.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(rows.dtype)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [((1,), 3), ((7, 3), 24), ((2, 65, 4), 128), ((67,), 720), ((3, 5), 4096)])
def test_norm(dtype: torch.dtype, rows: tuple[int, ...], width: int) -> None:
    torch.manual_seed(width)
    x, grad = (torch.randn(*rows, width, device=DEVICE).to(dtype) for _ in range(2))
    weight = (1 + torch.randn(width, device=DEVICE) / 4).to(dtype)
    compare(lambda x, weight: rms_norm(x, weight, 1e-6), plain_norm, grad, x, weight)
    frozen = gradients(lambda x: rms_norm(x, weight, 1e-6), grad, x)
    assert torch.equal(frozen[1], gradients(lambda x, w: rms_norm(x, w, 1e-6), grad, x, weight)[1])


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 40), (129, 64), (2, 1024), (3, 4096)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(*shape, device=DEVICE).to(dtype) for _ in range(3))
    compare(swiglu, lambda gate, up: nn.functional.silu(gate) * up, grad, gate, up)


def plain_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, Any]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_projected", [True, False])
@pytest.mark.parametrize(("sizes", "tables"), [((1, 1, 1, 2), 1), ((2, 4, 37, 64), 1), ((3, 2, 16, 48), 3)])
def test_rotary(dtype: torch.dtype, as_projected: bool, sizes: tuple[int, ...], tables: int) -> None:
    torch.manual_seed(0)
    batch, heads, tokens, dim = sizes

    def new(count: int) -> torch.Tensor:
        shape = (batch, tokens, count, dim) if as_projected else (batch, count, tokens, dim)
        made = torch.randn(shape, device=DEVICE).to(dtype)
        return made.transpose(1, 2) if as_projected else made

    q, grad_q, k, grad_k = new(2 * heads), new(2 * heads), new(heads), new(heads)
    cos, sin = (torch.randn(tables, tokens, dim, device=DEVICE).to(dtype) for _ in range(2))

    def both(turn: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        return lambda q, k: torch.cat(turn(q, k, cos.to(q.dtype), sin.to(q.dtype)), 1)

    compare(both(rotary), both(plain_rotary), torch.cat([grad_q, grad_k], 1), q, k)
    assert all(out.stride() == x.stride() for out, x in zip(rotary(q, k, cos, sin), (q, k), strict=True))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_whole_models_with_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of the unpatched model; Mixtral's jitter writes to what a norm returns."""
    monkeypatch.setattr("fluid_hf.moe.block_parts.use_kernels", lambda tensor: True)
    settings = {"router_jitter_noise": 0.1} if family == "mixtral" else {}
    model, ids = tiny_model(family, **settings).train().to(DEVICE), batch(0, 2).to(DEVICE)
    found = []
    for fused in (False, True):
        if fused:
            bind_parts(model)
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *[parameter.grad.clone() for parameter in model.parameters()]])
    for ours, theirs in zip(*reversed(found), strict=True):
        assert relative_error(ours, theirs) <= 2e-5


@pytest.mark.gpu
@needs_kernels
def test_results_can_be_written_to() -> None:
    x, weight = torch.randn(2, 3, 8, device=DEVICE), torch.rand(8, device=DEVICE)

    def twice(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y = norm(x, weight)
            y *= 2
            y[:, 0] += 1
            return y

        return call

    compare(twice(lambda x, w: rms_norm(x, w, 1e-6)), twice(plain_norm), torch.randn_like(x), x, weight)


@pytest.mark.gpu
@needs_kernels
def test_without_rows() -> None:
    x, weight = torch.empty(2, 0, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    out, grad, grad_weight = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, x, weight)
    assert out.shape == grad.shape == x.shape and not grad_weight.any()
    assert all(found.shape == x.shape for found in gradients(swiglu, x, x, x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_elements_than_a_32_bit_number_tells() -> None:
    gate = torch.randn(2**15, 2**16 + 8, device=DEVICE, dtype=torch.bfloat16)
    up = torch.ones_like(gate)
    found = swiglu(gate, up)
    for row in (0, 32_750, -1):
        assert torch.allclose(found[row], nn.functional.silu(gate[row]), rtol=2e-2)
    rows = gate.view(-1, 8)
    weight = torch.ones(8, device=DEVICE, dtype=torch.bfloat16)
    assert torch.allclose(rms_norm(rows, weight, 1e-6)[-9:], plain_norm(rows[-9:], weight), rtol=2e-2)
