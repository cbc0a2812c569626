"""What Baoding's demonstrations are worth without eyes, and what rough actions cost a clone.

    python results/baoding_demos.py blind >  results/baoding/demos.jsonl
    python results/baoding_demos.py clone >> results/baoding/demos.jsonl

blind   The demonstrations' actions repeated open loop: each under its own seed, under three other
        seeds (there also in an environment that adds no noise to actions), their mean under twenty
        others, and each under its own seed with noise added.
clone   A network from the simulator's positions and velocities to the action (no pixels), fitted to
        the demonstrations, and to as many rougher ones from the same resets on: guided by a single
        unguided success, as it is, where the demonstrations' reference is the smoothed mean of six
        episodes, guided by that of six others. Three networks for each; each plays twenty episodes.
        unexplained: of the variance of the actions about their mean at each step, the share left on
        four episodes by a network that was fitted to the other sixteen.

One line of JSON for each measurement; nothing is drawn.
"""
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]
import cmil                                                                # noqa: E402
import envs                                                                # noqa: E402
import make_baoding                                                        # noqa: E402
from recording import roll, undrawn                                        # noqa: E402


def tell(name, infos, **more):
    """A line: what the last steps' `infos` say on average."""
    means = {key: round(float(np.mean([info[key] for info in infos])), 4)
             for key in ("success", "rotation", "error", "dropped")}
    print(json.dumps({"name": name, "episodes": len(infos), **means, **more}), flush=True)


def play(env, seed, actions):
    return roll(env, seed, lambda t, data: actions[t])[1][-1]


def blind(env, demos):
    seeds, actions = demos["seed"].tolist(), demos["action"]

    def elsewhere(env):
        return [play(env, 70_000 + 3 * i + k, tape) for i, tape in enumerate(actions)
                for k in range(3)]
    tell("own seeds", [play(env, *pair) for pair in zip(seeds, actions)],
         roughness=round(make_baoding.roughness(actions), 4),
         spread=round(float(actions.std(0).mean()), 4))
    tell("three other seeds each", elsewhere(env))
    tell("mean of all", [play(env, 71_000 + k, actions.mean(0)) for k in range(20)])
    still = undrawn(type("Still", (envs.Baoding,), {"NOISE": 0.0}))
    tell("three other seeds each, no noise in the environment", elsewhere(still))
    still.close()
    noise = np.random.default_rng(0).normal(scale=0.1, size=actions.shape)
    tell("own seeds, noise of std 0.1 added", [
        play(env, *pair) for pair in zip(seeds, np.clip(actions + noise, -1, 1))])


def sight(data):
    """What the clone sees: positions and velocities of hand and balls."""
    return np.concatenate([data.qpos, 0.1 * data.qvel])


def watched(env, seed, policy):
    """An episode -> what was seen (T, O), actions (T, 20), the last info."""
    seen = []

    def act(t, data):
        seen.append(sight(data))
        return policy(t, data)
    demo, infos = roll(env, seed, act)
    return np.array(seen), demo["action"], infos[-1]


def as_shipped(env, demos):
    """The file's own episodes, played again -> seen (N, T, O), action (N, T, 20)."""
    pairs = [watched(env, seed, lambda t, data: tape[t])[:2]
             for seed, tape in zip(demos["seed"].tolist(), demos["action"])]
    return map(np.array, zip(*pairs))


def made_rough(env, demos):
    """As many successful episodes from the same resets on, guided by one unguided success."""
    pool, found, first = make_baoding.Pool(env.model, 1), [], int(demos["seed"][0])
    with contextlib.redirect_stdout(sys.stderr):
        (plain,), _ = make_baoding.collect(env, pool, 1, first + 1000, make_baoding.PLAIN)
    tries = 20 * len(demos["seed"])
    for seed in range(first, first + tries):
        expert = make_baoding.Expert(env, make_baoding.GUIDED, np.random.default_rng([seed, 1]),
                                     pool, plain["action"].astype(float))
        seen, action, info = watched(env, seed, expert.act)
        found += [(seen, action)] if info["success"] else []
        if len(found) == len(demos["seed"]):
            return map(np.array, zip(*found))
    sys.exit(f"baoding_demos: the expert succeeded in {len(found)} of {tries} episodes")


def fit(seen, action, seed, steps=3_000):
    """seen (N, T, O), action (N, T, 20) -> a function from (..., O) to actions (..., 20)."""
    torch.manual_seed(seed)
    mean, std = seen.mean((0, 1)), seen.std((0, 1)) + 1e-3
    x = torch.tensor((seen - mean) / std, dtype=torch.float32).flatten(0, 1)
    y = torch.tensor(action, dtype=torch.float32).flatten(0, 1)
    net = torch.nn.Sequential(cmil.mlp(x.shape[-1], 256, 2, 20), torch.nn.Tanh())
    adam = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        blurred = x[rows] + 0.1 * torch.randn(256, x.shape[-1])  # a tube, not a line
        loss = (net(blurred) - y[rows]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    @torch.no_grad()
    def policy(seen):
        return net(torch.tensor((seen - mean) / std, dtype=torch.float32)).numpy()
    return policy


def clone(env, demos):
    for name, make in (("smooth", as_shipped), ("rough", made_rough)):
        seen, action = make(env, demos)
        about_mean = np.square(action[16:] - action[:16].mean(0)).sum()
        for seed in range(3):
            error = np.square(fit(seen[:16], action[:16], seed)(seen[16:]) - action[16:]).sum()
            policy = fit(seen, action, seed)
            infos = [watched(env, 90_000 + k, lambda t, data: policy(sight(data)))[2]
                     for k in range(20)]
            tell(f"clone of {name} demonstrations", infos, seed=seed,
                 roughness=round(make_baoding.roughness(action), 4),
                 unexplained=round(float(error / about_mean), 3))


def main():
    parts = {"blind": blind, "clone": clone}
    if sys.argv[1:] not in ([name] for name in parts):
        sys.exit("usage: baoding_demos.py blind|clone")
    parts[sys.argv[1]](undrawn(envs.Baoding), np.load(ROOT / "demos" / "baoding.npz"))


if __name__ == "__main__":
    main()
