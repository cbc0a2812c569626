"""Train as `python cmil.py` does, and log beside it what pulls on the actor.

    python results/drift.py --env kitchen --tasks microwave [any other flag of cmil.py]

The run is the one that cmil.py makes (its random numbers are left alone); metrics.jsonl has more:

    watch/logit_expert, _replay, _dream        the discriminator's logit (no noise) on pairs of the
                                               demonstrations, of the replay, and imagined from it
    watch/logit_..._std                        its spread over the pairs
    watch/u_expert, u_replay                   disagreement [P9] one step ahead, along real actions
    watch/u_dream                              and along the policy's
    watch/grad_reward, _penalty, _value,       norm of each term's gradient at the actor's weights;
    _entropy, _bc                              they add up to [W6] with its BC term
"""
import pathlib
import sys

import torch

sys.path[:0] = map(str, pathlib.Path(__file__).parents[:2])
import cmil  # noqa: E402


def actor_terms(agent, dream):
    """[W6] taken apart: it is linear in reward, penalty, values and entropy -> dict of losses."""
    c, zero = agent.c, torch.zeros_like(dream.disagreement)
    s, a = cmil.state_action_pairs(dream.feat, dream.action)
    value = cmil.state_values(agent.critics, dream)                         # (H+1, N)
    reward = cmil.imitation_reward(agent.disc, s, a, c)                     # (H, N)
    penalty, no_value = -c.alpha * dream.disagreement, torch.zeros_like(value)
    weight = cmil.discounts(c.gamma, zero) if c.actor_discount else 1.0

    def loss(reward, value):
        returns = cmil.lambda_return(reward, value, c.gamma, c.lam)
        return -(weight * (c.lam * returns + (1 - c.lam) * value[:-1])).mean()
    return {"reward": loss(reward, no_value), "penalty": loss(penalty, no_value),
            "value": loss(zero, value), "entropy": -(weight * c.entropy * dream.entropy).mean()}


def watch(agent, replay):
    """What the table above names -> dict of floats."""
    c, rssm, B, found = agent.c, agent.world.rssm, agent.c.batch, {}
    windows = {"replay": replay.sample(B), "expert": replay.sample_demos(B)}
    with torch.no_grad():
        posts = {name: rssm.observe(agent.world.encoder(cmil.to_float(image)), action)
                 for name, (image, action) in windows.items()}
    pairs = {name: cmil.state_action_pairs(posts[name].feat, windows[name][1]) for name in windows}
    with torch.no_grad():
        for name, (_, a) in pairs.items():
            state = posts[name].map(lambda x: x[:-1].flatten(0, 1))
            found[f"u_{name}"] = rssm.step_prior(state, a.flatten(0, 1))[1].mean()
    dream = cmil.imagine(rssm, agent.actor, posts["replay"].map(lambda x: x.flatten(0, 1)),
                         windows["replay"][1].flatten(0, 1), c.horizon)
    found["u_dream"] = dream.disagreement.mean()
    pairs["dream"] = cmil.state_action_pairs(dream.feat, dream.action)
    with torch.no_grad():
        for name, (s, a) in pairs.items():
            logit = agent.disc(s, a)
            found[f"logit_{name}"], found[f"logit_{name}_std"] = logit.mean(), logit.std()
    terms = actor_terms(agent, dream)
    terms["bc"] = c.beta * cmil.clone_loss(agent.actor, posts["expert"].feat, windows["expert"][1])
    for name, loss in terms.items():
        grads = torch.autograd.grad(loss, agent.opts["actor"].params, retain_graph=True)
        found[f"grad_{name}"] = torch.cat([g.flatten() for g in grads]).norm()
    return {f"watch/{name}": float(value.detach()) for name, value in found.items()}


class Watched(cmil.Trainer):
    def log(self, values):
        if "reward" in values:  # a log step of full updates; its caller keeps the random state
            values = {**values, **watch(self.agent, self.replay)}
        super().log(values)


if __name__ == "__main__":
    explicit, _ = cmil.parse(sys.argv[1:])
    Watched(cmil.make_config(explicit)).run()
