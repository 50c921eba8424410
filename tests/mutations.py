"""Small faults planted one by one in a copy of the package; each must be caught by the quick test named beside it.

    python tests/mutations.py                 all of them; prints what was missed, exits with 1 if any was
    python tests/mutations.py --only wave     those whose file or text contains a word
    python tests/mutations.py --json FILE     also writes the outcomes; what is in the file already is not run again

A fault whose text is not in the file any more is an error too: the list must follow the code. So is a test that fails
without a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import ROOT, fork_context

TIMEOUT = 120  # seconds for a test; over that it counts as failed


@dataclass(frozen=True)
class Mutation:
    """One fault: in `file`, `old` (which must be there) becomes `new`; `test` must fail."""

    file: str
    old: str
    new: str
    test: str


PROPERTIES = "tests/test_properties.py::test_"
TRUST = "tests/test_trust.py::test_"
RANKS = "tests/test_expert_parallel.py::test_two_ranks"
FAULTS = "tests/test_faults.py::test_"
COMBINATIONS = "tests/test_combinations.py::test_"
PARTS = "tests/test_fused_parts.py::test_"
CHANGED = "tests/test_sequence_modules.py::test_what"
AGAIN = "tests/test_recomputation.py::test_"
MUTATIONS = (
    # around the experts: another forward than the module's, parts that were somebody's own
    Mutation(
        "models/fused_parts.py", "q, k = self.q_norm(q), self.k_norm(k)", "q = self.q_norm(q)", PARTS + "attention"
    ),
    Mutation("models/fused_parts.py", "k, v = past_key_values.update(", "past_key_values.update(", PARTS + "attention"),
    Mutation("models/fused_parts.py", "self.act_fn(gate) * up", "self.act_fn(up) * gate", PARTS + "what_the_kernels"),
    Mutation("models/fused_parts.py", 'and "forward" not in vars(module)', "", PARTS + "other_norms"),
    Mutation("models/fused_parts.py", "if is_fused(module):", "if True:", PARTS + "other_norms"),
    Mutation("models/shared_experts.py", 'if hasattr(method, "__wrapped__"):', "if False:", PARTS + "what_somebody"),
    Mutation("models/attention_forms.py", 'not hasattr(method, "__wrapped__") and ', "", PARTS + "what_somebody"),
    Mutation("models/fused_parts.py", "return form if same else None", "return form", PARTS + "callers"),
    Mutation("models/fused_parts.py", 'vars(module).get("_old_forward")', "None", PARTS + "nothing_of_it"),
    # what somebody changed of a layer's parts, and what runs again in backward
    Mutation("models/sequence_parallel.py", 'if "forward" in module.__dict__ and', "if False and", CHANGED),
    Mutation("models/sequence_parallel.py", "if type(module) is not kind or", "if", CHANGED),
    Mutation("models/sequence_inputs.py", '"ds_id"', '"dtype"', CHANGED),
    Mutation("models/attention.py", "if heads:", "if False:", "tests/test_sequence_modules.py::test_heads"),
    Mutation("nodes.py", "if torch._C._len_torch_dispatch_stack()", "if False", AGAIN + "selective"),
    Mutation("nodes.py", "for mode in others:", "for mode in ():", AGAIN + "other_modes"),
    Mutation("models/put_off.py", "(call.done and not again)", "call.done", AGAIN + "parts"),
    Mutation("models/expert_hooks.py", 'if "forward" in state and', "if False and", AGAIN + "parts"),
    # comm: wrong peers, off-by-one in splits, rows of the wrong rank
    Mutation("comm/tournament.py", "(round_index - rank) % last", "(round_index + rank) % last", PROPERTIES + "tourn"),
    Mutation("comm/tournament.py", "size - 1 + size % 2", "size - 1", PROPERTIES + "tournament"),
    Mutation(
        "comm/tournament.py", "rows * (part + 1) // parts", "(rows * part + 1) // parts", PROPERTIES + "parts_cover"
    ),
    Mutation(
        "comm/tournament.py",
        "for part in range(parts) for index",
        "for part in range(1) for index",
        PROPERTIES + "waves",
    ),
    Mutation("comm/tournament.py", "if peer is not None)", "if peer)", PROPERTIES + "waves"),
    Mutation(
        "comm/row_route.py",
        "sent_starts[peer] + low, sent_starts[peer] + high",
        "sent_starts[peer + 1] + low, sent_starts[peer + 1] + high",
        "tests/test_row_route.py",
    ),
    Mutation(
        "comm/row_route.py",
        "self._received[message.peer][1 + message.part]",
        "self._received[message.peer][message.part]",
        "tests/test_row_route.py",
    ),
    Mutation(
        "comm/row_route.py",
        "all_to_all(returned, processed, self._sent, self._received)",
        "all_to_all(returned, processed, self._received, self._sent)",
        "tests/test_row_route.py",
    ),
    Mutation("comm/peer_exchange.py", "self._wait_on_host(work, index)", "pass", RANKS),
    Mutation(
        "comm/faults.py",
        "if peer != own and counts[0] < 0",
        "if peer == own and counts[0] < 0",
        "tests/test_faults.py::test_flagged",
    ),
    Mutation("comm/faults.py", ">= num_experts", "> num_experts", "tests/test_faults.py::test_status"),
    Mutation(
        "comm/host_reader.py",
        "time.monotonic() > deadline",
        "time.monotonic() < deadline - 1e9",
        "tests/test_faults.py::test_reading",
    ),
    # plans and permutation
    Mutation(
        "moe/routing_plan.py",
        "hit_TP[:, skip_rank] = False",
        "hit_TP[:, skip_rank] = True",
        PROPERTIES + "routing_plan",
    ),
    Mutation("moe/routing_plan.py", "hit_TP.cumsum(0) - 1", "hit_TP.cumsum(0)", PROPERTIES + "routing_plan"),
    Mutation(
        "moe/routing_plan.py",
        "position_TP >= rows_P * part // parts",
        "position_TP > rows_P * part // parts",
        PROPERTIES + "routing_plan",
    ),
    Mutation(
        "moe/routing_plan.py",
        "sum(rows[:rank]) for rank",
        "sum(rows[: rank + 1]) for rank",
        PROPERTIES + "routing_plan",
    ),
    Mutation(
        "moe/routing_plan.py",
        "top_k_index % num_local_experts, -1",
        "top_k_index % num_local_experts, 0",
        PROPERTIES + "routing_plan",
    ),
    Mutation(
        "moe/permutation.py",
        ".to(torch.int64) - first_expert",
        ".to(torch.int64) + first_expert",
        PROPERTIES + "permutation",
    ),
    Mutation(
        "moe/permutation.py",
        "torch.argsort(key, stable=True)",
        "torch.argsort(key, stable=True, descending=True)",
        PROPERTIES + "permutation",
    ),
    Mutation(
        "moe/permutation.py", "(index_R < plan.num_pairs)", "(index_R <= plan.num_pairs)", PROPERTIES + "permutation"
    ),
    Mutation("moe/permutation.py", "(index_T < num_rows)", "(index_T <= num_rows)", PROPERTIES + "rows_return"),
    Mutation(
        "moe/permutation.py",
        "total += torch.where((index_T",
        "total -= torch.where((index_T",
        PROPERTIES + "rows_return",
    ),
    Mutation("moe/rows.py", "self._ids_at + self.top_k * 2, 8", "self._ids_at + self.top_k, 8", PROPERTIES + "wire"),
    # arithmetic: wrong signs, dropped weights, dropped pieces
    Mutation(
        "moe/activation.py",
        "sigmoid * (1 + gate - value)",
        "sigmoid * (1 - gate + value)",
        "tests/test_activation.py",
    ),
    Mutation("moe/activation.py", "(hidden * weight_S[:, None].to(wide))", "(hidden)", "tests/test_activation.py"),
    Mutation("moe/activation.py", "(grad * hidden).sum(-1)", "(grad * value).sum(-1)", "tests/test_activation.py"),
    Mutation("moe/activation.py", "grad_hidden = grad * weight", "grad_hidden = grad", "tests/test_activation.py"),
    Mutation("moe/grouped_gemm.py", "[0, *ends[:-1]]", "[0, *ends[1:]]", "tests/test_grouped_gemm.py"),
    Mutation(
        "moe/grouped_gemm.py",
        "weight[expert].addmm_(grad[start:end].t(), input[start:end])",
        "weight[expert] = grad[start:end].t() @ input[start:end]",
        "tests/test_grouped_gemm.py",
    ),
    Mutation(
        "moe/layer_call.py",
        "return reduce_rows(own, rows, token_row_TP, self.out_dtype)",
        "return reduce_rows(None, rows, token_row_TP, self.out_dtype)",
        RANKS,
    ),
    Mutation(
        "moe/permutation.py",
        "token_row_TP.gather(1, index_TK // num_local_experts)",
        "token_row_TP.gather(1, index_TK % token_row_TP.shape[1])",
        RANKS,
    ),
    Mutation("moe/permutation.py", "grad_TK if own_TK is None else grad_TK + own_TK", "grad_TK", RANKS),
    Mutation("moe/layer_call.py", "context.own_share or 1", "1", "tests/test_own_tokens.py::test_places_follow"),
    Mutation("moe/own_tokens.py", "plan.num_pairs >= num_pairs", "plan.num_pairs >= 0", "tests/test_own_tokens.py"),
    # schedule, planner, groups, settings
    Mutation("overlap/wgrad.py", "if not self.defers or", "if self.defers or", "tests/test_wgrad.py"),
    Mutation("overlap/wgrad.py", "return self.enabled and self.policy", "return self.policy", "tests/test_wgrad.py"),
    Mutation(
        "overlap/planner.py",
        "if time < best_time * (1 - MIN_GAIN)",
        "if time > best_time * (1 - MIN_GAIN)",
        "tests/test_planner.py",
    ),
    Mutation("overlap/cost_model.py", "rate = 1.0 - self.hardware.taken", "rate = 1.0", "tests/test_planner.py"),
    Mutation(
        "process_groups.py",
        "range(index, world_size, ep_size)",
        "range(index, world_size, ep_size + 1)",
        PROPERTIES + "groups",
    ),
    Mutation(
        "process_groups.py",
        "world_size % n == 0 and num_experts % n == 0",
        "world_size % n == 0",
        PROPERTIES + "groups",
    ),
    Mutation("control.py", "any(value != row[0]", "any(value == row[0]", "tests/test_errors.py"),
    Mutation(
        "config.py",
        "if self.waves is not None and not self.overlap",
        "if self.waves is not None and self.overlap",
        "tests/test_config.py",
    ),
    Mutation("config.py", "not 0 < seconds < 1e7", "not 0 <= seconds < 1e7", "tests/test_faults.py::test_timeout"),
    # files that cannot be trusted, what follows a split optimizer, ranks that do not come
    Mutation("integrations/safe_files.py", "weights_only=True", "weights_only=False", TRUST + "files_that"),
    Mutation("integrations/safe_files.py", "for path in paths:", "for path in ():", TRUST + "files_that"),
    Mutation("integrations/safe_files.py", '".." in Path(tag).parts', "False", TRUST + "tags"),
    Mutation("checkpoint/reading.py", '".." in Path(file).parts', "False", TRUST + "indices"),
    Mutation(
        "integrations/zero_to_fp32.py",
        "issubclass(found, transformers.PreTrainedModel)",
        "found.__name__",
        TRUST + "configurations",
    ),
    Mutation(
        "integrations/optimizer_groups.py",
        "type(held)(held[place] for place in places)",
        "type(held)(held[0] for place in places)",
        "tests/test_deepspeed.py::schedules",
    ),
    Mutation(
        "comm/reduce.py",
        "work.wait(datetime.timedelta(seconds=timeout_seconds))",
        "work.wait()",
        "tests/test_faults.py::not_started",
    ),
    # the tool that judges all others
    Mutation("bench/parity.py", "place = max(ratios", "place = min(ratios", "tests/test_parity.py::test_deviations"),
    Mutation(
        "bench/parity_train.py",
        "masters[name] -= RATE",
        "masters[name] += RATE",
        "tests/test_parity.py::test_one_process",
    ),
    Mutation(
        "state.py",
        "gradient.mul_(scale.to(gradient.dtype))",
        "gradient.mul_(1.0)",
        "tests/test_parity.py::test_one_process",
    ),
    # what must be equal on all ranks, and gradients that would be wrong
    Mutation(
        "comm/call_form.py", "if len(set(values.values())) > 1", "if len(set(values.values())) > 2", FAULTS + "forms"
    ),
    Mutation("comm/call_form.py", "packed >> 18", "packed >> 18 & 1", FAULTS + "forms"),
    Mutation("comm/late_status.py", "            self._flag.zero_()\n", "", FAULTS + "what_kernels"),
    Mutation("comm/gradients.py", "before != now", "before is now", "tests/test_errors.py::test_every"),
    Mutation(
        "comm/head_start.py",
        "return self._rows.sent * self._kind[1], self._rows.received * self._kind[1]",
        "return 0, 0",
        "tests/test_head_start.py::test_a_promise",
    ),
    Mutation("moe/layer.py", "return lambda: parameters", "return self.expert_parameters", COMBINATIONS + "as_the"),
    Mutation("models/sequence_parallel.py", '"_backward_hooks", "_backward', '"_backward', COMBINATIONS + "hooks_in"),
)


def apply(mutation: Mutation, folder: Path) -> str:
    """Plant the fault in the copy; the file's text as it was."""
    path = folder / "fluid_hf" / mutation.file
    text = path.read_text(encoding="utf-8")
    if mutation.old not in text:
        raise SystemExit(f"{mutation.file} has no {mutation.old!r}: update tests/mutations.py")
    path.write_text(text.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    return text


def is_ours(path: object) -> bool:
    """Whether a file or folder is of this tree, and not of an environment inside it."""
    place = Path(str(path)).resolve()
    return place.is_relative_to(ROOT) and not place.is_relative_to(Path(sys.prefix).resolve())


def run_pytest(folder: str, arguments: list[str]) -> None:
    """In a process forked from one that has imported the large packages: the exit code is pytest's."""
    os.setsid()  # what the test starts ends with it
    for name, module in list(sys.modules.items()):  # this module came from the unharmed package
        if is_ours(getattr(module, "__file__", None) or "/") or name.partition(".")[0] == "fluid_hf":
            del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.chdir(folder)
    outside = [path for path in sys.path if not is_ours(path)]
    sys.path[:] = [folder, f"{folder}/tests", *outside]
    with open("pytest.txt", "w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        import pytest

        os._exit(pytest.main(arguments))


def fails(test: str, folder: Path) -> bool:
    """Whether a test fails in the copy; hanging counts."""
    file, _, name = test.partition("::")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", file, *(["-k", name] if name else [])]
    process = fork_context().Process(target=run_pytest, args=(str(folder), arguments))
    process.start()
    process.join(TIMEOUT)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, 1, -signal.SIGKILL):
        raise SystemExit(f"{test} did not run: {(folder / 'pytest.txt').read_text()[-2000:]}")
    return process.exitcode != 0


def try_all(chosen: list[Mutation], known: dict[str, Any], path: Path | None) -> list[dict[str, Any]]:
    """Plant each in a copy; what came of it."""
    outcomes = dict(known)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "copy"
        shutil.copytree(
            ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git*", "__pycache__", ".*_cache", ".venv")
        )
        sound: set[str] = set()
        for mutation in chosen:
            outcome = known.get(key(mutation))
            if outcome is None:
                if mutation.test not in sound and fails(mutation.test, folder):
                    raise SystemExit(f"{mutation.test} fails without a fault: {(folder / 'pytest.txt').read_text()}")
                sound.add(mutation.test)
                start = time.monotonic()
                text = apply(mutation, folder)
                caught = fails(mutation.test, folder)
                (folder / "fluid_hf" / mutation.file).write_text(text, encoding="utf-8")
                seconds = round(time.monotonic() - start, 1)
                outcome = {**dataclasses.asdict(mutation), "caught": caught, "seconds": seconds}
                print(
                    f"{'caught' if caught else 'MISSED'} {seconds:5.1f} s  {mutation.file}: {mutation.new}", flush=True
                )
            outcomes[key(mutation)] = outcome
            write(path, list(outcomes.values()))
    return [outcomes[key(mutation)] for mutation in chosen]


def key(mutation: Mutation) -> str:
    return json.dumps(dataclasses.asdict(mutation))


def read(path: Path | None) -> dict[str, Any]:
    """Outcomes in the file, by fault."""
    if path is None or not path.is_file():
        return {}
    fields = [field.name for field in dataclasses.fields(Mutation)]
    outcomes = json.loads(path.read_text(encoding="utf-8"))["faults"]
    return {json.dumps({name: outcome[name] for name in fields}): outcome for outcome in outcomes}


def write(path: Path | None, outcomes: list[dict[str, Any]]) -> None:
    if path is not None:
        about = {"command": "python tests/mutations.py", "date": str(datetime.date.today())}
        about["caught"] = f"{sum(outcome['caught'] for outcome in outcomes)} of {len(outcomes)}"
        path.write_text(json.dumps({**about, "faults": outcomes}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or text contains this")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.file + mutation.old]
    outcomes = try_all(chosen, read(options.json), options.json)
    caught = sum(outcome["caught"] for outcome in outcomes)
    print(f"{caught} of {len(chosen)} planted faults were caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
