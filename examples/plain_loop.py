"""Train a patched model in a plain PyTorch loop: no Trainer, no DeepSpeed engine.

torchrun --nproc_per_node 2 examples/plain_loop.py --steps 20
"""

import argparse
import os

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fluid_hf
from fluid_hf import FluidConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Expert-parallel training in plain PyTorch.")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--output", help="folder for a plain Hugging Face checkpoint; nothing is saved without it")
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    use_cuda = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_cuda else "gloo")

    torch.manual_seed(0)  # the same weights on every rank
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3MoeConfig(vocab_size=256, **sizes, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2)
    model = fluid_hf.patch_model(Qwen3MoeForCausalLM(config).to(device), FluidConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(rank)  # every rank has its own data
    start = torch.randint(0, 200, (8, 1), generator=generator)
    ids = (start + torch.arange(32)).remainder(256).to(device)
    for step in range(args.steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # every gradient is complete here
        model.fluid.reduce_gradients(model)  # what DDP or DeepSpeed would do
        stats = model.fluid.finish_batch()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 5 == 0:
            print(f"step {step} loss {loss.item():.4f}, wgrad in windows {stats.share_inside:.0%}", flush=True)
    if rank == 0:
        print(f"last loss {loss.item():.4f}")
    if args.output:
        fluid_hf.save_pretrained(model, args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
