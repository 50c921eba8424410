"""What goes wrong on one rank is a named error on the others, in bounded time."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import faults
import pytest
import torch
from distributed import Failure, RankError, RankPool, fresh_ranks, rank_pool
from families import batch, tiny_model

import fluid_hf
from fluid_hf import ConfigError, ExpertParallelExperts, FluidConfig, PeerError, RankMismatchError, RoutingError
from fluid_hf.comm.call_form import CallForm, check_forms
from fluid_hf.comm.faults import input_status, peer_error, raise_flagged
from fluid_hf.comm.host_reader import HostReader
from fluid_hf.comm.late_status import LateStatus
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.comm.reduce import meet_first, meet_in_time
from fluid_hf.process_groups import backend_of, set_group_timeout

LIMIT = f"{faults.TIMEOUT:g} s"
TRIED = {
    "NaN in router logits": ("RoutingError", ["rank 1", "model.layers.1.mlp.experts", "NaN"]),
    "raises in backward": ("PeerError", ["rank 1", "backward", "round 0", "model.layers.0.mlp.experts", LIMIT]),
    "killed between counts and rows": ("PeerError", ["rank 1", "forward", ", round ", "model.layers.1.mlp.experts"]),
    "out of memory in calibration": ("PeerError", ["rank 1", "calibration", "model.layers.0.mlp.experts", LIMIT]),
    "killed in calibration": ("PeerError", ["rank 1", "calibration", "model.layers.0.mlp.experts", LIMIT]),
    "top-k index out of range, ep_size 1": ("PeerError", ["rank 1", "list of gradients in reduce_gradients", LIMIT]),
    "saves on one rank only": ("PeerError", ["rank 1", LIMIT]),
}


@pytest.fixture(scope="module")
def failures() -> dict[str, dict[int, Failure]]:
    """What the ranks raised, by fault; most of the time they wait, so several are tried at once."""
    with ThreadPoolExecutor(3) as tries:
        found = tries.map(faults.try_fault, TRIED, repeat(2))
        return {name: raised for name, (raised, _) in zip(TRIED, found, strict=True)}


@pytest.mark.parametrize("fault", TRIED)
def test_fault_on_one_of_two_ranks(failures: dict[str, dict[int, Failure]], fault: str) -> None:
    error, words = TRIED[fault]
    found = failures[fault][0]
    assert found.kind == error, found.text
    assert all(word in found.message for word in words), found.message


pool2 = rank_pool(2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("autocast on one rank only", "dtype (rank 0: torch.float32; rank 1: torch.bfloat16) must be equal"),
        ("autocast dtypes differ", "dtype (rank 0: torch.float16; rank 1: torch.bfloat16) must be equal"),
        ("model.to(dtype) on one rank only", "dtype (rank 0: torch.float32; rank 1: torch.bfloat16) must be equal"),
        ("fewer experts per token on one rank", "top_k (rank 0: 2; rank 1: 1) must be equal"),
        ("frozen on one rank only", "requires_grad of the input (rank 0: True; rank 1: False) must be equal"),
        ("waves differ", "waves (rank 0: 1; rank 1: 3) must be equal"),
        ("autocast on one rank only, sp_size 2", "dtype (rank 0: torch.float32; rank 1: torch.bfloat16) must be equal"),
    ],
)
def test_ranks_that_call_in_other_ways_all_say_so(pool2: RankPool, fault: str, message: str) -> None:
    function, settings = faults.FAULTS[fault]
    where = "attention" if "sp_size" in fault else "model.layers.0.mlp.experts"
    for text in pool2.expect("RankMismatchError", function, fault, settings):
        assert text.startswith(message) and f"layer {where} together; " in text


def test_hooks_on_one_rank_only(pool2: RankPool) -> None:
    """The hooked layer exchanges in another way than the others' same layer."""
    function, settings = faults.FAULTS["a hook on one rank's projection, sp_size 2"]
    for text in pool2.expect("RankMismatchError", function, "a hook on one rank's projection", settings):
        assert text.startswith(
            "attention layers with hooks or adapters on their projections (rank 0: 0; rank 1: 1) must"
        )


