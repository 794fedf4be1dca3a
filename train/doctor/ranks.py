"""`wantrain doctor`, for a run of several processes: do they find each other, and are their GPUs alike."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shards.errors import UserError
from shards.machine import Finding
from train.config.train import TrainConfig, slots_per_rank
from train.estimate.plan import choose_run_mesh


def check_ranks(config: TrainConfig | None) -> Iterator[Finding]:
    """What several processes need beside what one does."""
    import torch
    import torch.distributed as dist

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield check_backends(dist.is_available() and dist.is_gloo_available(), dist.is_nccl_available(), len(names))
    yield check_host_name(socket.gethostname())
    yield check_master(os.environ)
    if len(names) < 2:
        return
    pairs = [(one, other) for one in range(len(names)) for other in range(len(names)) if one != other]
    yield check_cards(names, [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)])
    if config is not None:
        yield check_batch(config, len(names))


def check_backends(gloo: bool, nccl: bool, num_gpus: int) -> Finding:
    """gloo moves what is on the CPU, NCCL what is on GPUs."""
    found = f"gloo {'there' if gloo else 'missing'}, NCCL {'there' if nccl else 'missing'}"
    if not gloo or (num_gpus > 1 and not nccl):
        return Finding("processes", "problem", found, "install a torch build that has them: pip's own for Linux does")
    return Finding("processes", "ok", found)


def check_host_name(name: str) -> Finding:
    """gloo meets at the address that the machine's own name has."""
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        fix = f"add it to /etc/hosts, or name an interface: GLOO_SOCKET_IFNAME=eth0 ({error.strerror or error})"
        return Finding("host name", "note", f"{name} has no address: gloo falls back to the loopback", fix)
    return Finding("host name", "ok", f"{name} is {address}")


def check_master(environment: Mapping[str, str]) -> Finding:
    """Whether the ranks could meet where the environment says, seen from here; anywhere, when it says nothing."""
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if host is None or port is None:
        return Finding("meeting place", "ok", "none set; `--nproc-per-node` takes a free port")
    if not port.isdigit() or not 0 < int(port) < 65536:
        return Finding("meeting place", "problem", f"MASTER_PORT {port} is no port", "one from 1024 to 65535")
    try:
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError:
        fix = "set it to the first machine's name or address"
        return Finding("meeting place", "problem", f"MASTER_ADDR {host} has no address", fix)
    return _try_to_listen(f"{host}:{port}", address[0], address[4])


def _try_to_listen(name: str, family: socket.AddressFamily, address: Any) -> Finding:
    with socket.socket(family, socket.SOCK_STREAM) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(address)
        except PermissionError:
            return Finding("meeting place", "problem", f"{name} needs root", "a MASTER_PORT from 1024 to 65535")
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return Finding("meeting place", "note", f"{name} is another machine's: not looked at")
            return Finding("meeting place", "problem", f"{name} is taken", "another MASTER_PORT")
    return Finding("meeting place", "ok", f"{name} is this machine's, and free")


def check_cards(names: Sequence[str], without_peers: Sequence[tuple[int, int]]) -> Finding:
    """The slowest card sets the pace of all; without peer access every exchange goes through the host's memory."""
    kinds = sorted(set(names))
    if len(kinds) > 1:
        fix = "the slowest sets the pace: CUDA_VISIBLE_DEVICES can leave cards out"
        return Finding("cards together", "note", f"{len(names)} of {len(kinds)} kinds: {', '.join(kinds)}", fix)
    if without_peers:
        found = f"{len(names)} × {kinds[0]}, {len(without_peers)} pairs without peer access"
        return Finding("cards together", "note", found, "replicate rather than shard: docs/scaling.md")
    return Finding("cards together", "ok", f"{len(names)} × {kinds[0]}, all with peer access")


def check_batch(config: TrainConfig, num_gpus: int) -> Finding:
    """Whether the global batch can be divided among a process a GPU."""
    try:
        mesh, _ = choose_run_mesh(config, num_gpus, 1, None)
        share = slots_per_rank(config.data, mesh.dp_size)
    except UserError as error:
        return Finding("batch", "note", error.problem, error.expected or "")
    return Finding("batch", "ok", f"{share} of {config.data.global_batch} samples for each share of {num_gpus} GPUs")
