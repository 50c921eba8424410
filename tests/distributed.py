"""Ranks for tests: a pool of gloo processes started once per test module, and scripts under a launcher.

Ranks are forked from one process per session that has imported the large packages and nothing else, so that each is
as fresh as a new process but starts at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_ENV = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "MASTER_ADDR": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
# Imported once per session. Not fluid_hf: ranks import the code under test themselves.
PRELOAD = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # each engine imports it, and with it torch's compiler
    "matplotlib.figure",
    "peft",
    "transformers.trainer",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)
END = ("", "", (), {})  # instead of a call: no more will come
HANG = 600.0  # seconds; far more than anything here takes on a slow machine, so it ends only what hangs
GRACE = 60.0  # seconds the other ranks get once one has raised: they may hang waiting for it


@dataclasses.dataclass
class Failure:
    """An exception of one rank."""

    kind: str
    message: str
    text: str


class RankError(AssertionError):
    """At least one rank raised; `failures` maps rank to what it raised."""

    def __init__(self, failures: dict[int, Failure]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {rank}: {failure.text}" for rank, failure in failures.items()))


def free_port() -> int:
    """A TCP port nobody listens on, another one each time; imported here, as ranks import this module."""
    from fluid_hf.bench import links

    return links.free_port()


class RankPool:
    """Persistent processes, one per rank, that run functions of test modules.

    Args:
        world_size: number of ranks, at most 4.
        group: start the ranks' default process group.
        nodes: how many nodes the ranks believe to be on: that many have a `LOCAL_RANK` of 0.
    """

    def __init__(self, world_size: int, *, group: bool = True, nodes: int = 1) -> None:
        self.world_size = world_size
        self._group = group
        self._local_size = world_size // nodes
        self._start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = HANG, **kwargs: Any) -> list[Any]:
        """`function(rank, world_size, *args, **kwargs)` on every rank; the results in rank order.

        Raises:
            RankError: a rank raised or died; ranks that then hung are `RankTimeoutError` failures.
            TimeoutError: no rank raised and one did not finish in time.

        The pool has been restarted if a rank died or hung.
        """
        path = sys.modules[function.__module__].__file__
        for connection in self._connections:
            connection.send((path, function.__qualname__, args, kwargs))
        results = self._collect(timeout)
        failures = {rank: result for rank, result in sorted(results.items()) if isinstance(result, Failure)}
        kinds = {failure.kind for failure in failures.values()}
        if kinds & {"RankDiedError", "RankTimeoutError"}:
            self.restart()
        if kinds == {"RankTimeoutError"}:
            raise TimeoutError(f"{function.__qualname__}: ranks {list(failures)} did not finish within {timeout} s")
        if failures:
            raise RankError(failures)
        return [results[rank] for rank in range(self.world_size)]

    def expect(
        self, error: str, function: Callable[..., Any], *args: Any, timeout: float = HANG, **kwargs: Any
    ) -> list[str]:
        """Check that every rank raises an error of the named type in time; their messages in rank order."""
        with pytest.raises(RankError) as caught:
            self.run(function, *args, timeout=timeout, **kwargs)
        failures = caught.value.failures
        assert sorted(failures) == list(range(self.world_size)), f"only ranks {sorted(failures)} raised"
        assert {failure.kind for failure in failures.values()} <= {error, "RankMismatchError"}, caught.value
        assert any(failure.kind == error for failure in failures.values()), caught.value
        return [failures[rank].message for rank in range(self.world_size)]

    def restart(self) -> None:
        """Kill the processes and start new ones."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the processes."""
        if "coverage" in sys.modules:  # ranks write what they ran when they end by themselves
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.send(None)
            for process in self._processes:
                process.join(30)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _collect(self, timeout: float, grace: float | None = None, until: set[int] | None = None) -> dict[int, Any]:
        """What each rank sent back; a `Failure` for one that died or did not answer in time.

        With `until`, the answers of those ranks are enough.
        """
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        grace = GRACE if grace is None else grace
        wanted = set(waiting.values()) if until is None else until
        while wanted & set(waiting.values()) and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                results[rank] = self._receive(rank)
                if isinstance(results[rank], Failure):
                    deadline = min(deadline, time.monotonic() + grace)
        for rank in waiting.values():
            results[rank] = Failure("RankTimeoutError", "did not finish", "did not finish")
        return results

    def _receive(self, rank: int) -> Any:
        try:
            return self._connections[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(5)
            text = f"died with exit code {self._processes[rank].exitcode}"
            return Failure("RankDiedError", text, text)

    def _start(self) -> None:
        context = fork_context()
        port = free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(self.world_size):
            here, there = context.Pipe()
            args = (there, rank, self.world_size, self._local_size, port, self._group)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._connections.append(here)
            self._processes.append(process)


@functools.cache
def fork_context() -> ForkServerContext:
    """Where ranks are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    before = {name: os.environ.get(name) for name in LAUNCH_ENV}
    os.environ.update(LAUNCH_ENV)  # packages read some of it when they are imported
    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


@contextlib.contextmanager
def fresh_ranks(world_size: int, *, group: bool = True, nodes: int = 1) -> Iterator[RankPool]:
    """A pool of ranks for one `with` block."""
    ranks = RankPool(world_size, group=group, nodes=nodes)
    try:
        yield ranks
    finally:
        ranks.close()


def run_script(script: str | Path, *args: str, nproc: int = 2, timeout: float = HANG) -> str:
    """What a script, or a module by its name, prints in new ranks, started without a launcher; rank after rank."""
    with fresh_ranks(nproc, group=False) as ranks:
        return "".join(ranks.run(_run_script, str(script), list(args), timeout=timeout))


def _run_script(rank: int, world_size: int, script: str, args: list[str]) -> str:
    sys.argv = [script, *args]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            if script.endswith(".py"):
                sys.path.insert(0, str(Path(script).parent))
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{script} ended with {end.code}: {printed.getvalue()[-4000:]}") from end
    return printed.getvalue()


def rank_pool(world_size: int) -> Any:
    """A module-scoped fixture with a pool of ranks."""

    @pytest.fixture(scope="module")
    def pool() -> Iterator[RankPool]:
        with fresh_ranks(world_size) as ranks:
            yield ranks

    return pool


def launch(
    script: str | Path,
    *args: str,
    nproc: int = 2,
    launcher: str = "deepspeed",
    timeout: float = HANG,
    cwd: Path | None = None,
    capture: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a script under `deepspeed` or `torchrun` on CPU ranks; kill it and all its ranks at the timeout."""
    bin_dir = Path(sys.executable).parent
    if launcher == "deepspeed":
        options = ["--num_accelerators", str(nproc), "--no_local_rank", "--master_port", str(free_port())]
    else:
        options = ["--nproc_per_node", str(nproc), "--master_port", str(free_port())]
    command = [str(bin_dir / launcher), *options, str(script), *args]
    environment = {**os.environ, **LAUNCH_ENV, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE if capture else None,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_tree(process.pid)
        out, err = process.communicate()
        raise AssertionError(f"{script} did not end within {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _kill_tree(pid: int) -> None:
    """Kill a process and all below it; torchrun puts each rank in a session of its own, out of a group's reach."""
    launcher = psutil.Process(pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _serve(connection: Connection, rank: int, world_size: int, local_size: int, port: int, group: bool) -> None:
    os.environ.update(LAUNCH_ENV, RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank % local_size), LOCAL_WORLD_SIZE=str(local_size))
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # half a million objects of the packages, else looked at by every collection
    if group and world_size > 1:
        dist.init_process_group("gloo")
    modules: dict[str, ModuleType] = {__file__: sys.modules[__name__]}
    while True:
        try:
            path, name, args, kwargs = connection.recv() or END
        except EOFError:
            return
        if not path:
            return
        try:
            if path not in modules:
                modules[path] = _load(path)
            connection.send(getattr(modules[path], name)(rank, world_size, *args, **kwargs))
        except BaseException as error:
            connection.send(Failure(type(error).__name__, str(error), traceback.format_exc()))


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
