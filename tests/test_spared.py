"""Multiprocessors that GEMMs leave to messages beside them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fluid_hf.comm import calibration
from fluid_hf.comm.calibration import measure_spared
from fluid_hf.comm.peer_exchange import ExchangeHandle, PeerExchange
from fluid_hf.comm.spared import AS_IT_IS, Spared, can_spare, spared_now

pytestmark = pytest.mark.skipif(not can_spare(), reason="this PyTorch has no such setting")


def test_is_set_back() -> None:
    assert spared_now() == 0
    with Spared(4):
        assert spared_now() == 4
        with Spared(2):
            assert spared_now() == 2
        assert spared_now() == 4
    assert torch._C._get_sm_carveout_experimental() is None
    with pytest.raises(ValueError, match="inside"), Spared(8):
        raise ValueError("inside")
    assert torch._C._get_sm_carveout_experimental() is None


def test_only_beside_messages() -> None:
    exchange = PeerExchange(None, 0, 1)
    handle = exchange.post([], [])
    assert exchange.beside() is AS_IT_IS, "nothing was measured"
    exchange.spared = 2
    with exchange.beside():
        assert spared_now() == 2
    handle.wait()
    assert exchange.beside() is AS_IT_IS, "nothing is in flight"
    exchange.spared = 0
    exchange.post([], [])
    assert exchange.beside() is AS_IT_IS


def test_nothing_is_spared_where_no_kernels_move_messages() -> None:
    assert measure_spared(PeerExchange(None, 0, 1), torch.device("cpu")) == 0


class _Times:
    """In the place of messages and GEMMs: what a GEMM takes when a number of multiprocessors is spared."""

    size = 8
    seconds: dict[int, float] = {}

    def __init__(self, exchange: PeerExchange, device: torch.device) -> None:
        self.exchange = exchange

    def post(self, count: int, size: int) -> list[ExchangeHandle]:
        return [self.exchange.post([], []) for _ in range(count)]

    def beside_one(self, spared: int) -> float:
        return self.seconds[spared]


@pytest.mark.parametrize(
    ("seconds", "processors", "expected"),
    [
        ({0: 2.0, 2: 1.9, 4: 1.05, 8: 1.08, 16: 1.15}, 132, 4),  # beside two blocks of NCCL
        ({0: 1.1, 2: 1.1, 4: 1.08, 8: 1.05, 16: 0.98}, 132, 0),  # beside short messages
        ({0: 2.0, 2: 1.9, 4: 1.05}, 20, 4),  # never more than a quarter of them
    ],
)
def test_what_is_spared_is_what_gains(
    seconds: dict[int, float], processors: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Times, "seconds", seconds)
    monkeypatch.setattr(calibration, "_Load", _Times)
    monkeypatch.setattr(calibration, "_has_grouped", lambda device: True)
    monkeypatch.setattr(calibration, "_agree", lambda exchange, device, values: list(values))
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    exchange = PeerExchange(None, 0, 1)
    exchange._batched = True
    assert measure_spared(exchange, torch.device("cpu")) == expected
    assert not exchange._in_flight
