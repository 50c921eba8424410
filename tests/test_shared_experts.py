"""Shared experts run in the communication window, and only blocks whose code is known are touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, tiny_model
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.models.shared_experts import canonical_text, find_form

pool2 = rank_pool(2)


def record_shared(rank: int, world: int, **settings: Any) -> dict[str, Any]:
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=world, **settings))
    name = list(model.fluid.layers)[-1].removesuffix(".experts")
    block = model.get_submodule(name)
    overlapped = list(model.fluid.bound_blocks)
    with model.fluid.record_events() as events:
        block.shared_expert.register_forward_hook(lambda *_: events.append((f"{name}.experts", "shared forward")))
        block.shared_expert.down_proj.weight.register_post_accumulate_grad_hook(
            lambda _: events.append((f"{name}.experts", "shared backward"))
        )
        ids = batch(rank, 2)
        model(input_ids=ids, labels=ids).loss.backward()
    model.fluid.finish_batch()
    fluid_hf.unpatch_model(model)
    assert "forward" not in vars(block)
    return {"events": [event for layer, event in events if layer == f"{name}.experts"], "overlapped": overlapped}


@pytest.mark.parametrize("waves", [1, 3])
def test_shared_expert_runs_while_rows_travel(pool2: RankPool, waves: int) -> None:
    for found in pool2.run(record_shared, waves=waves):
        at = found["events"].index
        assert at(f"post combine {waves - 1}") < at("shared forward") < at("wait combine 0")
        assert at("post output grad") < at("shared backward") < at("wait output grad 0")
        assert len(found["overlapped"]) == 2


def test_without_communication_the_block_keeps_its_forward() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=1))
    assert model.fluid.bound_blocks == []
    assert not any("forward" in vars(module) for module in model.modules())


class Renamed(Qwen2MoeSparseMoeBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Other names, the same calls."""
        b, s, h = x.shape
        flat = x.view(-1, h)
        shared = self.shared_expert(flat)
        _, w, i = self.gate(flat)
        y = self.experts(flat, i, w)
        shared = F.sigmoid(self.shared_expert_gate(flat)) * shared  # noqa: F821
        y = y + shared
        y = y.reshape(b, s, h)
        return y


class Changed(Qwen2MoeSparseMoeBlock):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states_reshaped = hidden_states.view(-1, hidden_dim)
        shared_expert_output = self.shared_expert(hidden_states_reshaped)
        _, routing_weights, selected_experts = self.gate(hidden_states_reshaped)
        expert_output = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
        shared_expert_output = torch.tanh(self.shared_expert_gate(hidden_states_reshaped)) * shared_expert_output
        expert_output = expert_output + shared_expert_output
        expert_output = expert_output.reshape(batch_size, sequence_length, hidden_dim)
        return expert_output


def test_blocks_are_known_by_their_code() -> None:
    form = find_form(Qwen2MoeSparseMoeBlock)
    assert form is not None and find_form(Renamed) is form
    assert find_form(Changed) is None
    assert find_form(MixtralSparseMoeBlock) is None  # no shared expert
    assert find_form(nn.Linear) is None


def test_a_decorated_forward_is_another_function() -> None:
    assert canonical_text("def forward(self, x):\n    return x") is not None
    assert canonical_text("@wrap\ndef forward(self, x):\n    return x") is None
