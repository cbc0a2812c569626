"""What the latent state knows of the scene: filter episodes, then read the scene from feat.

    python results/sight.py --variants "" "--free-nats 3" "--conv-depth 16" [any flag of cmil.py]
    python results/sight.py --runs RUN [RUN ...] --fresh FILE.npz

For each variant: `--updates` updates of the start (world model and cloning) on all demonstrations
but the last two, which are then held out. For each run: its last checkpoint; held out are the
episodes of FILE, which the run has never seen (demos/make_kitchen.py --n 6 --seed 500 --out FILE).
A ridge regression reads the simulator's positions from feat; it is fitted to the demonstrations.
One JSON line each, measured on what is held out: the error in the arm's joints (rad), the fingers
(mm), each object's joint or the kettle's place as a share of its own spread (0: known, 1: nothing
known), the cloning loss, and the pictures' error where they move and where they do not. The first
line is a clock's, which knows the step and nothing else. With --episodes RUN the world model of
the variants learns from the episodes of that run too.
"""
import argparse
import json
import pathlib
import shlex
import sys
import time

import numpy as np
import torch

sys.path[:0] = map(str, pathlib.Path(__file__).parents[:2])
import cmil  # noqa: E402
import envs  # noqa: E402

PARTS = {"arm": slice(0, 7), "fingers": slice(7, 9), "light": [17], "slide": [19],
         "microwave": [22], "kettle": slice(23, 26)}        # where qpos has them
HELD_OUT = 2
DEMOS = pathlib.Path(cmil.__file__).parent / "demos" / "kitchen.npz"


def ridge(feat, target, strength=1.0):
    """Linear map with intercept from feat (n, F) to target (n, k), as a function."""
    mean, scale = feat.mean(0), feat.std(0) + 1e-6
    x = np.c_[(feat - mean) / scale, np.ones(len(feat))]
    penalty = strength * np.eye(x.shape[1])
    penalty[-1, -1] = 0
    weight = np.linalg.solve(x.T @ x + penalty, x.T @ target)
    return lambda f: np.c_[(f - mean) / scale, np.ones(len(f))] @ weight


@torch.no_grad()
def look(agent, demos):
    """Filter whole episodes -> feat (T+1, n, F), image, action (T+1, n, ...), prediction."""
    image = torch.as_tensor(np.stack([d["image"] for d in demos], 1))
    action = torch.as_tensor(np.stack([d["action"] for d in demos], 1))
    post = agent.world.rssm.observe(agent.world.encoder(cmil.to_float(image)), action)
    return post.feat, cmil.to_float(image), action, agent.world.decoder(post.feat)


def update(agent, replay):
    """The world model on everything, cloning on the demonstrations: the start, with more data."""
    image, action = replay.sample(agent.c.batch)
    expert_image, expert_action = replay.sample_demos(agent.c.batch)
    rssm, encoder = agent.world.rssm, agent.world.encoder
    image = cmil.to_float(image)
    post = rssm.observe(encoder(image), action)
    world_loss, info = cmil.world_model_loss(agent.world, image, post, agent.c)
    with torch.no_grad():
        expert = rssm.observe(encoder(cmil.to_float(expert_image)), expert_action)
    bc_loss = cmil.clone_loss(agent.actor, expert.feat, expert_action)
    return agent.apply({"world": world_loss, "actor": bc_loss}, info)


def shares(error, truth):
    """Errors and truth (T+1, n, nq) -> dict of the parts' errors, in the units named above."""
    rms = {part: float(np.sqrt(np.square(error[..., at]).mean())) for part, at in PARTS.items()}
    for part in ("light", "slide", "microwave", "kettle"):
        there = truth[..., PARTS[part]]
        rms[part] /= float(np.sqrt(np.square(there - there.mean((0, 1))).mean()))
    rms["fingers"] *= 1000
    return {part: round(value, 4) for part, value in rms.items()}


def clock(fit_qpos, held_qpos):
    """What is known of the held-out episodes by the step alone: the others' mean -> dict."""
    return shares(fit_qpos.mean(1, keepdims=True) - held_qpos, held_qpos)


