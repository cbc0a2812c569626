"""Train as `python cmil.py` does, and log beside it what pulls on the actor.

    python results/drift.py --env kitchen --tasks microwave [any other flag of cmil.py]

The run is the one that cmil.py makes (its random numbers are left alone); metrics.jsonl has more:

    watch/logit_expert, _replay, _dream        the discriminator's logit (no noise) on pairs of the
                                               demonstrations, of what the policy has played, and
                                               imagined from states of both, as in training
    watch/u_expert, u_replay                   disagreement [P9] one step ahead, along real actions
    watch/u_dream                              and along the policy's
    watch/u_random                             and for random actions in the demonstrations' states
    watch/..._std                              their spread over the pairs
    watch/grad_reward, _penalty, _value,       norm of each term's gradient at the actor's weights;
    _entropy, _bc                              they add up to [W6] with its BC term

    python results/drift.py --draw RUN [RUN ...] OUT.png
    python results/drift.py --at RUN

draw all that over the updates, a column for each run, and print it at a run's last checkpoint (one
JSON line, means over twenty batches). Exit code 1: a signal has stopped the run.
"""
import json
import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = map(str, pathlib.Path(__file__).parents[:2])
import cmil  # noqa: E402


def actor_terms(agent, dream):
    """[W6] taken apart: it is linear in reward, penalty, values and entropy -> dict of losses."""
    c, zero = agent.c, torch.zeros_like(dream.disagreement)
    value = cmil.state_values(agent.critics, dream)                         # (H+1, N)
    reward = cmil.conservative_reward(agent.disc, dream._replace(disagreement=zero), c)
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
    windows = {"start": replay.sample(B), "expert": replay.sample_demos(B)}
    if replay.n_starts > replay.n_demo_starts:
        windows["replay"] = replay.sample_played(B)

    def spread(name, u):
        found[f"u_{name}"], found[f"u_{name}_std"] = u.mean(), u.std()
    with torch.no_grad():
        posts = {name: rssm.observe(agent.world.encoder(cmil.to_float(image)), action)
                 for name, (image, action) in windows.items()}
        pairs = {name: cmil.state_action_pairs(posts[name].feat, windows[name][1])
                 for name in windows if name != "start"}
        for name, (_, a) in pairs.items():
            state = posts[name].map(lambda x: x[:-1].flatten(0, 1))
            spread(name, rssm.step_prior(state, a.flatten(0, 1))[1])
            if name == "expert":
                anything = 2 * torch.rand_like(a).flatten(0, 1) - 1
                spread("random", rssm.step_prior(state, anything)[1])
    dream = cmil.imagine(rssm, agent.actor, posts["start"].map(lambda x: x.flatten(0, 1)),
                         windows["start"][1].flatten(0, 1), c.horizon)
    spread("dream", dream.disagreement)
    pairs["dream"] = cmil.state_action_pairs(dream.feat, dream.action)
    with torch.no_grad():
        for name, (s, a) in pairs.items():
            logit = agent.disc(s, a)
            found[f"logit_{name}"], found[f"logit_{name}_std"] = logit.mean(), logit.std()
    terms = actor_terms(agent, dream)
    terms["bc"] = c.beta * cmil.clone_loss(agent.actor, posts["expert"].feat, windows["expert"][1])
    for name, loss in terms.items():
        if not loss.requires_grad:  # the penalty of a single prior
            continue
        grads = torch.autograd.grad(loss, agent.opts["actor"].params, retain_graph=True)
        found[f"grad_{name}"] = torch.cat([g.flatten() for g in grads]).norm()
    return {f"watch/{name}": float(value.detach()) for name, value in found.items()}


class Watched(cmil.Trainer):
    def log(self, values):
        # At log steps of full updates of CMIL and its variants; the caller keeps the random state.
        if "reward" in values and type(self.agent) is cmil.Agent:
            values = {**values, **watch(self.agent, self.replay)}
        super().log(values)


def reopened(run, methods):
    """The Trainer of the run in folder `run`, at its last checkpoint, to be looked at. Any method
    but `methods` is refused."""
    stored = cmil.read_config(run)
    if stored is None:
        cmil.die(f"{run}: no config.json there; give the folder of a run")
    if stored["algo"] not in methods:
        cmil.die(f"{run}: a run of {stored['algo']}; this is for {', '.join(methods)}")
    return cmil.Trainer(cmil.Config(**{**stored, "logdir": run}))


def at(run):
    """watch() at the last checkpoint of the run in folder `run`, over twenty batches: one line."""
    trainer = reopened(run, [algo for algo in cmil.ALGOS if algo not in cmil.AGENTS])
    torch.manual_seed(0)
    found = [watch(trainer.agent, trainer.replay) for _ in range(20)]
    trainer.close()
    print(json.dumps({"run": pathlib.Path(run).name, "update": trainer.agent.updates, **{
        name: round(float(np.mean([one[name] for one in found])), 5) for name in found[0]}}))


PANELS = {  # title -> names in metrics.jsonl; a name and its _std are drawn as a line and a band
    "tasks an episode": ("eval/tasks", "train/tasks"),
    "logit of D": ("watch/logit_expert", "watch/logit_replay", "watch/logit_dream"),
    "reward [P10]": ("reward",),
    "critics' squared error [W7]": ("critic/model",),
    "gradient norms at the actor": tuple(
        f"watch/grad_{term}" for term in ("bc", "value", "reward", "penalty", "entropy")),
    "cloning loss, entropy": ("bc", "entropy"),
    "disagreement [P9]": ("watch/u_expert", "watch/u_replay", "watch/u_dream", "watch/u_random"),
}
LOGARITHMIC = ("critics' squared error [W7]", "gradient norms at the actor")


def draw(runs, out):
    """The panels for each run in `runs` (folders) into the picture `out`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(len(PANELS), len(runs), squeeze=False, sharex="col", sharey="row",
                                layout="constrained",
                                figsize=(4.5 * len(runs), 1.8 * len(PANELS)))
    for column, run in enumerate(runs):
        lines = [json.loads(line) for line in open(pathlib.Path(run) / "metrics.jsonl")]
        for axis, (title, names) in zip(axes[:, column], PANELS.items()):
            for index, name in enumerate(names):
                points = [line for line in lines if name in line]
                x, y = ([line[key] for line in points] for key in ("update", name))
                axis.plot(x, y, f"C{index}", lw=1, label=name.split("/")[-1].split("_")[-1]
                          if name.startswith("watch/") else name)
                if points and name + "_std" in points[0]:
                    spread = np.array([line[name + "_std"] for line in points])
                    axis.fill_between(x, y - spread, y + spread, color=f"C{index}", alpha=.15, lw=0)
            axis.set_yscale("log" if title in LOGARITHMIC else "linear")
            axis.set_title(title, fontsize=8)
            axis.grid(alpha=.3)
            axis.xaxis.set_major_locator(plt.MaxNLocator(4))
            if column == len(runs) - 1:
                axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
        axes[0, column].set_title(f"{pathlib.Path(run).name}\ntasks an episode", fontsize=8)
        axes[-1, column].set_xlabel("update")
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    if "--draw" in sys.argv[1:2]:
        *folders, picture = sys.argv[2:]
        sys.exit(draw(folders, picture))
    try:
        if sys.argv[1:2] == ["--at"]:
            sys.exit(at(*sys.argv[2:3]))
        explicit, _ = cmil.parse(sys.argv[1:])
        run = Watched(cmil.make_config(explicit))
        run.run()
        sys.exit(run.stop.startswith("SIG"))
    except (Exception, KeyboardInterrupt) as error:
        cmil.die(cmil.envs.trouble(error))
