"""Train a patched model with accelerate and DeepSpeed, without Trainer.

deepspeed --num_gpus 2 examples/accelerate_loop.py
DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --no_local_rank examples/accelerate_loop.py
"""

import argparse

import common
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, set_seed
from torch.utils.data import DataLoader
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fluid_hf
from fluid_hf import FluidConfig


def build_model() -> Qwen3MoeForCausalLM:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3MoeConfig(vocab_size=256, **sizes, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Expert-parallel training with accelerate.")
    # Passed by the deepspeed launcher; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=4, help="passes over the data (default: 4)")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage, 0 to 3 (default: 2)")
    parser.add_argument("--output", help="folder for a plain Hugging Face checkpoint; nothing is saved without it")
    args = parser.parse_args()
    PartialState(cpu=common.start_deepspeed())  # before the Accelerator, which takes DeepSpeed for GPUs only
    plugin = DeepSpeedPlugin(zero_stage=args.stage, gradient_accumulation_steps=1, gradient_clipping=1.0)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    set_seed(0)  # every rank builds the same weights
    model = fluid_hf.patch_model(build_model(), FluidConfig())  # before the optimizer is built
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = (torch.randint(0, 200, (128, 1)) + torch.arange(32)).remainder(256)  # the samples count upwards
    loader = DataLoader(text, batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(args.epochs):
        for ids in loader:
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)  # with DeepSpeed this is also the optimizer's step
            optimizer.step()
            optimizer.zero_grad()
            stats = accelerator.unwrap_model(model).fluid.finish_batch()
        accelerator.print(f"epoch {epoch} loss {loss.item():.4f}, wgrad in windows {stats.share_inside:.0%}")
    accelerator.print(f"last loss {loss.item():.4f}")
    if args.output:
        fluid_hf.save_pretrained(accelerator.unwrap_model(model), args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
