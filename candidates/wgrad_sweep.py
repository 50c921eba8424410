"""Times variants of the GEMMs that read rows by index, beside the present ones and torch's grouped_mm.

python3 candidates/wgrad_sweep.py qwen3-30b-a3b,qwen3-30b-a3b@2 [--kinds wgrad0,wgrad1,gated,...] --out FILE

A shape may have @EP behind it. Compiles everything in parallel, then times in one child process per shape, which is
started again behind a job that kills it or hangs. With TRITON_INTERPRET=1: tiny sizes in float32, results only.
"""

import argparse, json, math, multiprocessing as mp, os, subprocess, sys, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
SHAPES = {  # hidden, inner, experts, top-k
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "qwen1.5-moe-a2.7b": (2048, 1408, 60, 4),
    "qwen2-57b-a14b": (3584, 2560, 64, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
}
CPU = os.environ.get("TRITON_INTERPRET") == "1"
TINY = (96, 40, 6, 3)
if CPU:
    SHAPES = {name: TINY for name in SHAPES}
TOKENS = 60 if CPU else 8192
KINDS = ("wgrad0", "wgrad1", "gated", "down_dgrad", "first", "first_dgrad", "down")
SMALL = {"HEIGHT": 32, "COLUMNS": 32, "DEPTH": 32}


def configurations(kind):
    """(variant, options) of a kind; `tile` is rows, columns, depth, warps, stages, programs per SM."""
    out = [("torch+copy", {}), ("torch", {}), ("now", {})]
    if kind.startswith("wgrad"):
        for tile in ((128, 128, 64, 4, 3), (128, 128, 64, 4, 2), (128, 128, 32, 4, 5), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3),
                     (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (64, 256, 64, 4, 2)):  # fmt: skip
            out.append(("carried", {"tile": (*tile, 0)}))
        out.append(("carried", {"tile": (128, 128, 64, 4, 3, 0), "stream": True}))
        for tile in ((128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 3, 1), (128, 128, 64, 4, 3, 2),
                     (128, 256, 32, 8, 6, 1)):  # fmt: skip
            out.append(("persistent", {"tile": tile}))
        wide = (128, 256, 64, 8, 3, 1)
        out.append(("persistent", {"tile": wide, "stream": True}))
        out.append(("persistent", {"tile": wide, "group": 4}))
        out.append(("persistent", {"tile": wide, "load": True}))
        out.append(("persistent", {"tile": (128, 256, 64, 8, 4, 1), "load": True}))
        out.append(("persistent", {"tile": wide, "load": True, "store": True}))
        out.append(("persistent", {"tile": wide, "store": True}))
        out.append(("persistent", {"tile": (128, 256, 64, 8, 4, 1), "load": True, "store": True, "parts": 2}))
        out.append(("persistent", {"tile": (128, 128, 64, 4, 3, 2), "load": True}))
    elif kind == "gated":
        out.append(("quick", {"tile": (128, 128, 64, 8, 4, 0)}))
        for stages in (3, 4):
            out.append(("joined", {"tile": (128, 128, 64, 8, stages, 0)}))
            out.append(("joined", {"tile": (128, 128, 64, 8, stages, 0), "tma": True}))
        out.append(("joined", {"tile": (128, 128, 64, 8, 4, 0), "tma": True, "stream": True}))
        out.append(("joined", {"tile": (128, 64, 64, 4, 3, 0), "tma": True}))
        for stages in (3, 4):
            out.append(("persistent", {"tile": (128, 128, 64, 8, stages, 1)}))
            out.append(("persistent", {"tile": (128, 128, 64, 8, stages, 1), "tma": True}))
    else:
        out.append(("quick", {"tile": (128, 256, 64, 8, 4, 0)}))
        out.append(("quick", {"tile": (128, 256, 64, 8, 3, 0)}))
        out.append(("quick", {"tile": (128, 256, 64, 8, 4, 0), "tma": True}))
        out.append(("quick", {"tile": (128, 128, 64, 4, 3, 0), "tma": True}))
        for stages in (3, 4):
            out.append(("persistent", {"tile": (128, 256, 64, 8, stages, 1)}))
            out.append(("persistent", {"tile": (128, 256, 64, 8, stages, 1), "tma": True}))
    return out


class Case:
    """Operands; with `small`, of a size that only serves compiling."""

    def __init__(self, name, small=False):
        import torch

        self.torch, self.name = torch, name
        name, _, ep = name.partition("@")
        ep = int(ep or 1)
        self.H, self.I, everyone, self.K = SHAPES[name]
        self.E = everyone // ep
        self.device = "cpu" if CPU else "cuda"
        self.dtype = torch.float32 if CPU else torch.bfloat16
        rand = torch.Generator(device=self.device).manual_seed(0)

        def normal(*shape, scale=1.0):
            if small and scale != 1.0:  # weights: never read then, and large
                return torch.empty(1, dtype=self.dtype, device=self.device).expand(shape)
            if small:
                return torch.empty(*shape, dtype=self.dtype, device=self.device)
            return (torch.randn(*shape, generator=rand, device=self.device) * scale).to(self.dtype)

        tokens = 8 if small else TOKENS * ep
        index = torch.rand(tokens, everyone, generator=rand, device=self.device).argsort(1)[:, : self.K]
        flat = index.reshape(-1)
        if CPU:
            flat[flat == 2] = self.E  # an expert without pairs
        order = torch.argsort(flat, stable=True)
        order = order[: int((flat < self.E).sum())]
        self.S = order.numel()
        self.offsets = torch.bincount(flat[flat < self.E], minlength=self.E).cumsum(0).int()
        self.pair_row, self.pair_slot = (order // self.K).int(), order.int()
        self.rows, self.dy = normal(tokens, self.H), normal(tokens, self.H)
        self.weights = torch.rand(tokens, self.K, generator=rand, device=self.device)
        scale = self.H**-0.5
        self.gate_up, self.down = normal(self.E, 2 * self.I, self.H, scale=scale), normal(self.E, self.H, self.I, scale=scale)
        self.gp, self.hid = normal(self.S, 2 * self.I), normal(self.S, self.I)
        self.small = small

    @property
    def sms(self):
        return 3 if CPU else self.torch.cuda.get_device_properties(0).multi_processor_count

    def new(self, *shape):
        if self.small:
            return self.torch.empty(1, dtype=self.dtype, device=self.device).expand(shape)
        return self.torch.empty(*shape, dtype=self.dtype, device=self.device)

    def operands(self, kind):
        """Gathered rows, whether they are gathered, the other operand, flops."""
        two, one = 4 * self.S * self.H * self.I, 2 * self.S * self.H * self.I
        return {
            "wgrad0": (self.rows, True, self.gp, two),
            "wgrad1": (self.dy, True, self.hid, one),
            "gated": (self.rows, True, self.gate_up, two),
            "first": (self.rows, True, self.gate_up, two),
            "down_dgrad": (self.dy, True, self.down, one),
            "first_dgrad": (self.gp, False, self.gate_up, two),
            "down": (self.hid, False, self.down, one),
        }[kind]


def prepare(case, kind, variant, options):
    """A function that computes the variant; called with `compile_only` it compiles without a launch."""
    import torch

    rows, gathers, other, _ = case.operands(kind)
    if variant.startswith("torch"):
        return torch_way(case, kind, rows, gathers, other, variant == "torch+copy")
    if variant == "now":
        return present_way(case, kind, rows, gathers, other)
    height, columns, depth, warps, stages, each = options["tile"]
    if CPU:
        height = columns = depth = 32
    ways = {"wgrad0": wgrad_way, "wgrad1": wgrad_way, "gated": gated_way}
    return ways.get(kind, linear_way)(case, kind, variant, options, (height, columns, depth, warps, stages, each))


def grouped(torch, left, right, offsets):
    if not CPU:
        return torch.nn.functional.grouped_mm(left, right, offs=offsets)
    out, low = [], 0
    for expert, high in enumerate(offsets.tolist()):
        if right.dim() == 2:
            out.append(left[:, low:high] @ right[low:high])
        else:
            out.append(left[low:high] @ right[expert])
        low = high
    return torch.stack(out) if right.dim() == 2 else torch.cat(out)


def torch_way(case, kind, rows, gathers, other, copies):
    torch = case.torch

    def copy():
        if not gathers:
            return rows
        if CPU:
            return rows[case.pair_row.long()]
        from fluid_hf.moe import row_kernels

        return row_kernels.expand(rows, case.pair_row)

    kept = None if copies or case.small else copy()

    def run(compile_only=False):
        if compile_only:
            return None
        pairs = copy() if copies else kept
        if kind == "wgrad0":
            return grouped(torch, other.t(), pairs, case.offsets)
        if kind == "wgrad1":
            return grouped(torch, pairs.t(), other, case.offsets)
        if kind == "gated":
            first = grouped(torch, pairs, other.transpose(1, 2), case.offsets)
            if not copies:
                return first
            if CPU:
                weight = case.weights.reshape(-1)[case.pair_slot.long()]
                return first, torch.nn.functional.silu(first[:, : case.I]) * first[:, case.I :] * weight[:, None]
            from fluid_hf.moe import row_kernels

            return first, row_kernels.glu_forward((first,), case.weights, case.pair_slot)
        return grouped(torch, pairs, other if kind.endswith("dgrad") else other.transpose(1, 2), case.offsets)

    return run


class OnlyCompiles:
    """In place of a fluid_hf.launch.Kernel, in the processes that only compile."""

    def __init__(self, kernel):
        self._function = kernel._function

    def __call__(self, grid, pointers, integers, constants, warps=4, stages=3):
        args = (*pointers, *integers, *constants)
        self._function.warmup(*args, grid=grid, num_warps=warps, num_stages=stages)


def present_way(case, kind, rows, gathers, other):
    def run(compile_only=False):
        from fluid_hf.moe import gemm_kernels as gk

        if compile_only:
            for name in ("_gated", "_linear", "_wgrad"):
                setattr(gk, name, OnlyCompiles(getattr(gk, name)))
        if kind.startswith("wgrad"):
            return gk.gathered_wgrad(rows, case.pair_row, 0, other, case.offsets, kind == "wgrad1")
        if kind == "gated":
            kept, hidden = gk.gated_linear(
                rows, case.pair_row, case.pair_slot, case.offsets, (other,), case.weights, True
            )
            return kept[0], hidden
        pair_row = case.pair_row if gathers else None
        return gk.gathered_linear(rows, pair_row, case.offsets, other, kind.endswith("dgrad"))

    return run


def launcher(kernel, grid, arguments, warps, stages, result):
    """`arguments` makes the arguments and the result anew, as a caller has to."""

    def run(compile_only=False):
        args = arguments()
        if compile_only:
            return kernel.warmup(*args, grid=grid, num_warps=warps, num_stages=stages)
        kernel[grid](*args, num_warps=warps, num_stages=stages)
        return result(args)

    return run


def blocks(size, block):
    return -(-size // block)


def power(size):
    return 1 << max(0, size - 1).bit_length()


def base(case, tensor, shape):
    """A tensor of the right shape for a descriptor, without memory behind it when compiling."""
    return tensor.new_empty(1).as_strided((1,), (1,)) if case.small else tensor


def descriptor(case, tensor, shape, strides, block):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base(case, tensor, shape), list(shape), list(strides), list(block))


def ragged(case, tensor, block):
    """As triton.tools.ragged_tma.create_ragged_descriptor, for a contiguous [S, N]."""
    stride, billion, most = tensor.shape[1], 2**30, 0x7FFF0000
    shape = [most, most, billion, tensor.shape[1]]
    return descriptor(case, tensor, shape, [2**34 - stride, stride, stride, 1], [1, 1, *block])


def wgrad_way(case, kind, variant, options, tile):
    import variants_wgrad as v

    height, columns, depth, warps, stages, each = tile
    rows, _, other, _ = case.operands(kind)
    first = kind == "wgrad1"
    width = other.shape[1]
    tall, wide = (case.H, width) if first else (width, case.H)
    tiles = case.E * blocks(tall, height) * blocks(wide, columns)
    group, stream = options.get("group", 8), options.get("stream", False)
    if variant == "carried":

        def arguments():
            out = case.new(case.E, tall, wide)
            return (rows, case.pair_row, other, case.offsets, out, case.H, 0, case.H, width, first, height, columns,
                    depth, group, stream)  # fmt: skip

        return launcher(v.wgrad_carried, (tiles, 1, 1), arguments, warps, stages, lambda args: args[4])
    programs = min(tiles, case.sms * each)
    load, store, parts = options.get("load", False), options.get("store", False), options.get("parts", 1)

    def arguments():
        out = case.new(case.E, tall, wide)
        reads = ragged(case, other, (depth, columns if first else height)) if load else other
        to = out
        if store:
            to = descriptor(case, out, out.shape, (tall * wide, wide, 1), (1, height, columns // parts))
        return (rows, case.pair_row, reads, case.offsets, to, case.H, 0, case.H, width, first, case.E, power(case.E),
                programs, load, store, parts, height, columns, depth, group, stream)  # fmt: skip

    def result(args):
        return args[4].base if store else args[4]

    return launcher(v.wgrad_persistent, (programs, 1, 1), arguments, warps, stages, result)


def gated_way(case, kind, variant, options, tile):
    import variants_forward as v

    height, columns, depth, warps, stages, each = tile
    inner, tma, stream = case.I, options.get("tma", False), options.get("stream", False)
    most = (case.S // height + case.E) * blocks(inner, columns)
    programs = min(most, case.sms * each)
    kernel = {"quick": v.gated_quick, "joined": v.gated_joined, "persistent": v.gated_persistent}[variant]

    def arguments():
        kept, out = case.new(case.S, 2 * inner), case.new(case.S, inner)
        gate = case.gate_up
        if tma:
            shape, strides = (case.E, 2, inner, case.H), (2 * inner * case.H, inner * case.H, case.H, 1)
            gate = descriptor(case, case.gate_up, shape, strides, (1, 2, columns, depth))
        start = (case.rows, case.pair_row, case.pair_slot, case.offsets, gate, case.gate_up, case.weights, kept, kept,
                 out, case.S, case.H, case.H, inner, 2 * inner, case.K, case.K, case.E, power(case.E), True, tma, stream)  # fmt: skip
        return start + ((programs,) if variant == "persistent" else ()) + (height, columns, depth, 16)

    grid = (programs if variant == "persistent" else most, 1, 1)
    return launcher(kernel, grid, arguments, warps, stages, lambda args: (args[7], args[9]))


def linear_way(case, kind, variant, options, tile):
    import variants_forward as v

    height, columns, depth, warps, stages, each = tile
    rows, gathers, weight, _ = case.operands(kind)
    transposed, tma = kind.endswith("dgrad"), options.get("tma", False)
    hidden, width = (weight.shape[1], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[1])
    most = (case.S // height + case.E) * blocks(width, columns)
    programs = min(most, case.sms * each)

    def arguments():
        out = case.new(case.S, width)
        reads = weight
        if tma:
            block = (depth, columns) if transposed else (columns, depth)
            shape = (weight.shape[0] * weight.shape[1], weight.shape[2])
            reads = descriptor(case, weight, shape, (weight.shape[2], 1), block)
        start = (rows, case.pair_row, case.offsets, reads, out, case.S, rows.shape[1], hidden, width, transposed, gathers,
                 case.E, power(case.E), tma)  # fmt: skip
        return start + ((programs,) if variant == "persistent" else ()) + (height, columns, depth, 16)

    kernel = v.linear_persistent if variant == "persistent" else v.linear_quick
    grid = (programs if variant == "persistent" else most, 1, 1)
    if tma and hidden % depth:
        raise ValueError(f"hidden ({hidden}) must be a multiple of the depth ({depth})")
    return launcher(kernel, grid, arguments, warps, stages, lambda args: args[4])


def error(ours, theirs):
    ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
    worst = 0.0
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape, (a.shape, b.shape)
        a, b = a.float(), b.float()
        found = float((a - b).norm() / b.norm().clamp_min(1e-20))
        worst = max(worst, found if math.isfinite(found) else math.inf)
    return worst


def milliseconds(torch, function, calls=10):
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(3_000_000)  # the host is ahead
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return min(times)


def jobs_of(name, kinds):
    return [(name, kind, variant, options) for kind in kinds for variant, options in configurations(kind)]


def compile_part(work):
    """Compiles every `count`-th job, from `part`."""
    names, kinds, part, count = work
    done, cases = 0, {}
    jobs = [job for name in names for job in jobs_of(name, kinds) if not job[2].startswith("torch")]
    for index, (name, kind, variant, options) in enumerate(jobs):
        if index % count != part:
            continue
        try:
            if name not in cases:
                cases[name] = Case(name, small=True)
            prepare(cases[name], kind, variant, options)(compile_only=True)
            done += 1
        except Exception as problem:  # noqa: BLE001
            print("compile", name, kind, variant, options, repr(problem)[:200], flush=True)
    return done


def child(name, kinds, skip):
    """Times the jobs of a shape behind the first `skip`; a line of JSON before and behind each."""
    case, expected = Case(name), {}
    torch = case.torch
    for index, (_, kind, variant, options) in enumerate(jobs_of(name, kinds)):
        if index < skip:
            continue
        print(json.dumps({"start": index}), flush=True)
        if os.environ.get("SWEEP_TEST_CRASH") == str(index):
            os._exit(9)
        row = {"shape": name, "kind": kind, "variant": variant, "options": options}
        try:
            if kind not in expected:
                expected = {kind: prepare(case, kind, "torch+copy", {})()}
            run = prepare(case, kind, variant, options)
            reference = expected[kind][0] if (kind, variant) == ("gated", "torch") else expected[kind]
            row["error"] = error(run(), reference)
            if not CPU:
                row["ms"] = milliseconds(torch, run)
                row["tflops"] = case.operands(kind)[3] / row["ms"] / 1e9
        except Exception as problem:  # noqa: BLE001
            row["problem"] = repr(problem)[:300]
        print(json.dumps(row), flush=True)
        if "CUDA error" in row.get("problem", "") or "AcceleratorError" in row.get("problem", ""):
            os._exit(3)  # nothing works in this process any more


def drive(name, kinds, limit):
    """Runs children until every job of a shape was tried."""
    rows, skip, total = [], 0, len(jobs_of(name, kinds))
    while skip < total:
        began = skip
        command = [sys.executable, os.path.abspath(__file__), name, "--kinds", ",".join(kinds), "--child", str(skip)]
        child_process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        last = [time.time()]
        over = threading.Event()

        def watch():
            while not over.wait(1):
                if time.time() - last[0] > limit:
                    child_process.kill()

        thread = threading.Thread(target=watch)
        thread.start()
        running = None
        for line in child_process.stdout:
            last[0] = time.time()
            if not line.startswith("{"):
                print(line.rstrip(), flush=True)
                continue
            found = json.loads(line)
            if "start" in found:
                running, skip = found["start"], found["start"] + 1
                continue
            running = None
            rows.append(found)
            show(found)
        over.set()
        thread.join()
        code = child_process.wait()
        if running is not None:
            job = jobs_of(name, kinds)[running]
            rows.append({"shape": name, "kind": job[1], "variant": job[2], "options": job[3], "problem": f"died: {code}"})
            show(rows[-1])
        elif code == 0:
            break
        elif skip == began:
            print("no job could be started", name, code)
            break
    return rows


def show(row):
    what = f"{row['shape']:20s} {row['kind']:11s} {row['variant']:10s} {str(row['options']):74s}"
    if "problem" in row:
        print(what, "PROBLEM", row["problem"][:160], flush=True)
    elif "ms" in row:
        bad = "" if row["error"] < 1e-2 else "  WRONG"
        print(f"{what} {row['ms'] * 1e3:7.0f} us {row['tflops']:5.0f} TFLOP/s  error {row['error']:.1e}{bad}", flush=True)
    else:
        bad = "" if row["error"] < 1e-5 else "  WRONG"
        print(f"{what} error {row['error']:.1e}{bad}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes")
    parser.add_argument("--kinds", default="wgrad0,wgrad1,gated,down_dgrad")
    parser.add_argument("--out")
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--limit", type=float, default=45, help="seconds without a result before a child is ended")
    parser.add_argument("--child", type=int)
    args = parser.parse_args()
    names, kinds = args.shapes.split(","), args.kinds.split(",")
    if args.child is not None:
        child(names[0], kinds, args.child)
        return
    begin = time.time()
    if not CPU:
        work = [(names, kinds, part, args.processes) for part in range(args.processes)]
        with mp.get_context("spawn").Pool(args.processes) as pool:
            count = sum(pool.map(compile_part, work, chunksize=1))
        print(f"{count} kernels compiled in {time.time() - begin:.0f} s", flush=True)
    rows = []
    for name in names:
        rows += drive(name, kinds, args.limit)
        if args.out:
            with open(args.out, "w") as file:
                json.dump(rows, file, indent=1)
    best = {}
    for row in rows:
        if "ms" in row and row["error"] < 1e-2:
            best.setdefault((row["shape"], row["kind"]), []).append(row)
    for key, found in best.items():
        print("\n", *key)
        for row in sorted(found, key=lambda row: row["ms"])[:6]:
            show(row)
        for row in found:
            if row["variant"] in ("torch+copy", "torch", "now"):
                show(row)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
