"""A run on two hosts that share no folder: each keeps its ranks' rows, and copied together they are one ledger.

Two launches of torchrun, each with a folder of its own: on one address, and in two network namespaces.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_mimic import Ledger, LedgerError, Reweighter, WithIds, collate_with_ids
from support.toys import losses_of, parameters_of, toy, toy_data

pytestmark = pytest.mark.slow  # processes

SAMPLES = 12


def on_rank() -> None:
    """One host's process: a plain loop, whose ledger lies in the working directory."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    batches = [list(range(start + 2 * rank, start + 2 * rank + 2)) for start in range(0, SAMPLES, 4)]
    loader = DataLoader(WithIds(toy_data(SAMPLES)), batch_sampler=batches, collate_fn=collate_with_ids)
    model = DistributedDataParallel(toy())
    reference = parameters_of(toy(seed=1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Reweighter(model, reference, "head", ledger="ledger", diagnose_reference=False) as reweighter:
            for batch in loader:
                with reweighter.step(batch) as step:
                    step.backward(losses_of(model, step.batch).mean())
            state = reweighter.state_dict()
    Path("said.txt").write_text("\n".join(str(each.message) for each in said))
    torch.save(state, "state.pt")
    torch.distributed.destroy_process_group()


def launch(folder, commands, address):
    """Starts torchrun once on every host, with the given commands before it; returns the hosts' folders."""
    program = folder / "program.py"
    program.write_text("import test_hosts\n\ntest_hosts.on_rank()\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    hosts, running = [], []
    for number, (command, variables) in enumerate(commands):
        host = folder / f"host{number}"
        host.mkdir()
        hosts.append(host)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}"]
        torchrun += ["--nproc-per-node=1", f"--master-addr={address}", f"--master-port={port}", str(program)]
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
        with (host / "errors.txt").open("w") as errors:
            running.append(subprocess.Popen([*command, *torchrun], cwd=host, env=environment, stderr=errors))
    try:
        codes = [each.wait(timeout=300) for each in running]
    finally:
        for each in running:
            each.terminate()  # torchrun, which ends its own process
            each.wait()
    assert codes == [0, 0], "\n".join((host / "errors.txt").read_text()[-3000:] for host in hosts)
    return hosts


def check(first, second, name):
    """What each host has, what is said of it, and what the two are together."""
    said = (first / "said.txt").read_text()
    assert f"`ledger`: ledger is not shared by all ranks: rank 1 on {name} cannot see the files that rank 0 on" in said
    assert "is not shared by all" not in (second / "said.txt").read_text()
    missing = (
        "rows are missing: attempt 0, rank 1, 6 of 6 rows (missing). `allow_partial=True` reads the rest. No part of "
    )
    missing += "rank 1 is here: where hosts share no folder, copy the files of each host's folder into this one."
    with pytest.raises(LedgerError, match=re.escape(missing)):
        Ledger(first / "ledger").table()
    alone = "holds no ledger (no _meta.json in it). It holds parts of rank 1 of run "
    with pytest.raises(LedgerError, match=re.escape(alone)):
        Ledger(second / "ledger")
    state = torch.load(first / "state.pt")
    again = Reweighter(toy(), parameters_of(toy(seed=1)), "head", ledger=first / "ledger", diagnose_reference=False)
    again.load_state_dict(state)
    with pytest.raises(LedgerError, match=r"rank 1 has none.*first copy the files of each host's folder into this one"):
        again.start()
    shutil.copytree(second / "ledger", first / "ledger", dirs_exist_ok=True)
    table = Ledger(first / "ledger").table()
    assert sorted(table["id"].to_pylist()) == list(range(SAMPLES))
    assert table["rank"].to_pylist() == [0, 0, 1, 1] * 3
    assert set(table["batch_size"].to_pylist()) == {4}


def test_two_launches_with_folders_of_their_own(tmp_path):
    hosts = launch(tmp_path, [([], {}), ([], {})], "127.0.0.1")
    check(*hosts, name=socket.gethostname())


@pytest.fixture
def namespaces():
    """Names of two network namespaces, which see each other by one cable."""
    names = [f"mimic{os.getpid()}{end}" for end in "ab"]
    commands = [["ip", "netns", "add", name] for name in names]
    commands += [["ip", "link", "add", names[0][-15:], "type", "veth", "peer", "name", names[1][-15:]]]
    for number, name in enumerate(names):
        commands += [["ip", "link", "set", name[-15:], "netns", name, "name", "cable"]]
        inside = ["ip", "-n", name]
        commands += [[*inside, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cable"]]
        commands += [[*inside, "link", "set", each, "up"] for each in ("lo", "cable")]
    try:
        for command in commands:
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', '') or error}")
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_that_share_nothing_but_a_cable(namespaces, tmp_path):
    commands = []
    for number, name in enumerate(namespaces):
        named = ["unshare", "--uts", "sh", "-c", f'hostname host{number} && exec "$@"', "sh"]
        commands.append((["ip", "netns", "exec", name, *named], {"GLOO_SOCKET_IFNAME": "cable"}))
    hosts = launch(tmp_path, commands, "10.77.0.1")
    check(*hosts, name="host1")