def scene(agent, fit, fit_qpos, held, held_qpos):
    """What the agent's latents know of the held-out episodes, after reading the others -> dict."""
    feat, *_ = look(agent, fit)
    read = ridge(feat.flatten(0, 1).numpy(), fit_qpos.reshape(-1, fit_qpos.shape[-1]))
    feat, image, action, predicted = look(agent, held)
    error = read(feat.flatten(0, 1).numpy()).reshape(held_qpos.shape) - held_qpos
    moves = (image - image.median(0).values).abs().amax(2, keepdim=True) > 0.1
    squared = (predicted - image).square().mean(2, keepdim=True)
    with torch.no_grad():
        bc = float(cmil.clone_loss(agent.actor, feat, action))
    return {**shares(error, held_qpos), "bc": round(bc, 3),
            "rms_moving": round(float(squared[moves].mean().sqrt()), 4),
            "rms_still": round(float(squared[~moves].mean().sqrt()), 4)}


def measure(c, updates, demos, qpos, episodes):
    """Train a variant's start, then see what it knows of the last two demonstrations -> dict."""
    device = cmil.setup_torch(c)
    torch.manual_seed(c.seed)
    actions = demos[0]["action"].shape[1]
    fit, held = demos[:-HELD_OUT], demos[-HELD_OUT:]
    agent = cmil.Agent(c, actions, device)
    rows = sum(len(episode["image"]) for episode in fit + episodes)
    replay = cmil.Replay(rows, c.length, actions, device)
    for i, episode in enumerate(fit + episodes):
        replay.add(episode["image"], episode["action"], demo=i < len(fit))
    start = time.perf_counter()
    for _ in range(updates):
        update(agent, replay) if episodes else agent.update(replay, clone=True)
    seconds = (time.perf_counter() - start) / updates
    return {**scene(agent, fit, qpos[:, :-HELD_OUT], held, qpos[:, -HELD_OUT:]),
            "ms_per_update": round(1000 * seconds)}


def positions(file, steps):
    """The simulator's positions in a file of demonstrations -> (steps + 1, n, nq)"""
    with np.load(file) as stored:
        return stored["qpos"][:, :steps + 1].astype(np.float64).swapaxes(0, 1)


def say(name, found):
    print(json.dumps({**name, **found}), flush=True)


def of_runs(runs, fresh):
    """One line for each run, measured on the episodes in the file `fresh`."""
    for i, run in enumerate(runs):
        c, agent, vec, steps = cmil.load_agent(run, {"num_envs": 1, "device": "cpu"})
        fit, held = (envs.load_demos(file, c.env, 0, vec, **cmil.env_options(c))
                     for file in ("", fresh))
        vec.close()
        fit_qpos, held_qpos = (positions(file, steps) for file in (DEMOS, fresh))
        if i == 0:
            say({"run": "clock"}, clock(fit_qpos, held_qpos))
        say({"run": pathlib.Path(run).name, "update": agent.updates},
            scene(agent, fit, fit_qpos, held, held_qpos))


def of_variants(variants, flags, updates, run):
    """One line for each variant's start; with `run`, learned from that run's episodes too."""
    base = ["--env", "kitchen", "--preset", "small", "--algo", "dbc", "--logdir", "unused", *flags]
    episodes = [envs.read_npz(file) for file in sorted(
        pathlib.Path(run, "episodes").iterdir())] if run else []
    demos = None
    for variant in variants:
        c = cmil.make_config(cmil.parse(base + shlex.split(variant))[0])
        demos = demos or envs.load_demos("", "kitchen", **cmil.env_options(c))
        qpos = positions(DEMOS, len(demos[0]["image"]) - 1)
        if variant == variants[0]:
            say({"variant": "clock"}, clock(qpos[:, :-HELD_OUT], qpos[:, -HELD_OUT:]))
        say({"variant": variant, "updates": updates, "episodes": len(episodes)},
            measure(c, updates, demos, qpos, episodes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=[""])
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--episodes", metavar="RUN", help="learn from a run's episodes too")
    parser.add_argument("--runs", metavar="RUN", nargs="+", help="runs of the kitchen")
    parser.add_argument("--fresh", metavar="FILE.npz", help="with --runs: episodes to measure on")
    args, flags = parser.parse_known_args()
    if args.runs and not args.fresh:
        parser.error("--runs needs --fresh FILE.npz")
    if args.runs:
        of_runs(args.runs, args.fresh)
    else:
        of_variants(args.variants, flags, args.updates, args.episodes)


if __name__ == "__main__":
    main()