def test_forms_survive_their_words() -> None:
    form = CallForm(torch.float16, 2**13 - 1, 2**31 - 1, 255, 2)
    assert all(0 <= word < 2**31 for word in form.words)
    assert CallForm.fields(form.words) == {
        "dtype": torch.float16,
        "top_k": 2**13 - 1,
        "hidden_size": 2**31 - 1,
        "waves": 255,
        "requires_grad of the input": True,
    }
    other = CallForm(torch.float16, 3, 2**31 - 1, 255, 0)  # without gradients it does not matter whether the input has
    check_forms([CallForm(torch.float16, 3, 2**31 - 1, 255, 1).words, other.words], [4, 6], "x")
    with pytest.raises(RankMismatchError, match=r"top_k \(rank 4, 5: 8191; rank 7: 3\) must be equal .* layer x"):
        check_forms([form.words, form.words, other.words], [4, 5, 7], "x")
    wide = CallForm(torch.float16, 3, 40, 255, 0)
    with pytest.raises(RankMismatchError, match=r"hidden_size \(rank 4: 2147483647; rank 6: 40\)"):
        check_forms([other.words, wide.words], [4, 6], "x")


def test_all_faults_are_in_the_table() -> None:
    assert len(faults.FAULTS) >= 18
    assert set(faults.STEP_FAULTS) <= set(faults.FAULTS)
    for name, (function, _) in faults.FAULTS.items():  # a name that is not found would be the fault itself
        known = {faults.run_step: faults.STEP_FAULTS, faults.run_patch: faults.PATCH_FAULTS}
        known |= {faults.run_calibration: faults.CALIBRATION_FAULTS}
        known |= {faults.run_unlike: {**faults.UNLIKE, **faults.SEQUENCE_UNLIKE}}
        assert name.partition(",")[0] in known.get(function, name)
    assert Failure  # the table's cells are failures of the pool


def test_status_of_a_routers_output() -> None:
    index, weights = torch.tensor([[0, 3]]), torch.ones(1, 2)
    assert input_status(weights, index, 4) == 0
    assert input_status(weights, index, 3) == input_status(weights, index - 1, 4) == 2
    assert input_status(weights * float("nan"), index, 4) == input_status(weights / 0, index, 4) == 1
    assert input_status(torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int64), 4) == 0


def test_what_kernels_found_is_raised_once_with_the_next_call_or_batch() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    ids = batch(0, 2)
    model(ids)
    late = model.fluid.layers["model.layers.1.mlp.experts"].context.late_status
    for look in (model.fluid.finish_batch, lambda: model(ids)):
        late.flag(ids.device).fill_(2)  # as the kernel does, in a call before
        with pytest.raises(
            RoutingError, match=r"rank 0 in layer model.layers.1.mlp.experts: expert ids .* call before"
        ):
            look()
        model(ids)
        model.fluid.finish_batch()


def test_what_an_evaluation_in_inference_mode_left_is_raised_after_it() -> None:
    late = LateStatus()
    with torch.inference_mode():
        late.flag(torch.device("cpu")).fill_(2)
    with pytest.raises(RoutingError, match="rank 0 in layer x: expert ids"):
        late.check("x")
    late.check("x")


@pytest.mark.parametrize("status", [0, 1, 2])
def test_flagged_counts_reach_every_rank(status: int) -> None:
    """A status stands where the number of rows does."""
    counts = torch.tensor([[[3, 4], [5, 6]], [[7, 8], [9, 9]]], dtype=torch.int32)
    if status:
        counts[0, :, 0] = -status
    theirs = counts.flip(0)  # what the peer sees: this rank's counts as received ones
    for table, own in ((counts, 0), (theirs, 1)):
        if not status:
            raise_flagged(table.tolist(), own, [4, 6], "layer")
        else:
            with pytest.raises(RoutingError, match="router output of rank 4 in layer layer"):
                raise_flagged(table.tolist(), own, [4, 6], "layer")


