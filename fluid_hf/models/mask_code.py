"""What the code of a model's body does about the masks of its attention layers, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass

from torch import nn

__all__ = ["MaskCode", "read_mask_code"]

MASK_ARGUMENTS = {"config", "inputs_embeds", "attention_mask"}  # of transformers' mask functions, in every body


@dataclass(frozen=True)
class MaskCode:
    """How a body calls transformers' mask functions.

    Attributes:
        by_position: with the `position_ids` [B, T] it was given, which tell packed samples apart. GPT-OSS and AFMoE do
            not, so there a token attends to the samples before its own; Ernie 4.5-VL and GLM-4V only with four rows
            of positions.
        windowed: for a sliding window too. Qwen3-Omni's text model never does, whatever its config says.
    """

    by_position: bool = True
    windowed: bool = True


def read_mask_code(body: nn.Module) -> MaskCode:
    """What the body's forward does; the usual where it cannot be read or calls no mask function."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(body).forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return MaskCode()
    given: list[dict[str, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            given.append({str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)})
        elif isinstance(node, ast.Call):
            given.append({word.arg: word.value for word in node.keywords if word.arg is not None})
    calls = [names for names in given if names.keys() >= MASK_ARGUMENTS]
    if not calls:
        return MaskCode()
    positions = [ast.unparse(names["position_ids"]) for names in calls if "position_ids" in names]
    # Bodies with several kinds of positions take those of the text from four rows, to which some expand what has two
    # dimensions.
    by_position = any(name == "position_ids" or "expand(4, position_ids.shape[0]" in source for name in positions)
    return MaskCode(by_position, "create_sliding_window_causal_mask" in source)
