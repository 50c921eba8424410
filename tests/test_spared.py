"""Multiprocessors that GEMMs leave to messages beside them."""

from __future__ import annotations

import pytest
import torch

from fluid_hf.comm.calibration import measure_spared
from fluid_hf.comm.peer_exchange import PeerExchange
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