class NeverDone:
    def query(self) -> bool:
        return False


def test_reading_from_the_device_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(torch.Tensor):
        is_cuda = True

    class Arrived:
        def wait(self) -> None:
            pass

    reader = HostReader()
    tensor = torch.zeros(2, 2, dtype=torch.int32)
    reader._pinned, reader._done = torch.zeros_like(tensor), NeverDone()  # type: ignore[assignment]
    monkeypatch.setattr("fluid_hf.comm.host_reader.record", lambda event, device: None)
    read = reader.start(tensor.as_subclass(OnDevice), Arrived(), contextlib.nullcontext())
    with pytest.raises(TimeoutError, match="within 0 s"):
        read(0.2)
    monkeypatch.setattr(NeverDone, "query", lambda self: True)
    assert read(0.2) == [[0, 0], [0, 0]]


def test_reading_in_inference_mode_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is often evaluated before its first step: what the reader keeps must be writable in both."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: allocate(*size, **how))
    monkeypatch.setattr("fluid_hf.comm.host_reader.record", lambda event, device: None)
    reader, counts = HostReader(), torch.tensor([[3, 4]])
    reader._done = NeverDone()  # type: ignore[assignment]
    monkeypatch.setattr(NeverDone, "query", lambda self: True)
    with torch.inference_mode():
        assert reader._copy(counts)(0.2) == [[3, 4]]
    assert reader._copy(counts + 1)(0.2) == [[4, 5]]


def test_waiting_for_the_device_ends_with_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    exchange = PeerExchange(None, 0, 2)
    exchange.ranks, exchange.timeout_seconds = [0, 3], 0.1
    exchange.at("layer x", "calibration")
    with pytest.raises(PeerError, match=r"rank 3 did not take part in calibration, .* did not arrive on the device"):
        exchange.wait_for(NeverDone())  # type: ignore[arg-type]
    with pytest.raises(PeerError, match=r"rank 3 did not take part in the norm of"):
        exchange.wait_for(NeverDone(), "the norm of")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("started", "gpu", "expected"),
    [
        ("cuda:nccl", True, ["nccl", "", "nccl"]),
        ("cpu:gloo,cuda:nccl", True, ["nccl", "gloo", "nccl"]),
        ("cpu:gloo,cuda:nccl", False, ["gloo", "gloo", "nccl"]),
        ("cpu:gloo,cuda:gloo", True, ["gloo", "gloo", "gloo"]),
        ("cpu:gloo", True, ["gloo", "gloo", ""]),
        ("cpu:mirror,cuda:mirror", True, ["mirror", "mirror", "mirror"]),
    ],
)
def test_backend_of_a_group(started: str, gpu: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: started)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert [backend_of(None, device) for device in (None, "cpu", "cuda")] == expected


