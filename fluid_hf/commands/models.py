"""`fluid-hf models`: the model families of the installed transformers, and what each gets."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import transformers

from fluid_hf.commands.arguments import add_json, write_whole
from fluid_hf.models.catalogue import SupportedModel, supported_models

HEAD = """# Models

Every family of transformers {version} with routed experts. "Overlapped": the shared expert runs while the rows of the
routed ones travel, wherever the block, or the decoder layer around it, calls one (tests hold each family to the order
of events, forward and backward); "not overlapped" would be: where transformers calls it. Sequence parallel: `sp_size`
over 1, for the family's plain configuration (a model with another kind of layer is refused by name). All that are
served work with DeepSpeed, too (ZeRO 0 to 3, tested with a family of each kind of experts). This page is written by
`fluid-hf models`; `fluid_hf.supported_models()` returns it as data.

Behind transformers' own expert parallelism (`ep_implementation="fluid"`) shared experts are not overlapped in any
family: it replaces the experts' forward by a function of three tensors that returns one, so a block has no way to hand
its shared expert on, and what implements the exchange is given the experts only, not the block that holds both.

Hooks on a block's experts are called as in transformers, registered before `patch_model` or after it (Llama 4, DBRX,
LongCat-Flash: after it). While experts have hooks of yours, the shared expert of their block is not overlapped.

| family | served | shared expert | sequence parallel | why not |
|---|---|---|---|---|
"""

TAIL = """
## Models with code of their own

Code from the Hub (`trust_remote_code=True`) and from before transformers 5 has one module per expert, in a
`nn.ModuleList`. Such a block is served if its code is known, whatever its classes and layers are called:

- an expert computes `down(act(gate(x)) * up(x))` or `down(act(up(x)))` between `nn.Linear` layers, with or without
  biases; gate and up may be one layer;
- the block sums each token's experts in a loop like Mixtral's (a one-hot mask or `index == e`, then `index_add_`) or
  DeepSeek's (tokens repeated, `y[index == e] = expert(...)`; `moe_infer` for evaluation).

Its router, auxiliary losses and shared experts stay the model's code. A shared expert (a child with "shared" in its
name) runs while rows travel, if the block's code lets it: it is called in straight code or under a condition that is a
setting, its arguments keep their values between its call and that of the experts, and nothing there may change them in
place. Otherwise it runs where the block calls it. The same holds for blocks with experts in transformers' way whose
code is not one of those that fluid_hf knows. Checkpoints have the model's own names and shapes, under DeepSpeed, too.
Load the whole model with transformers, then call `patch_model`; or let each rank read its own experts only:
`fluid_hf.from_pretrained(path, config, trust_remote_code=True)`.

A block with another loop is an `UnsupportedModelError` that names the method. Give it a forward with one call of all
experts, before patching; every rank must call it in every forward, also without tokens:

```python
@fluid_hf.register_block(type(model.model.layers[0].mlp))
def forward(self, hidden_states):
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    weights, index = self.gate(flat).softmax(-1).topk(self.top_k)  # as the block's own code routes
    return self.experts(flat, index, weights).view(hidden_states.shape)  # [T, H], [T, K], [T, K] -> [T, H]
```

With a function as fourth argument the experts return a pair, their result and the function's, which runs while rows
travel: `routed, shared = self.experts(flat, index, weights, lambda: self.shared_experts(flat))`.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("models", help="which model families are served, and how")
    add_json(parser, "families", "Markdown")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the page."""
    text = json.dumps([dataclasses.asdict(model) for model in supported_models()]) if options.json else ""
    if options.json and options.json != "-":
        write_whole(options.json, text)
    print(text if options.json == "-" else page().rstrip())
    return 0


def page() -> str:
    """The whole page."""
    version = ".".join(transformers.__version__.split(".")[:2])
    return HEAD.format(version=version) + "".join(_line(model) for model in supported_models()) + TAIL


def _line(model: SupportedModel) -> str:
    cells = [model.family, _yes(model.served), model.shared_expert, _yes(model.sequence_parallel), model.reason]
    return "| " + " | ".join(cells) + " |\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
