"""The rank that hosts the group's store dies: survivors raise and end, though nobody can be asked who is left."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 3
# As every program starts that is given MASTER_ADDR and its rank: rank 0 hosts the store in its own process.
PROGRAM = """
import os, signal, sys
import torch
import torch.distributed as dist
from moe_ep import TokenDispatcher
from moe_ep.errors import PeerTimeoutError
from moe_ep.testing import make_routing

dist.init_process_group("gloo")
dispatcher = TokenDispatcher(
    dist.group.WORLD, num_experts=6, hidden_size=8, top_k=2, dtype=torch.float32, timeout_s=600, backend="torch"
)
x, (topk_idx, weights) = torch.ones(5, 8), make_routing(5, 2, 6, seed=dist.get_rank())
with torch.no_grad():
    routed = dispatcher.dispatch(x, topk_idx, weights)
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dispatcher.combine(routed.x, routed.handle, routed.weights)
    except PeerTimeoutError as error:
        print(error)
        sys.exit(7)
"""


def test_survivors_of_the_rank_that_hosts_the_store_raise_and_end(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(NUM_RANKS),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        # A tenth of the timeout: the broken connection ends the wait.
        told = [process.communicate(timeout=60)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == -signal.SIGKILL
    for process, text in zip(ranks[1:], told[1:], strict=True):
        assert process.returncode == 7, text
        assert "rank" in text
