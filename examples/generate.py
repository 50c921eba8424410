"""Generate text with a model whose experts are split over the ranks: one that does not fit on one GPU.

    torchrun --nproc_per_node 2 examples/generate.py examples/output/checkpoint --prompt "def main("

Every rank reads only its own experts. All ranks give the same prompts to the model and get the same text.
"""

import argparse
import os

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, set_seed

import fluid_hf
from fluid_hf import FluidConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with an expert-parallel model.")
    parser.add_argument("model", help="a checkpoint folder or a model of the Hugging Face Hub")
    parser.add_argument("--prompt", nargs="+", default=["def main("], help="texts to continue (default: 'def main(')")
    parser.add_argument("--new-tokens", type=int, default=40, help="tokens to generate (default: 40)")
    parser.add_argument(
        "--sample", action="store_true", help="sample at temperature 0.6 instead of the likeliest token"
    )
    parser.add_argument("--ep-size", type=int, help="ranks that share the experts (default: as many as divide them)")
    args = parser.parse_args()
    use_cuda = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_cuda else "gloo")

    dtype = torch.bfloat16 if use_cuda else torch.float32
    model = fluid_hf.from_pretrained(args.model, FluidConfig(ep_size=args.ep_size), dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(args.prompt, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    inputs.pop("token_type_ids", None)
    set_seed(0)  # every rank must draw the same tokens: they run the same number of steps
    how = {"do_sample": True, "temperature": 0.6} if args.sample else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=args.new_tokens, **how)
    if dist.get_rank() == 0:
        for text in tokenizer.batch_decode(output, skip_special_tokens=True):
            print(f"--- {text}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
