"""What sampling costs a policy: evaluations with modes and samples of latents and actions, apart.

    python results/noise.py RUN [--episodes 40] [--seed 2000]

Four JSON lines for the run's last checkpoint, over the episodes that `cmil.py --eval RUN` with the
same --seed would begin: means, and under `each` every episode's own. With both alike an episode is
that command's.
"""
import argparse
import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cmil  # noqa: E402


class Mixed:
    """An agent whose latents are sampled or modes whatever its actions are."""

    def __init__(self, agent, latents):
        self.agent, self.device, self.latents = agent, agent.device, latents

    @torch.no_grad()
    def act(self, image, carry=None, sample=True):
        """As Agent.act; sample: the actions."""
        if sample == self.latents:
            return self.agent.act(image, carry, sample)
        _, (state, _) = self.agent.act(image, carry, self.latents)
        with self.agent.autocast():
            policy = self.agent.actor(state.feat)
        action = policy.rsample() if sample else policy.mode
        return action.cpu().numpy(), (state, action)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=2000)
    args = parser.parse_args()
    c, agent, vec, steps = cmil.load_agent(args.run, {"seed": args.seed})
    if not isinstance(agent, cmil.Agent):
        vec.close()
        cmil.die(f"{args.run}: a run of {c.algo} has no latents to sample")
    for latents in (False, True):
        for actions in (False, True):
            results, _ = cmil.rollouts(Mixed(agent, latents), vec, steps, args.episodes, c.seed,
                                       cmil.FINAL, actions)
            print(json.dumps({
                "run": pathlib.Path(args.run).name, "latents": "sampled" if latents else "modes",
                "actions": "sampled" if actions else "modes", "episodes": args.episodes,
                "seed": c.seed, "success_ci95": cmil.bootstrap_ci(results["success"]),
                **{key: round(float(x.mean()), 4) for key, x in results.items()},
                "each": {key: x.astype(float).round(4).tolist() for key, x in results.items()}}),
                flush=True)
    vec.close()


if __name__ == "__main__":
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        cmil.die(cmil.envs.trouble(error))
