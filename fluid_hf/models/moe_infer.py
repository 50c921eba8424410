"""DeepSeek's method of evaluation, `moe_infer`: rows sorted by expert. Known by its text, with or without its branches
for an expert parallelism of its own, which `ep_size` 1 rules out.
"""

from __future__ import annotations

import ast
import re

from torch import nn

from fluid_hf.models.code_reading import choose_branches
from fluid_hf.models.shared_experts import canonical_text

__all__ = ["call_of_sorted_rows"]

MOE_INFER = {
    "return {experts}({x}, {index}, {weights})": """
def moe_infer(self, x, index, weights):
    counts = index.new_zeros((index.shape[0], len(EXPERTS)))
    counts.scatter_(1, index, 1)
    num_tokens = counts.sum(dim=0)
    order = index.view(-1).argsort()
    rows = x[order // index.shape[1]]
    num_tokens = num_tokens.tolist()
    outputs = []
    start = 0
    for i, count in enumerate(num_tokens):
        end = start + count
        if count == 0:
            continue
        expert = EXPERTS[i]
        own = rows[start:end]
        output = expert(own)
        outputs.append(output)
        start = end
    joined = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
    result = torch.empty_like(joined)
    result[order] = joined
    final = (
        result.view(*index.shape, -1)
        .type(weights.dtype)
        .mul_(weights.unsqueeze(dim=-1))
        .sum(dim=1)
        .type(result.dtype)
    )
    return final
""",
    "return {experts}({x}, {index}.view({x}.shape[0], -1), {weights}.view({x}.shape[0], -1))": """
def moe_infer(self, x, index, weights):
    total = torch.zeros_like(x)
    order = index.argsort()
    ends = index.bincount().cpu().numpy().cumsum(0)
    tokens = order // self.num_experts_per_tok
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        if start == end:
            continue
        expert = EXPERTS[i]
        own = tokens[start:end]
        rows = x[own]
        output = expert(rows)
        output.mul_(weights[order[start:end]])
        total.scatter_add_(0, own.view(-1, 1).repeat(1, x.shape[-1]), output)
    return total
""",
}
# Wordings of the same.
REWORDED = (
    (r"self\.config\.", "self."),
    (r"(\w+)\.cpu\(\)\.numpy\(\)(?!\.)", r"\1.tolist()"),
    (r"\[i \+ self\.ep_rank \* self\.experts_per_rank\]", "[i]"),
    (r"\.bincount\(minlength=.+?\)\.cpu", ".bincount().cpu"),
    (r"scatter_reduce_\((.+), reduce='sum'\)", r"scatter_add_(\1)"),
    (r"(expert\w*\(\w+\))\.to\(\w+\.(?:device|dtype)\)", r"\1"),
    (r"append\((\w+)\.to\(\w+\.device\)\)", r"append(\1)"),
    (r"\n *(\w+) = \1\.to\(\w+\.dtype\)", ""),
    (r"\n *\w+ = \w+\.shape(?=\n)", ""),
)


def call_of_sorted_rows(function: ast.FunctionDef, block: nn.Module, experts: str) -> str | None:
    """The statement that such a method comes down to; `None` if it is another method.

    Args:
        function: from `function_source`.
        block: the module, for its settings.
        experts: the list of experts, as the method names it.
    """
    names = [argument.arg for argument in function.args.args]
    if len(names) != 4 or getattr(block, "ep_rank", 0) != 0:
        return None
    chosen = ast.FunctionDef(function.name, function.args, choose_branches(function.body, block), [])
    text = ast.unparse(ast.fix_missing_locations(chosen))
    for pattern, replacement in REWORDED:
        text = re.sub(pattern, replacement, text)
    for call, template in MOE_INFER.items():
        wanted = template.replace("EXPERTS", experts).replace("def moe_infer", f"def {function.name}")
        if canonical_text(wanted) == canonical_text(text):
            return call.format(experts=experts, x=names[1], index=names[2], weights=names[3])
    return None
