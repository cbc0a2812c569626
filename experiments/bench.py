"""Measure speed: updates alone, environment steps alone, and both together; one JSON line.

    python experiments/bench.py [--preset paper] [--env kitchen] [any other field of the config]

"both" acts, simulates and learns as a training round does. It leaves out episode
files, checkpoints and evaluations: a run makes them once a round or less.
"""
import contextlib
import json
import pathlib
import resource
import sys
import tempfile
import time
from functools import partial

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cmil  # noqa: I001  before torch, for it sets how OpenMP waits
import envs
import numpy as np
import torch

SECONDS = 20  # for each of the three measurements

def rate(function, device):
    """Return how many calls of `function` fit into a second, after a few untimed ones."""
    for _ in range(12 if device.type == "cuda" else 1):   # CUDA records its graph first
        function()
    start = time.perf_counter()
    calls = 0
    while calls < 3 or time.perf_counter() < start + SECONDS:
        function()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return calls / (time.perf_counter() - start)

def play(trainer, update, updates):
    """Step all environments, episode after episode, with `updates` updates per step."""
    vec = trainer.vec
    info = envs.env_info(vec)
    while True:
        image = vec.reset(seed=0)[0]
        carry = None
        action = np.zeros((vec.num_envs, info["action_dim"]), np.float32)
        for _ in range(info["episode_steps"]):
            if updates:
                action, carry = trainer.agent.act(image, carry)
            vec.step_async(action)
            for _ in range(updates):
                update()
            image = vec.step_wait()[0]
            yield

def measure(c):
    """Time the run of config `c` -> dict, the line to print."""
    with contextlib.redirect_stdout(sys.stderr):   # stdout is for the one line
        trainer = cmil.Trainer(c)
    device = trainer.agent.device
    per_step = max(1, round(c.train_ratio * c.num_envs))
    update = partial(trainer.agent.update, trainer.replay, trainer.agent.cloning_only)
    updates = rate(update, device)
    steps = rate(partial(next, play(trainer, update, 0)), device)
    both = rate(partial(next, play(trainer, update, per_step)), device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    cmil.envs.close(trainer.vec)
    return {"updates_per_s": updates, "seconds_per_update": 1 / updates,
            "env_steps_per_s": steps * c.num_envs,
            "both": {"updates_per_s": both * per_step, "env_steps_per_s": both * c.num_envs},
            "peak_mem_gb": peak / 1e9, "algo": c.algo, "preset": c.preset, "env": c.env,
            "device": str(device), "threads": torch.get_num_threads()}

def main():
    explicit, _ = cmil.parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="cmil-bench-") as folder:
        try:
            c = cmil.make_config({**explicit, "logdir": folder, "minutes": 0.0})
            print(json.dumps(measure(c)))
        except envs.UserError as error:
            cmil.die(error)

if __name__ == "__main__":
    main()
