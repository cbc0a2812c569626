"""What DITTO's reward says of the policy, of the experts' own actions, and of random ones.

    python results/match.py RUN [RUN ...]

For each run of ditto, one JSON line: the mean match with the demonstrations' states, over 64 of
their windows and all imagined steps, at its last checkpoint.
"""
import json
import pathlib
import sys

import torch

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])
import cmil  # noqa: E402
import drift  # noqa: E402


@torch.no_grad()
def matches(agent, replay, windows=64):
    """-> dict of the mean match of three ways to act in the model from the same states."""
    rssm, H = agent.world.rssm, agent.c.horizon
    image, action = replay.sample_demos(windows)                            # (L, B, ...)
    post, starts = rssm.observe(agent.world.encoder(cmil.to_float(image)), action), len(image) - H
    act = {"policy": lambda state, k: agent.actor(state.feat).rsample(),
           "expert": lambda state, k: action[k:k + starts].flatten(0, 1),
           "random": lambda state, k: 2 * torch.rand(len(state.deter), action.shape[-1]) - 1}
    found = {}
    for who in act:
        state, rewards = post.map(lambda x: x[:starts].flatten(0, 1)), []
        for k in range(1, H + 1):
            state, _ = rssm.step_prior(state, act[who](state, k))
            rewards.append(cmil.match(state.deter, post.deter[k:k + starts].flatten(0, 1)).mean())
        found[who] = round(float(torch.stack(rewards).mean()), 4)
    return found


def main():
    for run in sys.argv[1:] or cmil.die("match.py: give folders of runs of ditto"):
        trainer = drift.reopened(run, ["ditto"])
        torch.manual_seed(0)
        found = matches(trainer.agent, trainer.replay)
        trainer.close()
        print(json.dumps({"run": pathlib.Path(run).name, "update": trainer.agent.updates, **found}))


if __name__ == "__main__":
    main()
