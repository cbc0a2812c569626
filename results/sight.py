"""What the latent state knows of the scene: learn a run's start, then read the scene from feat.

    python results/sight.py --variants "" "--free-nats 3" "--conv-depth 16" [any flag of cmil.py]

For each variant: `--updates` updates of the start (world model and cloning) on all demonstrations
but the last two, then a ridge regression from feat to the simulator's positions. One JSON line
each, measured on those last two, which nothing was fitted to: the error in the arm's joints (rad),
the fingers (mm), each object's joint or the kettle's place as a share of its own spread (0: known,
1: nothing known), the cloning loss, and the pictures' error where they move and where they do not.
With --episodes RUN the world model learns from the episodes of that run too.
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


def measure(c, updates, demos, qpos, episodes):
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
        update(agent, replay) if episodes else agent.clone_update(replay)
    seconds = (time.perf_counter() - start) / updates
    feat, *_ = look(agent, fit)
    read = ridge(feat.flatten(0, 1).numpy(), qpos[:, :-HELD_OUT].reshape(-1, qpos.shape[-1]))
    feat, image, action, predicted = look(agent, held)
    truth = qpos[:, -HELD_OUT:].reshape(-1, qpos.shape[-1])
    error = read(feat.flatten(0, 1).numpy()) - truth
    rms = {part: float(np.sqrt(np.square(error[:, at]).mean())) for part, at in PARTS.items()}
    for part in ("light", "slide", "microwave", "kettle"):
        rms[part] /= float(truth[:, PARTS[part]].std(0).max())
    rms["fingers"] *= 1000
    moves = (image - image.median(0).values).abs().amax(2, keepdim=True) > 0.1
    squared = (predicted - image).square().mean(2, keepdim=True)
    with torch.no_grad():
        bc = float(cmil.clone_loss(agent.actor, feat, action))
    return {**{k: round(v, 4) for k, v in rms.items()}, "bc": round(bc, 3),
            "rms_moving": round(float(squared[moves].mean().sqrt()), 4),
            "rms_still": round(float(squared[~moves].mean().sqrt()), 4),
            "ms_per_update": round(1000 * seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", default=[""])
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--episodes", metavar="RUN", help="learn from a run's episodes too")
    args, flags = parser.parse_known_args()
    base = ["--env", "kitchen", "--preset", "small", "--algo", "dbc", "--logdir", "unused", *flags]
    with np.load(pathlib.Path(cmil.__file__).parent / "demos" / "kitchen.npz") as stored:
        qpos = stored["qpos"].astype(np.float64)
    demos, episodes = None, []
    for file in sorted(pathlib.Path(args.episodes, "episodes").iterdir()) if args.episodes else []:
        episodes.append(envs.read_npz(file))
    for variant in args.variants:
        c = cmil.make_config(cmil.parse(base + shlex.split(variant))[0])
        demos = demos or envs.load_demos("", "kitchen", **cmil.env_options(c))
        rows = qpos[:, :len(demos[0]["image"])].swapaxes(0, 1)               # (T+1, demos, nq)
        print(json.dumps({"variant": variant, "updates": args.updates, "episodes": len(episodes),
                          **measure(c, args.updates, demos, rows, episodes)}), flush=True)


if __name__ == "__main__":
    main()
