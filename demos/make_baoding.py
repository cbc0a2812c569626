"""Expert that makes the demonstrations for the Baoding balls, by looking ahead in the simulator.

    python demos/make_baoding.py --n 20 --seed 0 --out demos/baoding.npz

The expert is model-predictive path integral control, MPPI (Williams et al. 2017), on the simulator
itself. At each step it tries N noisy variations of its plan for the next H steps. Its new plan is
their mean, weighted by exp(-cost / temperature). It executes the plan's first action.

    plan      a_t  a_t+1 ... a_t+H-1      N variations: noise that is correlated along the horizon
    cost           c_t+1 ... c_t+H        mean over the horizon, the last one twice
    new plan  sum_n w_n a(n)              then shifted by one step: it starts the next search

Unguided, this search turns the balls in some episodes, with rough actions (stage 1). A successful
episode is then the REFERENCE of easier searches: the plan is pulled towards it, so fewer samples
suffice, and deviation and roughness add to the cost. Six guided episodes, averaged and smoothed,
make a smoother reference (stages 2 and 3) for the demonstrations (stage 4). Smoothing the executed
actions would drop the balls: all smoothness comes from the search.

The file holds simulator states and actions, no pixels: see demos/README.md. Units: m, rad, steps of
0.1 s. World frame: the palm looks up (+z), the fingers point along +y, the thumb is at +x.
"""
import os
import time
from dataclasses import dataclass

import mujoco
import mujoco.rollout
import numpy as np
from recording import arguments, fail, full_state, roll, save, undrawn

CORRELATION = 0.4  # of the noise of one step of the plan with the next
SCALE = (0.25, 1.2)  # each sample's noise is sigma times e^U(ln .25, ln 1.2)
TEMPERATURE = (0.1, 0.5)  # half of what the best tenth of the costs spans


@dataclass
class Search:
    """Set up a search. Costs are per step; a distance of 2 cm costs 1."""

    samples: int = 128
    horizon: int = 8
    sigma: float = 0.5  # std of an action's noise
    pull: float = 0.0  # share of the way from plan to reference
    near: float = 0.0  # weight of the squared deviation from it
    smooth: float = 0.0  # weight of the squared change of action


PLAIN = Search()
GUIDED = Search(64, 8, 0.25, pull=0.3, near=0.5, smooth=1.0)


