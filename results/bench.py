"""What `python cmil.py --bench` does: updates, environment steps, both a second; one JSON line."""
import contextlib
import json
import resource
import sys
import tempfile
import time

import numpy as np
import torch

import cmil


def bench(explicit):
    """--bench: updates/s alone, environment steps/s alone, both; one JSON line.

    Both: acting, simulating and learning as in Trainer.play_round; saving episodes, snapshots and
    evaluations, once a round or less often, are left out.
    """
    folder = tempfile.TemporaryDirectory(prefix="cmil-bench-")
    c = cmil.make_config({**explicit, "logdir": folder.name, "minutes": 0.0})
    with contextlib.redirect_stdout(sys.stderr):  # the one line is for stdout
        trainer = cmil.Trainer(c)
    agent, vec, replay = trainer.agent, trainer.vec, trainer.replay

    def update():
        agent.update(replay, agent.clone_only)
    replay.image[replay.rows:] = 0  # all of it: untouched memory would not count in peak_mem_gb
    sync = waiter(agent.device)

    def rate(function, seconds=20.0, least=3):
        for _ in range(1 if agent.device.type == "cpu" else cmil.Graphed.WARM_UP + 1):
            function(), sync()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or count < least:
            function(), sync()
            count += 1
        return count / (time.perf_counter() - start)

    action = np.zeros((c.num_envs, replay.action.shape[1]), np.float32)

    def simulate():
        """An episode of every environment, without learning."""
        vec.reset(seed=0)
        for _ in range(trainer.T):
            vec.step(action)

    each = max(1, round(c.train_ratio * c.num_envs))  # updates while the environments take a step

    def both():
        """Steps of all environments with their updates behind them."""
        image, carry = vec.reset(seed=0)[0], None
        for _ in range(trainer.T):
            action, carry = agent.act(image, carry)
            vec.step_async(action)
            for _ in range(each):
                update()
            image = vec.step_wait()[0]
            yield

    updates = rate(update)
    steps = rate(simulate, least=1) * trainer.T * c.num_envs
    rounds = (_ for _ in iter(int, 1) for _ in both())  # both() again and again
    together = rate(lambda: next(rounds))
    cuda = agent.device.type == "cuda"
    peak = torch.cuda.max_memory_reserved() / 1e9 if cuda else peak_memory()
    trainer.close()
    folder.cleanup()
    print(json.dumps({"updates_per_s": updates, "seconds_per_update": 1 / updates,
                      "env_steps_per_s": steps,
                      "both": {"updates_per_s": together * each,
                               "env_steps_per_s": together * c.num_envs},
                      "peak_mem_gb": peak,
                      "algo": c.algo, "preset": c.preset, "env": c.env, "device": str(agent.device),
                      "threads": torch.get_num_threads()}))


def waiter(device):
    """A function that returns once the device has done all that was asked of it."""
    return torch.cuda.synchronize if device.type == "cuda" else (lambda: None)


def agent_on_noise(c, actions=9):
    """An agent and a replay of random frames, without any environment: an update's cost does not
    depend on the data. -> Agent, Replay"""
    device = cmil.setup_torch(c)
    torch.manual_seed(0)
    agent = cmil.AGENTS.get(c.algo, cmil.Agent)(c, actions, device)
    replay = cmil.Replay(2000, c.length, actions, device)
    for i in range(5):
        replay.add(torch.randint(256, (300, 64, 64, 3), dtype=torch.uint8),
                   torch.rand(300, actions) * 2 - 1, demo=i < 2)
    return agent, replay


def median_seconds(agent, replay, updates, warm_up=2):
    """Median wall time of an update, after some that warm it up."""
    times, sync = [], waiter(agent.device)
    for _ in range(warm_up + updates):
        sync()
        start = time.perf_counter()
        agent.update(replay, agent.clone_only)
        sync()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warm_up:]))


def peak_memory():
    """Peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
