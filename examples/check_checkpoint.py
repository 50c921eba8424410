"""Reload a checkpoint with transformers alone: loss on held-out text, and a few generated lines.

    python examples/check_checkpoint.py examples/output/checkpoint --blocks examples/output/blocks.pt

The files are the quickstart's; with `--expect-loss`, as the quickstart starts it, it fails at another loss.
Nothing here imports fluid_hf or DeepSpeed, which is the point: what was trained with them is a plain checkpoint.
"""

import argparse
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int) -> float:
    """The mean loss over `blocks`."""
    losses = [
        model(input_ids=batch, labels=batch).loss.float() * len(batch)
        for batch in blocks.to(model.device).split(batch_size)
    ]
    return float(sum(losses)) / len(blocks)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reload a checkpoint with transformers alone.")
    parser.add_argument("checkpoint", help="folder with the model and its tokenizer")
    parser.add_argument("--blocks", required=True, help="file with the held-out token ids")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass (default: 8)")
    parser.add_argument("--expect-loss", type=float, help="fail if the held-out loss differs from this one")
    parser.add_argument("--tolerance", type=float, default=0.02, help="by more than this (default: 0.02)")
    parser.add_argument("--prompt", default="def main(", help="text to continue (default: 'def main(')")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    leaked = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    assert not leaked, f"a distributed launcher's variables are set: {leaked}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model, loading = AutoModelForCausalLM.from_pretrained(args.checkpoint, output_loading_info=True)
    wrong = {name: keys for name, keys in loading.items() if keys}
    if wrong:
        sys.exit(f"the checkpoint does not fit its own config: {wrong}")
    model.to(device).eval()
    loss = held_out_loss(model, torch.load(args.blocks)["held_out"], args.batch_size)
    print(f"reloaded {type(model).__name__}, loss on held-out text {loss:.4f}")
    if args.expect_loss is not None and not abs(loss - args.expect_loss) <= args.tolerance:
        sys.exit(f"held-out loss ({loss:.4f}) must be {args.expect_loss:.4f}, what it was before saving")
    set_seed(0)
    inputs = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False).to(device)
    output = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.6, top_k=20)
    print(f"\n--- generated from {args.prompt!r} ---\n{tokenizer.decode(output[0], skip_special_tokens=True)}\n---")
    assert "fluid_hf" not in sys.modules, "the checkpoint must load without fluid_hf"


if __name__ == "__main__":
    main()