def run_without_a_peer(rank: int, world: int, backend: str | None, how: str) -> None:
    """Rank 1 takes part once: then it dies, or sleeps for longer than rank 0 waits."""
    torch.distributed.init_process_group(backend)
    layer = ExpertParallelExperts(4, 8, 6, group=torch.distributed.new_group([0, 1]), waves=1)
    exchange = layer.context.exchange
    exchange.timeout_seconds = 2.0
    inputs = torch.ones(5, 8), torch.tensor([[0, 3]]).repeat(5, 1), torch.ones(5, 2)
    layer(*inputs)
    exchange.all_reduce(torch.ones(1))
    if rank == 0 and how == "sleeps in a sum":
        exchange.all_reduce(torch.ones(1), "a sum")
    elif rank == 0:
        layer(*inputs)
    elif how == "dies":
        os._exit(1)
    else:
        time.sleep(7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a name, the group would be the GPUs' alone")
@pytest.mark.parametrize(("backend", "how"), [(None, "dies"), (None, "sleeps"), ("cpu:gloo", "sleeps in a sum")])
def test_groups_that_were_not_started_by_the_name_of_one_backend(backend: str | None, how: str) -> None:
    with fresh_ranks(2, group=False) as ranks, pytest.raises(RankError) as caught:
        ranks.run(run_without_a_peer, backend, how, timeout=45.0)
    failure = caught.value.failures[0]
    assert failure.kind == "PeerError", failure.text
    assert "rank 1 did not take part in " + ("a sum" if "sum" in how else "forward") in failure.message


def run_meetings(rank: int, world: int, late: float) -> float:
    """As before NCCL's first call; seconds that this rank waited in the second meeting."""
    group = torch.distributed.group.WORLD
    meet_in_time(group, 60.0, "calibration")
    time.sleep(late * rank)
    start = time.monotonic()
    meet_in_time(group, 60.0, "calibration")
    return time.monotonic() - start


def run_first_exchange(rank: int, world: int) -> list[float]:
    """As over NCCL: the first all-to-all begins with a meeting, and no other one does."""
    exchange = PeerExchange(torch.distributed.group.WORLD, rank, world)
    exchange._batched = True
    received = torch.empty(world)
    for _ in range(2):
        exchange.all_to_all(received, torch.full((world,), float(rank)), [1] * world, [1] * world).wait()
    store = torch.distributed.distributed_c10d._get_default_store()
    torch.distributed.barrier()
    return [*received.tolist(), store.add("fluid_meeting/0/0/1", 0)]


def run_meetings_of_two_groups(rank: int, world: int) -> list[bool]:
    """Each rank waits in another group of the same ranks: they must not be taken for having met."""
    first, *others = [torch.distributed.new_group([0, 1]) for _ in range(3)]
    met: set[str] = set()
    for _ in range(2):
        meet_first(first, 60.0, "calibration", met)
    torch.distributed.barrier()
    with pytest.raises(PeerError, match="did not take part in the other one"):
        meet_first(others[rank], 1.0, "the other one", met)
    store = torch.distributed.distributed_c10d._get_default_store()
    assert store.add(f"fluid_meeting/{first.group_name}/0/1", 0) == 2, "they have met once"
    return [name == first.group_name for name in met]


def run_lone_meeting(rank: int, world: int) -> None:
    if rank == 0:
        meet_in_time(torch.distributed.group.WORLD, 0.5, "calibration of layer x")


def test_ranks_meet_before_they_connect() -> None:
    with contextlib.closing(RankPool(2)) as pool:
        first, second = pool.run(run_meetings, 1.0)
        assert first > 0.5 > second
        assert pool.run(run_first_exchange) == [[0.0, 1.0, 6.0]] * 2, "two ranks have met three times"
        assert pool.run(run_meetings_of_two_groups) == [[True]] * 2
        with pytest.raises(RankError) as caught:
            pool.run(run_lone_meeting)
        assert set(caught.value.failures) == {0}
        assert "rank 1 did not take part in calibration of layer x" in caught.value.failures[0].message


@pytest.mark.parametrize(("backend", "expected"), [("nccl", 14.0), ("gloo", 4.0)])
def test_the_named_error_comes_before_the_watchdog(
    backend: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: f"cpu:gloo,cuda:{backend}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.distributed.distributed_c10d, "_set_pg_timeout", lambda time, group: found.append(time.total_seconds())
    )
    set_group_timeout(object(), 4.0, 10.0)  # type: ignore[arg-type]
    assert found == [expected]


def test_silent_ranks_are_named_when_there_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    error = peer_error([2, 3, 5], [5], "forward combine, round 1, of layer x", 7.0, RuntimeError("closed\nmore"))
    assert isinstance(error, PeerError)
    assert str(error).startswith("rank 5 did not take part in forward combine, round 1, of layer x")
    assert "rank 3 waited at most 7 s" in str(error) and "(closed)" in str(error)


@pytest.mark.parametrize("seconds", [0, -1, "4", True, float("nan")])
def test_timeout_must_be_a_number_of_seconds(seconds: object) -> None:
    with pytest.raises(ConfigError, match="timeout_seconds"):
        FluidConfig(timeout_seconds=seconds)  # type: ignore[arg-type]
    assert FluidConfig(timeout_seconds=4).timeout_seconds == 4


GOOD_CALL = {"hidden": ((5, 8), torch.float32), "index": ((5, 2), torch.int64), "weights": ((5, 2), torch.float32)}
BAD_CALLS = {
    "a batch dimension": ({"hidden": ((1, 5, 8), torch.float32)}, r"hidden_states (torch.float32 [1, 5, 8]) in"),
    "another hidden size": ({"hidden": ((5, 6), torch.float32)}, "must be floating point [T, 8]"),
    "integers for hidden states": ({"hidden": ((5, 8), torch.int64)}, r"hidden_states (torch.int64 [5, 8]) in"),
    "other tokens": (
        {"index": ((4, 2), torch.int64)},
        "top_k_index (torch.int64 [4, 2]) in the call of layer layer must",
    ),
    "no experts per token": ({"index": ((5,), torch.int64)}, "must be integers [5, K], a row for each token"),
    "no integers": ({"index": ((5, 2), torch.float32)}, "top_k_index (torch.float32 [5, 2]) in"),
    "truth values": ({"index": ((5, 2), torch.bool)}, "top_k_index (torch.bool [5, 2]) in"),
    "other weights": ({"weights": ((5, 3), torch.float32)}, "top_k_weights (torch.float32 [5, 3]) in"),
    "no weights": ({"weights": ((5, 2), torch.int64)}, "must be floating point [5, 2], as top_k_index"),
}


def call_of(changes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape, dtype in {**GOOD_CALL, **changes}.values()]


@pytest.mark.parametrize("how", BAD_CALLS)
def test_arguments_that_a_layer_does_not_take(how: str) -> None:
    changes, words = BAD_CALLS[how]
    with pytest.raises(ConfigError) as caught:
        ExpertParallelExperts(4, 8, 6)(*call_of(changes))
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_expert_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    layer, (hidden, index, weights) = ExpertParallelExperts(4, 8, 6), call_of({})
    assert torch.equal(layer(hidden, index.to(dtype), weights), layer(hidden, index, weights))


def run_bad_calls(rank: int, world: int, waves: int | None, overlap: bool, bad: list[int]) -> list[tuple[str, str]]:
    """What this rank raises in calls that some of the ranks make with other arguments; good calls come between."""
    ways = {"group": torch.distributed.group.WORLD, "waves": waves, "overlap": overlap}
    layer, raised = ExpertParallelExperts(4, 8, 6, **ways), []
    layer.context.exchange.timeout_seconds = 20.0
    for index, (changes, _) in enumerate(BAD_CALLS.values()):
        with torch.set_grad_enabled(index % 2 == 0), pytest.raises((ConfigError, RankMismatchError)) as caught:
            layer(*call_of(changes if rank in bad else {}))
        raised.append((type(caught.value).__name__, str(caught.value)))
        expected = layer(*call_of({}))
        assert expected.isfinite().all() and expected.shape == (5, 8)
    return raised


@pytest.mark.parametrize(
    ("waves", "overlap", "bad"), [(None, True, [1]), (2, True, [0]), (None, False, [1]), (2, True, [0, 1])]
)
def test_every_rank_hears_of_arguments_that_one_rank_gets_wrong(
    pool2: RankPool, waves: int | None, overlap: bool, bad: list[int]
) -> None:
    named = f"rank {bad[0]} called layer layer with arguments of a shape or type that it does not take"
    for rank, raised in enumerate(pool2.run(run_bad_calls, waves, overlap, bad, timeout=60.0)):
        for (kind, message), (_, words) in zip(raised, BAD_CALLS.values(), strict=True):
            assert kind == ("ConfigError" if rank in bad else "RankMismatchError")
            assert (words if rank in bad else named) in message
