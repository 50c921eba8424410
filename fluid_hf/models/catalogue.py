"""Which model families of the installed transformers fluid_hf serves, read from transformers' source unloaded."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.utils import logging

from fluid_hf.models.expert_formats import SCALED_INPUT
from fluid_hf.models.in_place import OwnCalls, called
from fluid_hf.models.shared_calls import SharedCalls
from fluid_hf.models.shared_experts import has_form

__all__ = ["SupportedModel", "supported_models"]

# Families whose attention can run sequence parallel (`fluid_hf.models.attention` checks each model by itself).
SEQUENCE_PARALLEL = frozenset(
    """
    afmoe aria beam cohere2_moe deepseek_ocr2 dots1 ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4
    glm4_moe glm4v_moe gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 kolibri1 laguna
    mellum mimo_v2_flash minimax_m2 minimax_m3_vl mixtral muse_spark olmoe phimoe qwen2_moe qwen3_moe qwen3_omni_moe
    qwen3_vl_moe solar_open step3p7
""".split()
)

NOT_SERVED = {
    "aria": "in this version of transformers its experts take the router's logits, and route and sort by themselves",
    "doge": "an expert is one row of an embedding, picked among thousands: a look-up, not a projection to split",
    "jetmoe": "experts are called on rows already sorted by expert, and attention has experts as well",
    "nllb_moe": "encoder-decoder with one module per expert and a capacity that drops tokens over the whole batch",
    "switch_transformers": "encoder-decoder with one module per expert and a capacity that drops tokens",
}
# Experts that follow transformers' interface by their shape alone, or are known by their code.
UNDECORATED = {
    "dbrx": "DbrxExperts",
    "llama4": SCALED_INPUT[0],
    "longcat_flash": "LongcatFlashExperts",
    "step3p7": "Step3p7Experts",
}


@dataclass(frozen=True)
class SupportedModel:
    """One model family.

    Attributes:
        family: folder of transformers' models.
        served: whether `patch_model` makes its experts expert parallel.
        shared_expert: "overlapped" (it runs while rows travel), "not overlapped" (it runs where transformers calls
            it), or "none".
        sequence_parallel: whether `sp_size` over 1 is available.
        reason: why it is not served, else empty.
    """

    family: str
    served: bool
    shared_expert: str
    sequence_parallel: bool
    reason: str = ""


def supported_models() -> list[SupportedModel]:
    """All families of the installed transformers with routed experts, by name.

    A family that is not listed has no experts, or none that are known.
    """
    folder = Path(transformers.__file__).parent / "models"
    found = []
    paths = sorted(folder.glob("*/modeling_*.py"))
    for path in logging.tqdm(paths, desc="Reading models", delay=2, leave=False, disable=None):
        family = path.parent.name
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" in source or family in UNDECORATED:
            overlap = _shared_expert(source, UNDECORATED.get(family))
            found.append(SupportedModel(family, True, overlap, family in SEQUENCE_PARALLEL))
        elif family in NOT_SERVED:
            found.append(SupportedModel(family, False, "none", False, NOT_SERVED[family]))
    return found


def _shared_expert(source: str, undecorated: str | None) -> str:
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    experts = {
        name
        for name, node in classes.items()
        if name == undecorated or any("use_experts_implementation" in ast.unparse(d) for d in node.decorator_list)
    }
    blocks = {name for name, node in classes.items() if name not in experts and _children(node, experts)}
    states = set()
    for node in classes.values():
        routed = _children(node, experts) | _children(node, blocks)
        forward = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "forward"), None)
        calls = {called(n) or "" for n in ast.walk(forward)} if forward is not None else set()
        shared = {name for name in calls if name.startswith("shared_") and not name.endswith("gate")}
        if "experts" in routed:
            shared |= calls & {"mlp"}
        if forward is not None and routed & calls and shared:
            known = has_form(ast.unparse(forward)) or _can_put_off(forward, _children(node, experts), routed, shared)
            states.add("overlapped" if known else "not overlapped")
    if not states:
        return "not overlapped" if "self.shared_expert" in source or "self.shared_mlp" in source else "none"
    return "overlapped" if states == {"overlapped"} else "not overlapped"


def _children(node: ast.ClassDef, classes: set[str]) -> set[str]:
    """Names of the children of a module that are of these classes."""
    made = [n for n in ast.walk(node) if isinstance(n, ast.Assign) and len(n.targets) == 1]
    found = {ast.unparse(n.targets[0]) for n in made for c in ast.walk(n.value) if getattr(c, "id", None) in classes}
    return {name.removeprefix("self.") for name in found if name.startswith("self.")}


def _can_put_off(forward: ast.FunctionDef, experts: set[str], routed: set[str], shared: set[str]) -> bool:
    """Whether the source of a forward lets its shared experts be put off; tests hold every family to it."""
    own = OwnCalls(lambda name: True, lambda name: name in routed)
    calls = SharedCalls(next(iter(experts), None), frozenset(routed - experts), frozenset(shared), own)
    return calls.rewrite(copy.deepcopy(forward))