class Expert:
    """Search by MPPI for one episode. reference (T, 20): actions to stay near, or None."""

    def __init__(self, env, search, rng, pool, reference=None):
        self.env = env
        self.search = search
        self.rng = rng
        self.pool = pool
        self.reference = reference
        self.plan = np.zeros((search.horizon, env.action_dim))
        self.last = np.zeros(env.action_dim)
        rests = np.isclose(env.control(-np.ones(env.action_dim)), env.control(self.last))
        self.least = np.where(rests, 0, -1)  # a joint at its limit can only go up from action 0
        if reference is not None:
            self.plan[:] = self.ahead(0)

    def ahead(self, t):
        """Return the reference for the plan's steps: (H, 20); its last action repeats."""
        rows = np.arange(t, t + self.search.horizon)
        return self.reference[np.minimum(rows, len(self.reference) - 1)]

    def act(self, t):
        """Search from the simulation's present state -> action (20,) float32 in [-1, 1]."""
        if self.reference is not None:
            self.plan += self.search.pull * (self.ahead(t) - self.plan)
        plans = np.clip(self.plan + self.noise(), -1, 1)  # (N, H, 20)
        cost = self.cost(t, plans, self.simulate(plans))  # (N,)
        low = cost.min()
        share, factor = TEMPERATURE
        temperature = factor * (np.quantile(cost, share) - low) + 1e-9
        weight = np.exp((low - cost) / temperature)
        self.plan = np.tensordot(weight / weight.sum(), plans, 1)  # (H, 20)
        action = np.maximum(self.plan[0], self.least).astype(np.float32)
        self.plan = np.concatenate([self.plan[1:], self.plan[-1:]])
        self.last = action
        return action

    def noise(self):
        """Draw (N, H, 20), correlated along H; each sample has its own scale, the first 0."""
        s = self.search
        fresh = self.rng.normal(size=(s.samples, s.horizon, self.env.action_dim))
        for h in range(1, s.horizon):
            new = np.sqrt(1 - CORRELATION**2) * fresh[:, h]
            fresh[:, h] = CORRELATION * fresh[:, h - 1] + new
        scale = np.exp(self.rng.uniform(*np.log(SCALE), size=(s.samples, 1, 1)))
        scale[0] = 0
        return s.sigma * scale * fresh

    def simulate(self, plans):
        """Run plans (N, H, 20) in the simulator, side by side -> balls (N, H, 2, 3)."""
        env = self.env
        substeps = env.SUBSTEPS
        state = full_state(env, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        control = np.repeat(env.control(plans), substeps, 1)  # (N, H substeps, 20)
        warmstart = env.data.qacc_warmstart[None]
        states, _ = self.pool.rollout(
            env.model, self.pool.data, state[None], control, initial_warmstart=warmstart
        )
        qpos = states[:, substeps - 1 :: substeps, 1 : 1 + env.model.nq]  # column 0: time
        return env.balls_in(qpos)

    def cost(self, t, plans, balls):
        """Return the costs (N,) of plans (N, H, 20) with balls at (N, H, 2, 3)."""
        search = self.search
        target = self.env.targets(t + 1 + np.arange(search.horizon))  # (H, 2, 2)
        distance = np.linalg.norm(balls[..., :2] - target, axis=-1).sum(-1)  # (N, H)
        line = balls[..., 0, :2] - balls[..., 1, :2]
        wanted = target[..., 0, :2] - target[..., 1, :2]
        cross = line[..., 0] * wanted[..., 1] - line[..., 1] * wanted[..., 0]
        angle = np.abs(np.arctan2(cross, (line * wanted).sum(-1)))
        lowest = balls[..., 2].min(-1)
        sinking = np.maximum(0, 0.11 - lowest) / 0.005
        cost = distance / 0.02 + 1.5 * angle + sinking + 20 * (lowest < 0.08)
        before = np.broadcast_to(self.last, plans[:, :1].shape)
        change = np.diff(plans, axis=1, prepend=before)
        cost += search.smooth * np.square(change).mean(-1)
        if self.reference is not None:
            cost += search.near * np.square(plans - self.ahead(t)).mean(-1)
        weight = np.ones(search.horizon)
        weight[-1] = 2
        return cost @ weight / weight.sum()


class Pool(mujoco.rollout.Rollout):
    """Keep MuJoCo's threads, with their data."""

    def __init__(self, model, threads):
        super().__init__(nthread=threads)
        self.data = [mujoco.MjData(model) for _ in range(threads)]


def episode(env, seed, search, pool, reference=None):
    """Play the expert's episode for this seed, which fixes all of it -> demo, last info."""
    expert = Expert(env, search, np.random.default_rng([seed, 1]), pool, reference)
    demo, infos = roll(env, seed, expert.act)
    return demo, infos[-1]


def roughness(action):
    """Return the mean absolute change of an action (..., T, 20) from one step to the next."""
    return float(np.abs(np.diff(action, axis=-2)).mean())


def smoothed(actions, width=0.7):
    """Average episodes (N, T, 20), smooth along T by a Gaussian of `width` steps -> (T, 20)."""
    offset = np.arange(-3, 4)
    kernel = np.exp(-0.5 * (offset / width) ** 2)
    padded = np.pad(np.mean(actions, 0), ((3, 3), (0, 0)), mode="edge")
    rows = np.arange(len(padded) - 6)[:, None] + offset + 3  # (T, 7)
    return np.tensordot(padded[rows], kernel / kernel.sum(), ([1], [0]))


def collect(env, pool, n, seed, search, reference=None):
    """Collect `n` successful episodes from reset seeds `seed`, ... -> demos, number of tries."""
    demos = []
    tries = 0
    while len(demos) < n:
        if tries >= 10 + 3 * n:
            failures = tries - len(demos)
            fail(f"{failures} of {tries} attempts failed: install requirements.txt's versions")
        began = time.time()
        demo, info = episode(env, seed + tries, search, pool, reference)
        print(
            f"seed {seed + tries}: {'kept' if info['success'] else 'discarded'}, "
            f"{info['log/rotation']:.2f} turns, error {1e3 * info['log/error']:.1f} mm, "
            f"{info['log/dropped']:.0f} dropped, roughness {roughness(demo['action']):.3f}, "
            f"{time.time() - began:.0f} s",
            flush=True,
        )
        tries += 1
        if info["success"]:
            demos.append(demo)
    return demos, tries


def make_reference(env, pool, seed):
    """Play stages 1 to 3 -> actions (T, 20) for the demonstrations to stay near."""
    print("stage 1: one success without a reference")
    demos, _ = collect(env, pool, 1, seed, PLAIN)
    reference = demos[0]["action"].astype(float)
    for stage in (2, 3):
        print(f"stage {stage}: six guided episodes")
        demos, _ = collect(env, pool, 6, seed + 1000 * stage, GUIDED, reference)
        reference = smoothed([demo["action"] for demo in demos])
    return reference


def main():
    args = arguments("baoding", 20, threads=(os.cpu_count(), "threads to use"))
    began = time.time()
    env = undrawn("baoding")
    pool = Pool(env.model, args.threads)
    reference = make_reference(env, pool, args.seed + 1000)
    print(f"stage 4: the demonstrations ({time.time() - began:.0f} s so far)")
    demos, tries = collect(env, pool, args.n, args.seed, GUIDED, reference)
    save(args.out, "baoding", env, demos)
    rough = np.mean([roughness(demo["action"]) for demo in demos])
    took = time.time() - began
    print(f"{args.n} of {tries} attempts succeeded; roughness {rough:.3f}, {took:.0f} s")


if __name__ == "__main__":
    main()
