"""Which process of a run this is. Launchers say so in the environment: torch's, or Slurm's."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DistEnv:
    """What a launcher said in the environment."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "localhost"
    port: int = 29500

    @classmethod
    def of(cls, env: Mapping[str, str]) -> "DistEnv":
        """Who this process is: by torch's variables, else by those of a Slurm step, else alone.

        A Slurm batch script itself has SLURM_NTASKS, but only what srun starts has SLURM_STEP_NUM_TASKS.
        """
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        else:
            return cls()
        found = [re.match(r"\d+", env.get(name, "")) for name in names]
        numbers = [int(match.group()) if match else default for match, default in zip(found, (0, 1, 0, 1), strict=True)]
        address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "")) or "localhost"
        port = int(env.get("MASTER_PORT", 20000 + int(env.get("SLURM_JOB_ID", 9500)) % 20000))
        rank, size, local_rank, local_world_size = numbers
        return cls(rank, size, local_rank, local_world_size, address, port)


def may_restart_elsewhere() -> bool:
    """Whether torch's agents on several machines may start processes again, each counting for itself how often."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def restarted() -> bool:
    """Whether torch's agent has started this process again, after one has died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def first_host(hosts: str) -> str:
    """The first of Slurm's host names: node[07-12,15] -> node07."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?", hosts)
    return (match[1] + (match[2] or "")) if match else ""
