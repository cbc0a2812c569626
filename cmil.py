"""CMIL, conservative model-based imitation learning from pixels, in one file.

Kolev, Rafailov, Hatch, Wu, Finn: "Efficient Imitation Learning with Conservative World Models",
L4DC 2024 (arXiv 2405.13193). From 10-20 demonstrations and no reward, learn a world model with an
ensemble of latent priors, a discriminator on latent state-action pairs (the only reward, minus the
ensemble's disagreement), and an actor and a critic ensemble inside the model.

    python cmil.py --env kitchen [--algo ...]         train (the same command resumes)
    python cmil.py --eval runs/kitchen-cmil-s0 --episodes 100 --video rollout.gif
    python cmil.py --plot runs/kitchen-cmil-s* --out curve.png
    python cmil.py --bench --preset paper

EQUATIONS   [P]: the L4DC paper; [W]: its workshop version; [C]: the released code; [D2]: DreamerV2.
  [P1]  world model    max E_q[ sum_t log p(x_t|s_t)
                                - KL( q(s_t|x_t,s_{t-1},a_{t-1}) || T_i(s_t|s_{t-1},a_{t-1}) ) ]
  [P8]  discriminator  min_D -mean log D(s^E,a^E) - mean log(1 - D(s,a))     expert 1, policy 0
  [P9]  mismatch       u(s,a) = std_i mu_i(s,a), mean over dims      mu_i: mean of the i-th prior
  [P10] reward         r(s,a) = log D - log(1-D) - alpha u(s,a)   the first two are D's logit
  [W-]  values         V_0(s_t) = min_i Q_i(s_t,a_t)
        k steps        V_k(s_t) = sum_{j<k} g^j r_{t+j} + g^k V_0(s_{t+k})
  [W5]  TD(lambda)     V(s_t) = (1-l) sum_{k=1}^{H-t-1} l^{k-1} V_k(s_t) + l^{H-t-1} V_{H-t}(s_t)
  [W6]  actor          L = -mean_{t<H}[ l V(s_t) + (1-l) V_0(s_t) ] + beta BC(expert)
  [W7]  critic, model  L = mean_{t<H} (Q_i(s_t,a_t) - Vbar(s_t))^2    bar: by the target critics
  [W8]  critic, data   L = mean_j (Q_i(s_j,a_j) - y_j)^2
                       y_j = r_j + g((1-l) Vbar_0(s_{j+1}) + l Vbar(s_{j+1}))
  [W9]  critic         [W7] + [W8]

SYMBOLS     L window length, B windows, N = L B imagination starts, H horizon, K prior heads,
            m critics, A action size, E embedding, S stoch, D deter, F = S + D feat, T steps (of
            an episode, or any). Tensors are time-major. post = q(s_t|...), prior = T_i(s_t|...),
            feat = [stoch, deter], logit = that of the discriminator D(s,a), before its sigmoid.

TIME        action[t] LED TO image[t] (row 0: the reset image, a zero action). The paper's pair
            (s_t, a_t) is therefore (feat[t], action[t+1]); state_action_pairs() alone makes it.

                row t       0        1        2        3
                image       x0       x1       x2       x3
                action      0        a0       a1       a2         stored: what led here
                feat        s0       s1       s2       s3
                pairs    (s0,a0)  (s1,a1)  (s2,a2)                one fewer than rows

ALGORITHM   load the demos into the replay
            repeat `pretrain` times: one step of [P1] and of behaviour cloning, on the demos
            seed rounds: run the cloned policy in the environment, no updates
            repeat: run the policy; for every environment step, `train_ratio` times:
                windows of the replay (R) and of the demos (E) -> posterior states
                                                                    see Agent.gradient_step
                world model        step on [P1], R
                imagine            from every posterior of R: H steps of policy and prior
                discriminator      step on [P8], pairs of E against imagined pairs
                critics            step on [W9]; now and then copy them to the targets
                actor              step on [W6], through dynamics, D, disagreement, critics

Departures from the paper and the released code: README.md, each with its line here.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import time
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

with contextlib.suppress(ImportError):  # without gymnasium, all but the Trainer can still be used
    import envs

# --- Configuration --------------------------------------------------------------------------------
# Every field is a flag. The defaults are the paper-size run; presets override them.

# The methods, and how their configuration differs from CMIL's. Sources: README.md, The methods.
ALGOS = {
    "cmil": {},
    "vmail": dict(members=1, alpha=0.0, beta=0.0, seed_steps=0),  # V-MAIL [V]: not conservative
    "dgail": dict(members=1, alpha=0.0, beta=0.0, offline=True),  # D-GAIL [T], on the demos alone
    "dbc": dict(reward="none", offline=True),  # D-BC [T]: CMIL's own start, trained on
    "bc": dict(reward="none", offline=True),   # class PixelBC
    "ditto": dict(members=1, beta=0.0, offline=True),  # class Ditto
    "pdac": dict(pretrain=0, target_every=1, tau=0.01),  # class PixelDAC
}


def opt(default, text, choices=None, least=None, most=2**62):
    """A config field: its default, one sentence of help, and what it may be: one of `choices`, or a
    number from `least` to `most`; without `least`, any above zero."""
    return dataclasses.field(default=default, metadata={
        "help": text, "choices": choices, "least": least, "most": most})


@dataclasses.dataclass
class Config:
    # What to run
    env: str = opt("kitchen", "kitchen, baoding, point; with --demos any Gymnasium id or module:Id")
    algo: str = opt("cmil", "the method", tuple(ALGOS))
    preset: str = opt("auto", "sizes and schedule; auto: paper on CUDA, small elsewhere",
                      ("auto", "paper", "small", "debug"))
    seed: int = opt(0, "seeds networks, sampling, environments", least=0, most=2**32 - 1)
    logdir: str = opt("", "the run's folder; empty: runs/<env>-<algo>-s<seed>")
    steps: int = opt(250_000, "environment steps in all, seed rounds included [P]")
    minutes: float = opt(0.0, "stop cleanly after so many minutes of wall time; 0: never", least=0)
    device: str = opt("auto", "where to learn; auto: CUDA if there is one", ("auto", "cpu", "cuda"))
    threads: int = opt(0, "CPU threads of the learner; 0: torch's own choice", least=0, most=4096)
    precision: str = opt("auto", "auto: bfloat16 on CUDA", ("auto", "float32", "bfloat16"))
    graph: str = opt("auto", "replay an update as a CUDA graph; auto: if it can be recorded",
                     ("auto", "on", "off"))
    # Environment and demonstrations
    tasks: str = opt("", "kitchen: tasks joined by +, such as microwave+kettle; empty: all four")
    episode_steps: int = opt(0, "episode length; 0: the environment's own", least=0)
    robot_noise_ratio: float = opt(0.01, "kitchen: noise of the robot's joints and motors", least=0)
    num_envs: int = opt(5, "environments in lockstep")
    demos: str = opt("", "file or folder of demonstrations; empty: those that ship with env")
    num_demos: int = opt(0, "use so many demonstrations; 0: all (point: 10)", least=0)
    # Logging
    log_every: int = opt(100, "updates between two lines of metrics")
    eval_every: int = opt(5_000, "environment steps between two evaluations")
    eval_episodes: int = opt(10, "episodes an evaluation")
    eval_sample: bool = opt(False, "evaluate with sampled actions and latents, not the modes")
    checkpoint_minutes: float = opt(5.0, "minutes between two checkpoints", least=0)
    # Network sizes [C]
    conv_depth: int = opt(48, "channels of the first convolution; doubles with every layer")
    stoch: int = opt(360, "S, Gaussian latent dimensions")
    deter: int = opt(400, "D, GRU state")
    hidden: int = opt(400, "hidden units inside the RSSM")
    members: int = opt(10, "K, prior heads in the ensemble")
    units: int = opt(400, "hidden units of actor and critics")
    layers: int = opt(4, "hidden layers of actor and critics")
    min_std: float = opt(0.1, "the policy's standard deviation is never less [C]", most=1)
    critics: int = opt(2, "m, critics in the ensemble")
    disc_units: int = opt(200, "hidden units of the discriminator")
    disc_layers: int = opt(2, "hidden layers of the discriminator")
    # Batches and schedule [C]
    batch: int = opt(32, "B, windows from the replay, and as many from the demos")
    length: int = opt(50, "L, steps a window", least=2)
    horizon: int = opt(15, "H, imagined steps")
    pretrain: int = opt(1000, "updates of world model and cloning on the demos alone", least=0)
    seed_steps: int = opt(5000, "environment steps of the clone before more updates", least=0)
    train_ratio: float = opt(0.4, "updates for each environment step [C: 2 every 5]", least=0)
    offline: bool = opt(False, "never act: as many updates as an online run, from the demos alone")
    # Losses
    free_nats: float = opt(1.0, "KL below this is free (mean over batch and time) [D2]", least=0)
    image_std: float = opt(1.0, "std of p(x|s) [P1]; smaller: the image weighs more [D2: 1]")
    kl_balance: float = opt(0.8, "share of the KL that trains the prior [D2]", least=0, most=1)
    reward: str = opt("logit", "[P10] logit; sigmoid as in [C]; none: cloning only, no adversary",
                      ("logit", "sigmoid", "none"))
    alpha: float = opt(10.0, "weight of the disagreement penalty [P10]", least=0)
    beta: float = opt(10.0, "weight of cloning in the actor's loss [P]; 0: none at all", least=0)
    sigma: float = opt(math.sqrt(2.5), "std of the noise on D's input [P: sigma^2 = 2.5]", least=0)
    reward_noise: bool = opt(False, "[C]: the noise also acts inside the imagined reward")
    target: str = opt("min", "critic target: min over target critics [W], or one random one [C]",
                      ("min", "random"))
    data_critic: bool = opt(True, "[W8]: the critic's loss on real transitions")
    actor_discount: bool = opt(True, "weight the actor's loss at step t by gamma^t [C]")
    critic_discount: bool = opt(True, "weight the model critic's loss by gamma^(t+1) [C]")
    gamma: float = opt(0.99, "g, discount [C]", least=0, most=1)
    lam: float = opt(0.95, "l of TD(lambda) [C]", least=0, most=1)
    entropy: float = opt(1e-4, "weight of the policy's entropy [C]", least=0)
    # Optimizers [C]
    lr: float = opt(3e-4, "Adam's learning rate")
    disc_lr: float = opt(3e-4, "the discriminator's")
    adam_eps: float = opt(1e-5, "Adam's epsilon")
    clip: float = opt(100.0, "global gradient norm of each network")
    weight_decay: float = opt(1e-6, "every step multiplies the weights by 1 minus this", least=0)
    target_every: int = opt(100, "updates between two moves of the targets to the critics")
    tau: float = opt(1.0, "how far they go: 1 copies the critics", least=0, most=1)


PRESETS = {
    "paper": {},
    "small": dict(
        steps=10_000, eval_every=1_000, eval_episodes=20, num_envs=5,
        conv_depth=8, stoch=64, deter=256, hidden=256, members=5, units=128, layers=2,
        disc_units=128, batch=8, length=16, horizon=8,
        seed_steps=1000, lr=1e-3, disc_lr=5e-4,
        # In a few thousand updates a critic learns the next ten steps well, not the next hundred.
        gamma=0.9, target_every=20),
    "debug": dict(
        steps=400, log_every=10, eval_every=200, eval_episodes=2, num_envs=2, num_demos=2,
        conv_depth=4, stoch=8, deter=16, hidden=16, members=3, units=16, layers=2, disc_units=16,
        batch=4, length=8, horizon=4, pretrain=20, seed_steps=100, train_ratio=0.1),
}

# What an environment needs beside its preset: (env, preset) -> overrides. With the paper's sigma D
# is blind to single pixels: the policy cuts corners. With a smaller image_std it sees more of them.
SIMULATED = dict(steps=40_000, eval_every=3_000, eval_episodes=10, sigma=0.5, image_std=0.3,
                 conv_depth=12)
ENV_PRESETS = {
    ("point", "small"): dict(sigma=0.5, steps=6_000),
    ("kitchen", "small"): dict(SIMULATED, batch=12, length=20,
                               episode_steps=175),  # the expert is done by ~160 and then rests
    ("baoding", "paper"): dict(length=25),  # [C]
    ("baoding", "small"): dict(SIMULATED, batch=10, length=25, steps=28_000),
}

# What --eval may change, and a resumed run; any other difference is refused.
EVAL_MAY_CHANGE = ("seed", "device", "threads", "num_envs", "eval_sample")
RESUME_MAY_CHANGE = ("steps", "minutes", "log_every", "eval_every", "eval_episodes",
                     "checkpoint_minutes", "threads", "graph", "logdir")

# --- Helpers --------------------------------------------------------------------------------------

def die(message):
    """Print one line and exit with code 2: the end of every mistake of the user's."""
    print(f"cmil: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def state_action_pairs(feat, action):
    """Rows in stored order -> the paper's pairs (s_t, a_t). The only place that does so.

    feat (T, ..., F), action (T, ..., A), where action[t] led to feat[t]
    -> s (T-1, ..., F), a (T-1, ..., A)"""
    return feat[:-1], action[1:]


def to_float(image):
    """uint8 (..., 64, 64, 3) -> float (..., 3, 64, 64) in [-.5, .5]; memory stays channels-last."""
    return image.float().div_(255).sub_(0.5).movedim(-1, -3)  # in place: it is a large array


def to_uint8(image):
    """The inverse of to_float, clipped: (..., 3, 64, 64) -> uint8 (..., 64, 64, 3)."""
    return ((image.float().movedim(-3, -1) + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)


def kept_rng(device):
    """A context after which torch's random state is what it was before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def bootstrap_ci(values, draws=10_000):
    """95% bootstrap confidence interval of the mean of a 1-D array -> (low, high)."""
    values = np.asarray(values, np.float64)
    index = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return tuple(np.percentile(values[index].mean(1), [2.5, 97.5]).tolist())


# --- Distributions --------------------------------------------------------------------------------

def kl_normal(mean_p, std_p, mean_q, std_q):
    """KL(p || q) of diagonal Gaussians, summed over the last dimension: (..., S) -> (...)."""
    ratio = std_p / std_q
    return (0.5 * (ratio**2 + ((mean_p - mean_q) / std_q) ** 2 - 1) - ratio.log()).sum(-1)


class TruncatedNormal:
    """Independent normals truncated to [-1, 1], with loc inside: the policy's distribution.

    loc, scale (..., A), float32. log_prob and entropy sum over A and are exact."""

    def __init__(self, loc, scale):
        self.loc, self.scale, self.mode = loc, scale, loc
        self.low, self.high = (-1 - loc) / scale, (1 - loc) / scale
        self.cdf_low = torch.special.ndtr(self.low)
        self.mass = torch.special.ndtr(self.high) - self.cdf_low  # what lies inside

    def rsample(self):
        """A reparameterised sample (..., A), by the inverse cdf of a uniform number."""
        p = self.cdf_low + torch.rand_like(self.loc) * self.mass
        x = self.loc + self.scale * torch.special.ndtri(p.clamp(1e-6, 1 - 1e-6))
        inside = x.clamp(-1 + 1e-6, 1 - 1e-6)
        return x + (inside - x).detach()  # clipped value, unclipped gradient (straight-through)

    def log_prob(self, x):
        """x (..., A) -> (...). Demo actions reach +-1, where the density is still positive."""
        z = (x.clamp(-1 + 1e-6, 1 - 1e-6) - self.loc) / self.scale
        log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - self.scale.log()
        return (log_density - self.mass.log()).sum(-1)

    def entropy(self):
        """(...): log(sqrt(2 pi e) scale mass) + (low phi(low) - high phi(high)) / (2 mass)."""
        def phi(x):
            return torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
        edge = (self.low * phi(self.low) - self.high * phi(self.high)) / (2 * self.mass)
        log_scale = (self.scale * self.mass).log() + 0.5 * math.log(2 * math.pi * math.e)
        return (log_scale + edge).sum(-1)


# --- Networks -------------------------------------------------------------------------------------

def initialize(module):
    """Glorot-uniform weights and zero biases, as the released code's Keras layers; in place."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module


def mlp(inputs, units, layers, outputs):
    """`layers` hidden layers of ELU units, then a linear output."""
    sizes = [inputs] + [units] * layers
    hidden = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ELU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


class EnsembleMLP(nn.Module):
    """K MLPs of one shape side by side, evaluated by one batched matrix product a layer."""

    def __init__(self, heads, inputs, units, layers, outputs):
        super().__init__()
        sizes = [inputs] + [units] * layers + [outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in zip(sizes, sizes[1:]):
            weight = torch.empty(heads, i, o)
            for head in weight:  # head by head: on the 3-D tensor xavier would get the fan wrong
                nn.init.xavier_uniform_(head)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(heads, 1, o)))

    def forward(self, x, member=None):
        """Every head on the same input:       x (N, in)                  -> (K, N, out)
        one drawn head for each time step:  x (T, N, in), member (T,)  -> (T, N, out)"""
        layers = list(zip(self.weights, self.biases))
        if member is not None:
            layers = [(weight[member], bias[member]) for weight, bias in layers]
        *hidden, (weight, bias) = layers                    # (K or T, in, out), (K or T, 1, out)
        x = x.expand(len(weight), *x.shape[-2:])
        for w, b in hidden:
            x = F.elu(torch.baddbmm(b, x, w))
        with torch.autocast(x.device.type, enabled=False):  # [P9] is a small difference of outputs
            return torch.baddbmm(bias, x.float(), weight)


class Encoder(nn.Module):
    """Image -> embedding: four convolutions, kernel 4, stride 2 (64 -> 31 -> 14 -> 6 -> 2)."""

    def __init__(self, depth, inputs=3):
        super().__init__()
        channels = [inputs, depth, 2 * depth, 4 * depth, 8 * depth]
        self.layers = nn.Sequential(*(m for i, o in zip(channels, channels[1:])
                                      for m in (nn.Conv2d(i, o, 4, 2), nn.ELU(inplace=True))))
        self.layers.to(memory_format=torch.channels_last)  # as to_float lays out the image
        self.size = 32 * depth  # E

    def forward(self, image):
        """Pixels of to_float (..., inputs, 64, 64) -> (..., E)"""
        x = self.layers(image.flatten(0, -4))
        return x.flatten(1).float().unflatten(0, image.shape[:-3])


class Decoder(nn.Module):
    """feat -> mean of p(x|s): four transposed convolutions, stride 2 (1 -> 5 -> 13 -> 30 -> 64).

    The first and the last are written as what they amount to, and a CPU does many times faster: on
    a 1x1 map, a matrix product; with kernel 6 and stride 2, a convolution with kernel 3 that makes
    2x2 blocks of pixels."""

    def __init__(self, depth, feat):
        super().__init__()
        self.input = nn.Sequential(nn.Linear(feat, 32 * depth),
                                   nn.Linear(32 * depth, 5 * 5 * 4 * depth), nn.ELU())
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4 * depth, 2 * depth, 5, 2), nn.ELU(inplace=True),
            nn.ConvTranspose2d(2 * depth, depth, 6, 2), nn.ELU(inplace=True),
            nn.Conv2d(depth, 2 * 2 * 3, 3, padding=2)).to(memory_format=torch.channels_last)

    def forward(self, feat):
        """(..., F) -> (..., 3, 64, 64)"""
        x = self.input(feat.flatten(0, -2)).unflatten(1, (5, 5, -1)).movedim(-1, 1)
        blocks = self.layers(x).float().movedim(1, -1).unflatten(-1, (2, 2, 3))
        image = blocks.transpose(2, 3).reshape(-1, 64, 64, 3)       # of (N, 32, 2, 32, 2, 3)
        return image.movedim(-1, 1).unflatten(0, feat.shape[:-1])


class Actor(nn.Module):
    """pi(a|s): a truncated normal on [-1, 1]."""

    def __init__(self, feat, action, units, layers, min_std):
        super().__init__()
        self.min_std, self.layers = min_std, mlp(feat, units, layers, 2 * action)

    def forward(self, feat):
        """(..., F) -> TruncatedNormal over (..., A)"""
        loc, scale = self.layers(feat).float().chunk(2, -1)
        return TruncatedNormal(torch.tanh(loc), 2 * torch.sigmoid(scale / 2) + self.min_std)


class Discriminator(nn.Module):
    """D(s, a): the probability that a pair is the expert's (expert is 1, policy is 0)."""

    def __init__(self, feat, action, units, layers):
        super().__init__()
        self.layers = mlp(feat + action, units, layers, 1)

    def forward(self, s, a, sigma=0.0):
        """s (..., F), a (..., A) -> logit (...); sigma: noise on the whole input."""
        x = torch.cat([s, a], -1)
        x = x + sigma * torch.randn_like(x) if sigma else x
        return self.layers(x).float().squeeze(-1)


class Critics(EnsembleMLP):
    """Q_1..Q_m(s, a)."""

    def __init__(self, count, feat, action, units, layers):
        super().__init__(count, feat + action, units, layers, 1)

    def forward(self, s, a):
        """s (..., F), a (..., A) -> (m, ...)"""
        x = torch.cat([s, a], -1)
        return super().forward(x.flatten(0, -2)).squeeze(-1).unflatten(-1, x.shape[:-1])


# --- World model: an RSSM with an ensemble of priors ----------------------------------------------

class State(NamedTuple):
    """Latent states with any leading shape. mean and std are of the distribution stoch is from."""
    stoch: torch.Tensor  # (..., S)
    deter: torch.Tensor  # (..., D)
    mean: torch.Tensor   # (..., S)
    std: torch.Tensor    # (..., S)

    @property
    def feat(self):
        return torch.cat([self.stoch, self.deter], -1)  # (..., F)

    def map(self, function):
        return State(*(function(x) for x in self))


class RSSM(nn.Module):
    """s_t = (deter_t, stoch_t): deter_t = GRU(deter_{t-1}, stoch_{t-1}, a_{t-1}), shared;
    posterior q(stoch_t | deter_t, x_t); K priors T_i(stoch_t | deter_t), one head each."""

    def __init__(self, c, action, embed):
        super().__init__()
        self.input = nn.Linear(c.stoch + action, c.hidden)
        self.gru = nn.Linear(c.hidden + c.deter, 3 * c.deter)
        self.norm = nn.LayerNorm(3 * c.deter, eps=1e-3)
        self.post_hidden = nn.Linear(c.deter + embed, c.hidden)
        self.post_output = nn.Linear(c.hidden, 2 * c.stoch)
        self.priors = EnsembleMLP(c.members, c.deter, c.hidden, 1, 2 * c.stoch)
        self.stoch, self.deter, self.members = c.stoch, c.deter, c.members

    def initial(self, batch):
        """The zero state (batch, ...), before anything is seen."""
        stoch, deter = (self.gru.weight.new_zeros(batch, n) for n in (self.stoch, self.deter))
        return State(stoch, deter, stoch, torch.ones_like(stoch))

    @staticmethod
    def mean_std(output):
        """Network output (..., 2S) -> mean (..., S), std (..., S) in (0.1, 2.1)."""
        mean, std = output.float().chunk(2, -1)
        return mean, 2 * torch.sigmoid(std / 2) + 0.1

    def step_deter(self, stoch, deter, action):
        """The shared part of every T_i: s_{t-1}, a_{t-1} -> deter_t (N, D)."""
        x = F.elu(self.input(torch.cat([stoch, action], -1)))
        gates = self.norm(self.gru(torch.cat([x, deter.to(x.dtype)], -1)).float())
        reset, cand, update = gates.chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)  # biased to remember
        return update * cand + (1 - update) * deter

    def post_first(self, embed):
        """The posterior's first layer in two parts: what needs no recurrence, (..., E) ->
        (..., hidden), and the weight (hidden, D) for deter, cut out once and not at every step."""
        for_deter, for_embed = self.post_hidden.weight.split([self.deter, embed.shape[-1]], 1)
        return F.linear(embed, for_embed, self.post_hidden.bias), for_deter

    def step_post(self, state, action, embed, weight, noise):
        """One filtering step q(s_t | x_t, s_{t-1}, a_{t-1}).

        state: s_{t-1} (B, ...); action (B, A): a_{t-1}; embed (B, hidden), weight (hidden, D):
        post_first() of x_t; noise (B, S): standard normal, or zeros for the mean -> s_t"""
        deter = self.step_deter(state.stoch, state.deter, action)
        x = F.elu(embed + F.linear(deter, weight))
        mean, std = self.mean_std(self.post_output(x))
        return State(mean + std * noise, deter, mean, std)

    def observe(self, embed, action):
        """Posterior states along windows: embed (L, B, E), action (L, B, A) -> State (L, B, ...).

        A window may begin in mid-episode, where neither s_{-1} nor what led to it is known: the
        scan begins with a zero state and a zero action. Priors do not feed it; see drawn_prior."""
        length, batch = action.shape[:2]
        action = torch.cat([torch.zeros_like(action[:1]), action[1:]])
        embed, weight = self.post_first(embed)                              # (L, B, hidden)
        noise = torch.randn(length, batch, self.stoch, device=action.device)
        states = [self.initial(batch)]
        for t in range(length):
            states.append(self.step_post(states[-1], action[t], embed[t], weight, noise[t]))
        return State(*(torch.stack(x) for x in zip(*states[1:])))

    def drawn_prior(self, deter):
        """T_i with i drawn anew at every time step, shared by the batch [P1].

        deter (L, B, D) -> mean, std (L, B, S). All steps at once: the prior is not in the scan."""
        member = torch.randint(self.members, deter.shape[:1], device=deter.device)
        return self.mean_std(self.priors(deter, member))

    def step_prior(self, state, action):
        """One imagined step: s_t (N, ...), a_t (N, A) -> s_{t+1} of a drawn head, u (N,)"""
        deter = self.step_deter(state.stoch, state.deter, action)
        means, stds = self.mean_std(self.priors(deter))                     # (K, N, S)
        member = torch.randint(self.members, (1,), device=deter.device)
        mean, std = means[member].squeeze(0), stds[member].squeeze(0)
        return State(mean + std * torch.randn_like(std), deter, mean, std), disagreement(means)


def disagreement(means):
    """[P9] how far the members' means lie apart: (K, N, S) -> (N,).

    The population std (ddof 0) over the K members, then the mean over the latent dimensions. With
    one member there is none, and the std's gradient at zero would be undefined."""
    if means.shape[0] == 1:
        return torch.zeros_like(means[0, :, 0])
    variance = (means - means.mean(0)).square().mean(0)                     # (N, S)
    return variance.clamp(min=1e-12).sqrt().mean(-1)  # the clamp: sqrt has no gradient at zero


class WorldModel(nn.Module):
    def __init__(self, c, action):
        super().__init__()
        self.encoder = Encoder(c.conv_depth)
        self.rssm = RSSM(c, action, self.encoder.size)
        self.decoder = Decoder(c.conv_depth, c.stoch + c.deter)


def world_model_loss(world, image, post, c):
    """[P1]: image (L, B, 3, 64, 64), pixels of to_float; post State (L, B, ...) -> loss, info.

    row t        0         1         2
    post      q(s0|x0)  q(s1|x1)  q(s2|x2)      every row reconstructs its image
    prior      T_i(s0)   T_j(s1)   T_k(s2)      heads i, j, k drawn anew; deter_t knows a_{t-1}"""
    error = torch.linalg.vector_norm(world.decoder(post.feat) - image, dim=(-3, -2, -1))  # (L, B)
    recon = 0.5 * error.square().mean()  # -log p(x|s) of unit variance, without its constant
    mean, std = world.rssm.drawn_prior(post.deter)
    to_post = kl_normal(post.mean, post.std, mean.detach(), std.detach()).mean()
    to_prior = kl_normal(post.mean.detach(), post.std.detach(), mean, std).mean()
    kl = ((1 - c.kl_balance) * to_post.clamp(min=c.free_nats)
          + c.kl_balance * to_prior.clamp(min=c.free_nats))
    return recon / c.image_std**2 + kl, {"recon": recon, "kl": to_prior}


# --- Imagination, discriminator, reward -----------------------------------------------------------

class Dream(NamedTuple):
    """Imagined rollouts in stored order: action[t] led to feat[t]; the same helper pairs them."""
    feat: torch.Tensor          # (H+1, N, F)  s_0..s_H; s_0 is a real, replayed state
    action: torch.Tensor        # (H+1, N, A)  the stored action that led to s_0, a_0..a_{H-1}
    last_action: torch.Tensor   # (N, A)       a_H, only for its value
    disagreement: torch.Tensor  # (H, N)       u(s_t, a_t): the spread of the priors of s_{t+1}
    entropy: torch.Tensor       # (H, N)       of pi(.|s_t)


def imagine(rssm, actor, start, led_here, horizon):
    """Roll the policy out in the model from `start`, a State (N, ...); led_here (N, A) -> Dream.

    Gradients reach the actor through its actions and what the model makes of them, but not through
    the policy's own input: a_t ~ pi(.| stop_grad(s_t))."""
    state, feats, actions, spreads, entropies = start, [start.feat], [led_here], [], []
    for _ in range(horizon):
        policy = actor(state.feat.detach())
        action = policy.rsample()
        state, spread = rssm.step_prior(state, action)
        feats.append(state.feat), actions.append(action)
        spreads.append(spread), entropies.append(policy.entropy())
    last_action = actor(state.feat.detach()).rsample()
    return Dream(torch.stack(feats), torch.stack(actions), last_action,
                 torch.stack(spreads), torch.stack(entropies))


def discriminator_loss(disc, expert, policy, sigma):
    """[P8] with expert = 1, policy = 0; the same noise acts on both.

    expert, policy: pairs (s (..., F), a (..., A)) -> loss, info. Inputs carry no gradient."""
    on_expert, on_policy = disc(*expert, sigma), disc(*policy, sigma)
    loss = F.softplus(-on_expert).mean() + F.softplus(on_policy).mean()  # -log D, -log(1 - D)
    with torch.no_grad():
        logits = disc(*expert), disc(*policy)
        d_expert, d_policy = (torch.sigmoid(logit).mean() for logit in logits)
    return loss, {"disc/loss": loss, "disc/expert": d_expert, "disc/policy": d_policy,
                  "disc/gap": d_expert - d_policy, "disc/logit_expert": logits[0].mean(),
                  "disc/logit_policy": logits[1].mean()}


def imitation_reward(disc, s, a, c, sigma=0.0):
    """The discriminator's part of [P10]: log D - log(1-D), which is the logit -> (...)."""
    logit = disc(s, a, sigma)
    return logit if c.reward == "logit" else torch.sigmoid(logit)


def conservative_reward(disc, dream, c):
    """[P10] r_t = log D(s_t,a_t) - log(1-D(s_t,a_t)) - alpha u(s_t,a_t) -> (H, N), smooth."""
    s, a = state_action_pairs(dream.feat, dream.action)
    sigma = c.sigma if c.reward_noise else 0.0
    return imitation_reward(disc, s, a, c, sigma) - c.alpha * dream.disagreement


# --- TD(lambda), critics, actor -------------------------------------------------------------------
#
# row t            0      1      2      3      4      H = 4; brackets: enters the losses
# state  feat     s0 ->  s1 ->  s2 ->  s3 ->  s4      (H+1, N, F)  s0: a replayed posterior
# action             a0     a1     a2     a3     a4   a_t ~ pi(.|stop_grad(s_t)); a4 for v4 only
# reward            [r0]   [r1]   [r2]   [r3]         (H, N)    r_t = r(s_t, a_t)
# V_0 = min_i Q_i   [v0]   [v1]   [v2]   [v3]    v4   (H+1, N)  v4 only bootstraps
# V   [W5]          [V0]   [V1]   [V2]   [V3]         (H, N)    r_t + g((1-l) v_{t+1} + l V_{t+1})


def lambda_return(reward, value, gamma, lam):
    """[W5] by its recursion, V_H := v_H: reward (H, N), value (H+1, N) = V_0(s_t) -> V (H, N)."""
    returns, last = [], value[-1]
    for t in reversed(range(len(reward))):
        last = reward[t] + gamma * ((1 - lam) * value[t + 1] + lam * last)
        returns.append(last)
    return torch.stack(returns[::-1])


def state_values(critics, dream, rule="min"):
    """V_0(s_t), t = 0..H -> (H+1, N): the least of the critics [W], or a randomly drawn one [C]."""
    a = torch.cat([state_action_pairs(dream.feat, dream.action)[1], dream.last_action[None]])
    q = critics(dream.feat, a)                                              # (m, H+1, N)
    if rule == "random":
        return q[torch.randint(len(q), (1,), device=q.device)].squeeze(0)
    return q.min(0).values


def actor_loss(critics, dream, reward, c):
    """[W6] without its BC term, with the policy's entropy e; reward (H, N) of [P10]:

    -mean_{t<H} g^t [ l V(s_t) + (1-l) V_0(s_t) + c.entropy e_t ]"""
    value = state_values(critics, dream)                                    # (H+1, N)
    returns = lambda_return(reward, value, c.gamma, c.lam)                  # (H, N)
    objective = c.lam * returns + (1 - c.lam) * value[:-1] + c.entropy * dream.entropy
    weight = discounts(c.gamma, returns) if c.actor_discount else 1.0
    return -(weight * objective).mean(), {
        "reward": reward.mean(), "reward_std": reward.std(), "lambda_return": returns.mean(),
        "entropy": dream.entropy.mean(), "uncertainty": dream.disagreement.mean()}


def discounts(gamma, like):
    """g^0, g^1, ... along the first dimension of `like` (H, N) -> (H, 1)."""
    return (gamma ** torch.arange(len(like), device=like.device, dtype=like.dtype))[:, None]


def clone_loss(actor, feat, action):
    """BC: -log pi(a_t|s_t) on the expert's pairs. feat (L, B, F), action (L, B, A) -> loss."""
    s, a = state_action_pairs(feat, action)
    return -actor(s.detach()).log_prob(a).mean()


def target_values(target_critics, dream, reward, c):
    """Vbar_0 (H+1, N), Vbar (H, N) [W5] of a dream with these rewards (H, N), by the targets."""
    with torch.no_grad():
        value = state_values(target_critics, dream, c.target)
        return value, lambda_return(reward, value, c.gamma, c.lam)


def data_target(disc, value, returns, feat, action, c):
    """y_j of [W8] -> (L-1, B). feat (L, B, F), action (L, B, A): replayed; value, returns (L B,):
    Vbar_0 and Vbar at the start of the rollout from each of their rows.

    row j           0        1        2
    pair         (s0,a0)  (s1,a1)               a_j: the action really taken; r_j without penalty
    rollouts               from s1  from s2     imagination from s_{j+1} gives Vbar_0, Vbar there"""
    with torch.no_grad():
        value, returns = (x.view(action.shape[:2])[1:] for x in (value, returns))       # (L-1, B)
        reward = imitation_reward(disc, *state_action_pairs(feat, action), c)
        return reward + c.gamma * ((1 - c.lam) * value + c.lam * returns)


def model_critic_loss(critics, target, dream, c):
    """[W7] on imagined states, summed over the m critics; target (H, N): Vbar -> loss, info."""
    s, a = state_action_pairs(dream.feat.detach(), dream.action.detach())
    weight = c.gamma * discounts(c.gamma, target) if c.critic_discount else 1.0  # g^{t+1}
    loss = (weight * (critics(s, a) - target).square()).mean((1, 2)).sum()  # of (m, H, N)
    return loss, {"critic/model": loss, "critic/value": target.mean()}


def data_critic_loss(critics, target, feat, action):
    """[W8] on real pairs, summed over the m critics; target (L-1, B): y_j -> loss, info."""
    s, a = state_action_pairs(feat, action)
    loss = (critics(s, a) - target).square().mean((1, 2)).sum()             # of (m, L-1, B)
    return loss, {"critic/data": loss}


# --- Optimizers, recorded steps, and what every method has ----------------------------------------

class Optimizer:
    """AdamW for one network, gradients clipped; a non-finite gradient changes nothing."""

    def __init__(self, module, lr, c):
        self.params = list(module.parameters())
        self.clip, self.capturable = c.clip, self.params[0].is_cuda and c.graph != "off"
        # AdamW multiplies weights by 1 - lr * weight_decay; the method wants 1 - c.weight_decay.
        self.adam = torch.optim.AdamW(self.params, lr, eps=c.adam_eps, capturable=self.capturable,
                                      fused=True, weight_decay=c.weight_decay / lr)
        self.skipped = torch.zeros((), device=self.params[0].device)      # in all
        self.skipped_now = torch.zeros_like(self.skipped)                 # in a row

    def step(self, grads):
        """One update; -> the norm before clipping. No host synchronisation."""
        for param, grad in zip(self.params, grads):
            # The fused kernel walks memory: a gradient of another layout would hit other weights.
            param.grad = torch.empty_like(param).copy_(grad)
        norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        bad = (~torch.isfinite(norm)).float()
        # With found_inf the fused kernel skips weights, moments, decay and step count together.
        self.adam.grad_scale, self.adam.found_inf = None, bad
        self.adam.step()
        self.adam.zero_grad()
        self.skipped += bad
        self.skipped_now.copy_((self.skipped_now + 1) * bad)
        return norm


class Graphed:
    """step(replay), on CUDA recorded as a graph and then replayed: one launch, not thousands.

    The first calls run as they are. They are real steps, and make what must exist before recording
    (Adam's moments, libraries' workspaces). Recording itself computes nothing. A replayed step
    reads and writes the same memory every time, random numbers move on, and what it returns is
    overwritten by the next. mode: on, off, or auto: one line and no graph where recording fails."""
    WARM_UP = 3
    failed = False  # once recording has failed, nothing in this process tries again

    def __init__(self, step, device, mode):
        self.step, self.mode, self.calls, self.graph = step, mode, 0, None
        self.wanted = device.type == "cuda" and mode != "off"
        self.stream = torch.cuda.Stream(device) if self.wanted else None

    def __call__(self, replay):
        self.wanted = self.wanted and not Graphed.failed
        if self.wanted and self.calls == self.WARM_UP:
            self.record(replay)
        self.calls += 1
        if self.graph:
            assert replay is self.replay  # its memory is part of the recording
            self.graph.replay()
            return self.info
        if not self.wanted:
            return self.step(replay)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            info = self.step(replay)
        torch.cuda.current_stream().wait_stream(self.stream)
        return info

    def record(self, replay):
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.info = self.step(replay)
            self.graph, self.replay = graph, replay
        except RuntimeError as error:
            cause = str(error.__context__ or error).splitlines()[0]  # that of leaving it says less
            reason = f"an update cannot be recorded as a CUDA graph ({cause})"
            if self.mode == "on":
                die(f"--graph on: {reason}; use --graph auto or off")
            print(f"cmil: {reason}; going on without", file=sys.stderr)
            self.wanted, Graphed.failed = False, True
            # The recording may have left its stream current, and (older torch) a generator caught.
            torch.cuda.set_stream(current)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())


class Learner:
    """What every method has: networks with an optimizer each, a count of updates, a state to save;
    and `targets`, which follow one of the networks or a part of it, `followed`."""
    clone_step = gradient_step = None  # a method has one or both: (replay) -> info

    def __init__(self, c, device, followed=None, **networks):
        self.c, self.device, self.updates, self.networks = c, device, 0, networks
        for name, network in networks.items():
            setattr(self, name, initialize(network).to(device))
        self.modules = dict(networks)  # all that is saved
        if followed:
            self.targets, self.followed = copy.deepcopy(followed).requires_grad_(False), followed
            self.modules["targets"] = self.targets
        self.opts = {name: Optimizer(network, c.disc_lr if name == "disc" else c.lr, c)
                     for name, network in networks.items()}
        self.clone_only = c.reward == "none"  # its updates are clone_steps, not only its start's
        self.graphed = None  # the step that is being repeated

    def autocast(self):
        """bfloat16 for convolutions and MLPs; what follows them is cast back to float32."""
        where = ("bfloat16", "auto") if self.device.type == "cuda" else ("bfloat16",)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.c.precision in where)

    def update(self, replay, clone=False):
        """One gradient_step or clone_step, as a graph on CUDA; on schedule move the targets too."""
        step = self.clone_step if clone else self.gradient_step
        if self.graphed is None or self.graphed.step != step:  # the last one's graph is let go
            self.graphed = Graphed(step, self.device, self.c.graph)
        info = self.graphed(replay)
        self.updates += 1
        if "targets" in self.modules and self.updates % self.c.target_every == 0:
            for target, source in zip(self.targets.parameters(), self.followed.parameters()):
                target.data.lerp_(source.data, self.c.tau)
        return info

    def apply(self, losses, info):
        """Take all gradients, each network's of its own loss alone; then all steps."""
        grads = {name: torch.autograd.grad(loss, self.opts[name].params)
                 for name, loss in losses.items()}
        for name, grad in grads.items():
            info[f"grad/{name}"] = self.opts[name].step(grad)
        return {name: value.detach() for name, value in info.items()}

    def report(self, replay):
        """What a log line says beside the update's own info."""
        return {"skipped": sum(o.skipped for o in self.opts.values())}

    def state_dict(self):
        """A deep copy of all that an update changes: tensors and plain values only."""
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        opts = {n: {"adam": o.adam.state_dict(), "skipped": o.skipped, "skipped_now": o.skipped_now}
                for n, o in self.opts.items()}
        state = {"modules": modules, "opts": opts, "updates": self.updates,
                 "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return copy.deepcopy(state)

    def load_state_dict(self, state):
        for name, weights in state["modules"].items():
            self.modules[name].load_state_dict(weights)
        for name, saved in state["opts"].items():
            self.opts[name].adam.load_state_dict(saved["adam"])
            for group in self.opts[name].adam.param_groups:  # it may come from another device
                group["capturable"] = self.opts[name].capturable
            self.opts[name].skipped.copy_(saved["skipped"])
            self.opts[name].skipped_now.copy_(saved["skipped_now"])
        self.updates = state["updates"]
        torch.set_rng_state(state["rng"])
        if "rng_cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        self.graphed = None  # it would go on with the tensors of before


# --- The agent: acting, and the gradient step -----------------------------------------------------
#
# loss            updates         gradient flows through, not into      cut
# world model     world model     -                                     -
# discriminator   discriminator   -                                     its inputs
# actor           actor           dynamics, disagreement, D, critics    the policy's own input
# BC              actor           -                                     the expert's states
# critics         critics         -                                     states, actions, targets


class Agent(Learner):
    """CMIL: everything that learns. c: Config; action: A; device: torch.device."""

    def __init__(self, c, action, device):
        sizes, self.action_size = (c.stoch + c.deter, action, c.units, c.layers), action
        critics = Critics(c.critics, *sizes)
        super().__init__(c, device, critics, world=WorldModel(c, action),
                         actor=Actor(*sizes, c.min_std), critics=critics,
                         disc=Discriminator(*sizes[:2], c.disc_units, c.disc_layers))

    @torch.no_grad()
    def act(self, image, carry=None, sample=True):
        """Filter a frame (N, 64, 64, 3) uint8 and act -> action (N, A) float32, carry for the next
        call. carry is None at an episode's start."""
        image, N = torch.as_tensor(image, device=self.device), len(image)
        rssm, actor = self.world.rssm, self.actor
        with self.autocast():
            if carry is None:
                carry = rssm.initial(N), torch.zeros(N, self.action_size, device=self.device)
            embed, weight = rssm.post_first(self.world.encoder(to_float(image)))
            noise = torch.randn_like(carry[0].stoch) * float(sample)
            state = rssm.step_post(*carry, embed, weight, noise)
            policy = actor(state.feat)
            action = policy.rsample() if sample else policy.mode
        return action.cpu().numpy(), (state, action)

    def clone_step(self, replay):
        """The start: one step of the world model and of behaviour cloning on its latents."""
        c = self.c
        image, action = replay.sample_demos(c.batch)                        # (L, B, ...)
        image = to_float(image)
        with self.autocast():
            post = self.world.rssm.observe(self.world.encoder(image), action)
            world_loss, info = world_model_loss(self.world, image, post, c)             # [P1]
            bc_loss = clone_loss(self.actor, post.feat.detach(), action)
        # Without beta (vmail, dgail, ditto) there is no cloning at all.
        losses = {"world": world_loss, "actor": bc_loss} if c.beta else {"world": world_loss}
        return self.apply(losses, {**info, "bc": bc_loss})

    def gradient_step(self, replay):
        """One gradient step of everything: the body of the ALGORITHM above -> info (0-d tensors).

        Static shapes, no host synchronisation, no branch on a tensor's value. All gradients are
        taken at the parameters as they are now; then all optimizers step."""
        c, world, B = self.c, self.world, self.c.batch
        image, action = replay.sample(B)                                    # (L, B, ...)
        expert_image, expert_action = replay.sample_demos(B)                # (L, B, ...)
        image, expert_image = to_float(image), to_float(expert_image)       # (L, B, 3, 64, 64)
        with self.autocast():
            # World model: one scan over both batches; only the replay's trains it.
            embed = world.encoder(image)
            with torch.no_grad():
                expert_embed = world.encoder(expert_image)
            post = world.rssm.observe(torch.cat([embed, expert_embed], 1),
                                      torch.cat([action, expert_action], 1))  # State (L, 2B, ...)
            replay_post = post.map(lambda x: x[:, :B])
            world_loss, info = world_model_loss(world, image, replay_post, c)           # [P1]

            # Data from here on: the model's states without its graph.
            feat, expert_feat = post.feat.detach()[:, :B], post.feat.detach()[:, B:]

            # Imagine H steps from every replayed posterior: N = L B rollouts.
            start = replay_post.map(lambda x: x.detach().flatten(0, 1))
            dream = imagine(world.rssm, self.actor, start, action.flatten(0, 1), c.horizon)

            # Discriminator: the expert's pairs against imagined pairs.
            expert = state_action_pairs(expert_feat, expert_action)
            policy = state_action_pairs(dream.feat.detach(), dream.action.detach())
            disc_loss, disc_info = discriminator_loss(self.disc, expert, policy, c.sigma)   # [P8]

            # The reward of every imagined pair: D's logit, minus the ensemble's disagreement.
            reward = conservative_reward(self.disc, dream, c)                       # (H, N) [P10]

            # Critics [W9]: imagined and real pairs, each towards TD(lambda) of the target critics.
            value, returns = target_values(self.targets, dream, reward, c)
            q_loss, q_info = model_critic_loss(self.critics, returns, dream, c)         # [W7]
            if c.data_critic:                                                           # [W8]
                target = data_target(self.disc, value[0], returns[0], feat, action, c)
                data_loss, data_info = data_critic_loss(self.critics, target, feat, action)
                q_loss, q_info = q_loss + data_loss, {**q_info, **data_info}

            # Actor: up the returns, through the model; and stay near the demonstrations.
            pi_loss, pi_info = actor_loss(self.critics, dream, reward, c)               # [W6]
            bc_loss = clone_loss(self.actor, expert_feat, expert_action)
        losses = {"world": world_loss, "disc": disc_loss, "critics": q_loss,
                  "actor": pi_loss + c.beta * bc_loss}
        return self.apply(losses, {**info, **disc_info, **q_info, **pi_info, "bc": bc_loss})

    @torch.no_grad()
    def open_loop(self, image, action):
        """Watch five frames, then predict with the stored actions alone.

        image (L, B, 64, 64, 3) uint8, action (L, B, A) -> reconstruction and prediction
        (L, B, 64, 64, 3) uint8, disagreement along the predicted steps (L - 5, B)"""
        rssm, context = self.world.rssm, min(5, len(image) - 1)
        post = rssm.observe(self.world.encoder(to_float(image[:context])), action[:context])
        state, feats, spreads = post.map(lambda x: x[-1]), [], []
        for a in action[context:]:
            state, spread = rssm.step_prior(state, a)
            feats.append(state.feat), spreads.append(spread)
        feat = torch.cat([post.feat, torch.stack(feats)])
        return to_uint8(self.world.decoder(feat)), torch.stack(spreads)

    def report(self, replay):
        """For a log line: [P9] along the expert's actions, after five frames ([C]: after any)."""
        with self.autocast():
            _, spread = self.open_loop(*replay.sample_demos(self.c.batch))
        return {**super().report(replay), "uncertainty_expert": spread.mean()}


# --- The other methods: what is more than a row of ALGOS ------------------------------------------

class Ditto(Agent):
    """ditto: no discriminator; imagined states should be the expert's of the same step [T].

    row t        0       1       2       3        H = 3 steps from rows 0 ... L-H-1 of a window
    expert   z0 = s0     z1      z2      z3       posterior deter: what [T]'s code compares
    dream        s0 ->   s1 ->   s2 ->   s3       the policy, in the model
    reward      [r0]    [r1]    [r2]              r_t = match(s_{t+1}, z_{t+1})

    Departures from [T]: after the start, world model and policy learn side by side; the actor's
    gradient goes through the dynamics; networks, rates, gamma and H are CMIL's; D stays idle."""

    def gradient_step(self, replay):
        c, world, H = self.c, self.world, self.c.horizon
        image, action = replay.sample_demos(c.batch)                        # (L, B, ...)
        image, starts = to_float(image), len(action) - H
        with self.autocast():
            post = world.rssm.observe(world.encoder(image), action)
            world_loss, info = world_model_loss(world, image, post, c)                  # [P1]
            post = post.map(lambda x: x.detach())
            expert = torch.stack([post.deter[t:t + starts].flatten(0, 1) for t in range(1, H + 1)])
            start = post.map(lambda x: x[:starts].flatten(0, 1))            # N = (L-H) B
            dream = imagine(world.rssm, self.actor, start, action[:starts].flatten(0, 1), H)
            reward = match(dream.feat[1:, :, c.stoch:], expert)             # (H, N)
            _, returns = target_values(self.targets, dream, reward, c)
            q_loss, q_info = model_critic_loss(self.critics, returns, dream, c)         # [W7]
            pi_loss, pi_info = actor_loss(self.critics, dream, reward, c)               # [W6]
        losses = {"world": world_loss, "critics": q_loss, "actor": pi_loss}
        return self.apply(losses, {**info, **q_info, **pi_info})


def match(x, y):
    """[T] eq. 8: <x, y> / max(|x|, |y|)^2; 1 where x = y: (..., D) twice -> (...)"""
    largest = torch.maximum(x.square().sum(-1), y.square().sum(-1)).clamp(min=1e-12)
    return (x * y).sum(-1) / largest


class PixelAgent(Learner):
    """bc, pdac: no model; self.policy, of the last FRAMES frames (N, 3 FRAMES, 64, 64)."""

    @torch.no_grad()
    def act(self, image, carry=None, sample=True):
        """As Agent.act; carry: the last frames, at an episode's start all the first."""
        frame = to_float(torch.as_tensor(image, device=self.device))        # (N, 3, 64, 64)
        past = frame.repeat(1, self.FRAMES, 1, 1) if carry is None else carry
        frames = torch.cat([past[:, 3:], frame], 1)
        with self.autocast():
            policy = self.policy(frames)
        return (policy.rsample() if sample else policy.mode).cpu().numpy(), frames


class PixelBC(PixelAgent):
    """bc: pi(a_t|x_t), end to end, by maximum likelihood on the demonstrations; "BC" of [P], which
    prints no more about it. Networks and rates are CMIL's."""
    FRAMES = 1

    def __init__(self, c, action, device):
        encoder = Encoder(c.conv_depth)
        super().__init__(c, device, policy=nn.Sequential(
            encoder, Actor(encoder.size, action, c.units, c.layers, c.min_std)))

    def clone_step(self, replay):
        image, action = replay.sample_demos(self.c.batch)                   # (L, B, ...)
        with self.autocast():
            x, a = state_action_pairs(to_float(image), action)
            loss = -self.policy(x).log_prob(a).mean()
        return self.apply({"policy": loss}, {"bc": loss})


class PixelDAC(PixelAgent):
    """pdac: discriminator-actor-critic from pixels without a model, the baseline of [P].

    From DAC [A]: D's logit as reward, gradient penalty 10. From DrQ-v2 [Q]: shifts of 4 pixels,
    stacks, 3-step returns, an embedding of 50, targets of the heads that follow at a rate of .01.

    row t        0    1    2    3    4    5       n = 3
    stacks     [x0   x1   x2]  and  [x3 x4 x5]    embed e2 and e5: a stack stands at its last row
    rewards                r2   r3   r4           r_t = D's logit of (e_t, a_t)
    target     y2 = r2 + g r3 + g^2 r4 + g^3 min_i Qbar_i(e5, a'),  a' ~ pi(.|e5)

    Departures: D and actor see the critics' embedding ([Q]: a trunk each); policy (a learned spread
    and an entropy bonus; [Q]: a schedule), convolutions, layers and rates are CMIL's; episodes have
    a fixed length, hence no absorbing states; a batch is all of B windows; an episode's first two
    rows act on repeated frames, which training does not show."""
    FRAMES, STEPS, PENALTY, EMBED = 3, 3, 10.0, 50

    def __init__(self, c, action, device):
        layers = Encoder(c.conv_depth, 3 * self.FRAMES)
        encoder = nn.Sequential(layers, nn.Linear(layers.size, self.EMBED),
                                nn.LayerNorm(self.EMBED), nn.Tanh())        # [Q]'s trunk
        sizes = self.EMBED, action, c.units, c.layers
        heads = Critics(c.critics, *sizes)
        super().__init__(
            c, device, heads, critics=nn.ModuleDict({"encoder": encoder, "heads": heads}),
            actor=Actor(*sizes, c.min_std),
            disc=Discriminator(self.EMBED, action, c.disc_units, c.disc_layers))

    def policy(self, frames):  # what act() wants: there is no network of its own
        return self.actor(self.critics.encoder(frames))

    def embed(self, image, action):
        """Windows of the replay -> embed (L-2, B, 50) of shifted stacks; action (L-2, B, A)."""
        image, rows = to_float(image), len(image) - self.FRAMES + 1
        stacks = torch.cat([image[i:i + rows] for i in range(self.FRAMES)], 2)  # (L-2, B, 9, ...)
        shifted = random_shift(stacks.flatten(0, 1)).unflatten(0, stacks.shape[:2])
        return self.critics.encoder(shifted), action[self.FRAMES - 1:]

    def gradient_step(self, replay):
        c = self.c
        with self.autocast():
            embed, action = self.embed(*replay.sample_played(c.batch))
            with torch.no_grad():
                expert = state_action_pairs(*self.embed(*replay.sample_demos(c.batch)))
            e = embed.detach()
            policy = state_action_pairs(e, action)                          # (L-3, B, ...)
            disc_loss, info = discriminator_loss(self.disc, expert, policy, 0.0)        # [P8]
            disc_loss = disc_loss + self.PENALTY * gradient_penalty(self.disc, expert, policy)

            pi = self.actor(e)
            with torch.no_grad():
                reward = imitation_reward(self.disc, *policy, c)            # (L-3, B)
                value = self.targets(e, pi.rsample()).min(0).values         # (L-2, B)
                target = n_step_target(reward, value, c.gamma, self.STEPS)  # (L-2-n, B)
            s, a = (x[:len(target)] for x in state_action_pairs(embed, action))
            q_loss = (self.critics.heads(s, a) - target).square().mean((1, 2)).sum()

            q = self.critics.heads(e, pi.rsample()).min(0).values           # (L-2, B)
            pi_loss = -(q + c.entropy * pi.entropy()).mean()
        return self.apply({"critics": q_loss, "actor": pi_loss, "disc": disc_loss}, {
            **info, "reward": reward.mean(), "critic/data": q_loss, "critic/value": target.mean(),
            "entropy": pi.entropy().mean()})


def n_step_target(reward, value, gamma, n):
    """y_t = sum_{k<n} g^k r_{t+k} + g^n v_{t+n}: reward (T-1, B), value (T, B) -> (T-n, B)"""
    return gamma**n * value[n:] + sum(gamma**k * reward[k:k + len(value) - n] for k in range(n))


def gradient_penalty(disc, expert, policy):
    """mean (|d logit / d (s, a)| - 1)^2 on random mixtures of expert and policy pairs."""
    expert, policy = (torch.cat(pair, -1) for pair in (expert, policy))
    mix = torch.lerp(policy, expert, torch.rand_like(expert[..., :1])).requires_grad_()
    grad, = torch.autograd.grad(disc.layers(mix).float().sum(), mix, create_graph=True)
    return (grad.norm(dim=-1) - 1).square().mean()


def random_shift(x, pad=4):
    """x (N, C, 64, 64): each moved by up to `pad` pixels both ways, its edges repeated."""
    N, size = len(x), x.shape[-1]
    offset = torch.randint(-pad, pad + 1, (2, N, 1), device=x.device)
    rows, columns = (offset + torch.arange(size, device=x.device)).clamp(0, size - 1)   # (N, 64)
    index = torch.arange(N, device=x.device)[:, None, None], rows[:, :, None], columns[:, None]
    return x.movedim(1, -1)[index].movedim(-1, 1)


AGENTS = {"bc": PixelBC, "ditto": Ditto, "pdac": PixelDAC}  # the other methods are Agents


# --- Replay ---------------------------------------------------------------------------------------

class Replay:
    """All episodes, demos first, in two preallocated tensors on the learner's device.

    Rows are in stored order (action[t] led to image[t]). `start_rows` has the rows at which a
    window of `length` rows within one episode begins; how many is a tensor, filled in place, so
    that sampling needs no host synchronisation and fits a CUDA graph. Memory is taken at once."""

    def __init__(self, capacity, length, action, device):
        self.length, self.rows, self.windows = length, 0, 0
        self.image = torch.full((capacity, 64, 64, 3), 0, dtype=torch.uint8, device=device)
        self.action = torch.empty(capacity, action, device=device)
        self.start_rows = torch.empty(capacity, dtype=torch.long, device=device)
        self.n_starts = torch.zeros((), dtype=torch.long, device=device)
        self.n_demo_starts = torch.zeros_like(self.n_starts)
        self.offset = torch.arange(length, device=device)[:, None]          # (L, 1)

    def add(self, image, action, demo=False):
        """One episode: image uint8 (T+1, 64, 64, 3), action (T+1, A). Demos must come first."""
        rows, new = slice(self.rows, self.rows + len(image)), len(image) - self.length + 1
        self.image[rows] = torch.as_tensor(image, device=self.image.device)
        self.action[rows] = torch.as_tensor(action, device=self.image.device)
        self.start_rows[self.windows:self.windows + new] = torch.arange(
            self.rows, self.rows + new, device=self.image.device)
        self.rows, self.windows = rows.stop, self.windows + new
        self.n_starts.fill_(self.windows)
        if demo:
            self.n_demo_starts.fill_(self.windows)

    def draw(self, first, end, batch):
        """`batch` windows whose starts are between the numbers `first` and `end` (0-d tensors)."""
        u = torch.rand(batch, device=self.start_rows.device)
        index = torch.minimum(first + (u * (end - first)).long(), end - 1)  # if rounded up to end
        rows = self.start_rows[index] + self.offset                         # (L, batch)
        return self.image[rows], self.action[rows]

    def sample_demos(self, batch):
        """Windows of the demos -> image uint8 (L, batch, 64, 64, 3), action (L, batch, A)."""
        return self.draw(0, self.n_demo_starts, batch)

    def sample_played(self, batch):
        """Windows of what the policy has played -> the same shapes."""
        return self.draw(self.n_demo_starts, self.n_starts, batch)

    def sample(self, batch):
        """Windows of everything, demos included -> the same shapes."""
        return self.draw(0, self.n_starts, batch)


# --- Evaluation -----------------------------------------------------------------------------------

# Streams of environment seeds that never meet: training, evaluation while training, --eval.
TRAIN, EVALUATE, FINAL = 1, 2, 3


def env_seeds(seed, stream, number, count):
    """The reset seeds of `count` environments in round (or batch) `number` -> list of ints."""
    return (np.random.SeedSequence([seed, stream, number]).generate_state(count) >> 1).tolist()


def env_options(c):
    """What of the config the environment is made from; None: the environment's own."""
    untouched = c.robot_noise_ratio == Config.robot_noise_ratio  # else: refused where there is none
    noise = None if c.env != "kitchen" and untouched else c.robot_noise_ratio
    return {"tasks": c.tasks or None, "episode_steps": c.episode_steps or None,
            "robot_noise_ratio": noise}


def rollouts(agent, vec, steps, episodes, seed, stream, sample, breathe=lambda: None):
    """Run `episodes` episodes of `steps` steps, as many at a time as `vec` has environments
    -> dict of success, tasks, return (arrays of length `episodes`; others where info has them), and
    video (steps+1, 64, 64, 3) uint8 of the first. torch's random state stays as it was."""
    results, video = {}, []
    with kept_rng(agent.device):
        torch.manual_seed(seed + 1_000_003 * stream)
        for batch in range(math.ceil(episodes / vec.num_envs)):
            image, _ = vec.reset(seed=env_seeds(seed, stream, batch, vec.num_envs))
            carry, total, first = None, np.zeros(vec.num_envs), [image[0].copy()]
            for _ in range(steps):
                action, carry = agent.act(image, carry, sample)
                image, reward, _, _, info = vec.step(action)
                total += reward
                first.append(image[0].copy())
                breathe()  # may end it
            video = video or first
            for key, value in {**envs.outcome(info), "return": total}.items():
                results.setdefault(key, []).extend(value)
    return {key: np.array(value[:episodes]) for key, value in results.items()}, np.stack(video)


# --- Training: lockstep rounds --------------------------------------------------------------------

class Stop(Exception):
    """Raised between two updates or environment steps when a signal or --minutes ends the run."""


class Trainer:
    """A run in its folder. A round is an atom: one episode of every environment and the updates it
    earns. A stop drops it and writes its start, so that a resumed run is the uninterrupted one."""
    EPISODE = "episodes/r{:06d}-w{}.npz"  # of a round and a worker
    steps_in_round, last_checkpoint, last_success, board, info = 0, 0.0, math.nan, None, {}

    def __init__(self, c):
        self.c, self.dir = c, pathlib.Path(c.logdir)
        self.began, self.before, self.stop = time.monotonic(), 0.0, ""
        self.vec, facts, self.agent = build(c)
        self.T = facts["episode_steps"]
        if c.length > self.T + 1:
            die(f"--length {c.length}: an episode of {self.T} steps has {self.T + 1} rows")
        demos = envs.load_demos(c.demos, c.env, c.num_demos, self.vec, min_steps=c.length - 1,
                                **env_options(c))
        self.per_round = c.num_envs * self.T                                # environment steps
        self.rounds = math.ceil(c.steps / self.per_round)
        played = 0 if c.offline else self.rounds * c.num_envs
        rows = sum(len(d["image"]) for d in demos) + played * (self.T + 1)
        self.replay = Replay(rows, c.length, facts["action_dim"], self.agent.device)
        for demo in demos:
            self.replay.add(demo["image"], demo["action"], demo=True)

        self.round, self.evaluated = 0, False  # evaluated: no evaluation is due
        for folder in ("episodes", "videos"):
            (self.dir / folder).mkdir(parents=True, exist_ok=True)
        self.metrics = envs.open_log(self.dir / "metrics.jsonl")
        if (logged := self.restore()) is None and self.metrics.tell():
            die(f"{self.metrics.name} has lines but no checkpoint beside it: give another --logdir")
        envs.cut(self.metrics, logged or 0)
        with contextlib.suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.dir, purge_step=self.agent.updates)
        self.last = self.shown = time.monotonic(), self.step, self.agent.updates
        self.take_snapshot()
        self.facts, self.resumed = facts, logged is not None
        if not self.resumed:
            self.write_config()
            self.checkpoint()
        self.announce(len(demos))

    def run(self):
        """Train to the end, or to a stop. -> True if the run is complete."""
        c, agent = self.c, self.agent
        def note(number, _):
            self.stop = signal.Signals(number).name
        handlers = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.resumed and self.round < self.rounds:
                self.write_config()
            while agent.updates < c.pretrain:       # the start: world model and cloning, demos only
                self.learn(clone=True)
                if self.stop or self.checkpoint_due():
                    self.take_snapshot()
                    self.breathe()
                    self.checkpoint()
            self.take_snapshot()
            while self.round < self.rounds or not self.evaluated:
                if not self.evaluated:
                    self.evaluate()
                    self.evaluated = True
                else:
                    self.with_workers(self.offline_round if c.offline else self.play_round)
                    before, self.round = self.round * self.per_round, self.round + 1
                    self.steps_in_round = 0
                    due = before // c.eval_every < self.step // c.eval_every
                    self.evaluated = not due and self.round < self.rounds
                self.take_snapshot()
                if self.checkpoint_due() or self.round == self.rounds:
                    self.checkpoint()
        except Stop:
            self.drop_round()
            envs.say(f"stopped ({self.stop}) at step {self.step}: the same command resumes")
        finally:
            self.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.round == self.rounds and self.evaluated

    def with_workers(self, job):
        """job(); if a worker dies in it, up to three times anew, from the last snapshot."""
        for left in (3, 2, 1, 0):
            try:
                if self.vec.closed:
                    self.vec = envs.make_vec(self.c.env, self.c.num_envs, **env_options(self.c))
                return job()
            except envs.WorkerDied as error:
                self.breathe()  # a scheduler's signal may have reached worker and learner
                self.drop_round()
                if not left:
                    raise
                print(f"cmil: {error}; making new workers", file=sys.stderr, flush=True)
            self.agent.load_state_dict(copy.deepcopy(self.snapshot["agent"]))
            self.last = self.shown = time.monotonic(), self.step, self.agent.updates  # went back

    def checkpoint_due(self):
        return time.monotonic() - self.last_checkpoint > 60 * self.c.checkpoint_minutes

    @property
    def step(self):
        """Environment steps so far; offline: those of an online run with as many updates."""
        return self.round * self.per_round + self.steps_in_round

    def play_round(self):
        """One episode of every environment in lockstep; the learner works while they simulate."""
        c, N, T = self.c, self.c.num_envs, self.T
        images = np.zeros((T + 1, N, 64, 64, 3), np.uint8)
        actions = np.zeros((T + 1, N, self.replay.action.shape[1]), np.float32)
        images[0], _ = self.vec.reset(seed=env_seeds(c.seed, TRAIN, self.round, N))
        carry = None
        for t in range(T):
            actions[t + 1], carry = self.agent.act(images[t], carry)
            self.vec.step_async(actions[t + 1])
            self.work()
            images[t + 1], _, _, _, info = self.vec.step_wait()
            actions[t + 1][info["padded"]] = 0  # the episode was over: this action did nothing
        self.log({f"train/{key}": x.mean() for key, x in envs.outcome(info).items()})
        for i in range(N):
            self.replay.add(images[:, i], actions[:, i])
            envs.save_atomically(self.dir / self.EPISODE.format(self.round, i), lambda f: (
                np.savez_compressed(f, image=images[:, i], action=actions[:, i])))

    def offline_round(self):
        """The updates of a round, and no episode."""
        for _ in range(self.T):
            self.work()

    def work(self):
        """What goes with a step of all environments: the updates that it earns."""
        for _ in range(self.earned(self.step + self.c.num_envs) - self.earned(self.step)):
            self.learn(self.agent.clone_only)
        self.steps_in_round += self.c.num_envs
        self.progress()
        self.breathe()

    def earned(self, step):
        """Updates that the environment steps up to `step` have earned; seed rounds earn none."""
        seed_steps = math.ceil(self.c.seed_steps / self.per_round) * self.per_round
        return int(max(0, step - seed_steps) * self.c.train_ratio + 1e-6)

    def breathe(self):  # a moment at which the run can end
        if self.stop:
            raise Stop

    def learn(self, clone):
        """One update, and at log steps its metrics."""
        self.info = self.agent.update(self.replay, clone)
        if self.agent.updates % self.c.log_every == 0:
            with kept_rng(self.agent.device):  # how often one logs must not change what is learned
                _, rates, self.last = self.rates(self.last)
                self.log({**self.info, **self.agent.report(self.replay), **rates})
        for name, optimizer in self.agent.opts.items() if self.agent.updates % 10 == 0 else ():
            if (count := int(optimizer.skipped_now)) >= 10:
                where = f"at step {self.step}, update {self.agent.updates}"
                self.drop_round()
                die(f"the {name} loss had non-finite gradients in the last {count} updates, "
                    f"{where}; the last good state is {self.dir / 'checkpoint.pt'}")
        self.progress()

    def evaluate(self):
        """eval/*: with the mode of policy and latent unless eval_sample, on seeds of their own."""
        c, start, videos = self.c, time.monotonic(), self.dir / "videos"
        results, video = self.with_workers(lambda: rollouts(
            self.agent, self.vec, self.T, c.eval_episodes, c.seed, EVALUATE, c.eval_sample,
            self.breathe))
        envs.save_gif(videos / f"eval-{self.step:07d}.gif", video, self.vec)
        if isinstance(self.agent, Agent):
            with kept_rng(self.agent.device):  # a demo's window, and what five frames foretell
                image, action = self.replay.sample_demos(1)
                predicted, _ = self.agent.open_loop(image, action)
            envs.save_errors(videos / f"openloop-{self.step:07d}.png", image[:, 0].cpu().numpy(),
                             predicted[:, 0].cpu().numpy())
        means = {f"eval/{key}": float(value.mean()) for key, value in results.items()}
        self.log(means)
        text = ", ".join(f"{key[5:]} {value:.3f}" for key, value in means.items())
        envs.say(f"step {self.step} evaluation ({c.eval_episodes} episodes, "
                 f"{time.monotonic() - start:.0f} s): {text}")
        self.last_success = means["eval/success"]

    def rates(self, then):
        """Seconds, and environment steps and updates a second, since `then` -> those, now."""
        now = time.monotonic(), self.step, self.agent.updates
        seconds, steps, updates = (b - a for a, b in zip(then, now))
        rate = 1 / max(seconds, 1e-9)  # a clock may stand still
        return seconds, {"fps": steps * rate, "ups": updates * rate}, now

    def log(self, values):
        """One line of metrics.jsonl. Every name is explained in README.md, "What is logged"."""
        line = {"step": self.step, "update": self.agent.updates,
                "time": self.before + time.monotonic() - self.began,
                **{key: float(value) for key, value in values.items()}}
        envs.append(self.metrics, json.dumps(line) + "\n")
        if self.board:
            for key, value in line.items():
                self.board.add_scalar(key, value, self.agent.updates)

    def progress(self):
        """A line every few seconds; and the end of the minutes."""
        if self.c.minutes and time.monotonic() - self.began > 60 * self.c.minutes:
            self.stop = self.stop or f"--minutes {self.c.minutes:g}"
        seconds, rates, now = self.rates(self.shown)
        if seconds < 10:
            return
        self.shown, steps = now, self.rounds * self.per_round
        left = self.c.pretrain + self.earned(steps) - self.agent.updates
        eta = left / rates["ups"] / 60 if rates["ups"] else math.nan
        keys = ("recon", "kl", "bc", "reward", "disc/gap", "uncertainty")
        losses = " ".join(f"{k} {float(self.info[k]):.2f}" for k in keys if k in self.info)
        envs.say(f"step {self.step}/{steps} update {self.agent.updates} ups {rates['ups']:.2f} "
                 f"fps {rates['fps']:.0f} eta {eta:.0f}m | {losses} | "
                 f"success {self.last_success:.2f}")

    def announce(self, demos):
        c, renderer = self.c, self.facts["gl_renderer"]
        counts = ", ".join(f"{name} {sum(p.numel() for p in network.parameters()):,}"
                           for name, network in self.agent.networks.items())
        envs.say(f"{c.algo} on {c.env}, preset {c.preset}, seed {c.seed}, {self.dir}\n"
                 f"{demos} demos, {c.num_envs} environments of {self.T} steps"
                 f"{renderer and ', GL: '}{renderer}\nparameters: {counts}"
                 f"\n{self.agent.device}, step {self.step}, update {self.agent.updates}")

    def write_config(self):
        """config.json: every field, and what the run depends on beside them."""
        envs.save_config(self.dir / "config.json", dataclasses.asdict(self.c), self.resumed, {
            **self.facts, "update": self.agent.updates, "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else ""})

    def take_snapshot(self):
        """Keep the present state: what a checkpoint or a stop would write."""
        self.snapshot = {"agent": self.agent.state_dict(), "round": self.round,
                         "evaluated": self.evaluated, "metrics_bytes": self.metrics.tell(),
                         "seconds": self.before + time.monotonic() - self.began}

    def checkpoint(self):
        """Write the last snapshot; the previous checkpoint is kept beside it."""
        os.fsync(self.metrics.fileno())
        envs.save_atomically(self.dir / "checkpoint.pt", lambda f: torch.save(self.snapshot, f),
                             self.dir / "checkpoint.prev.pt")
        self.last_checkpoint = time.monotonic()

    def drop_round(self):
        """Go back to the last snapshot, and write it."""
        self.steps_in_round = 0
        envs.cut(self.metrics, self.snapshot["metrics_bytes"])
        self.checkpoint()

    def restore(self):
        """Load the newest checkpoint and its episodes -> length of metrics.jsonl then, or None."""
        state = load_checkpoint(self.dir, self.agent)
        if state is None:
            return None
        newest = self.dir / "checkpoint.pt"
        if state["path"] != newest:  # or the next checkpoint would take the place of a good one
            with contextlib.suppress(FileNotFoundError):
                os.replace(newest, newest.with_suffix(".damaged.pt"))
            os.replace(state["path"], newest)
        if state["round"] > self.rounds:
            die(f"--steps {self.c.steps}: the run in {self.dir} has made "
                f"{state['round'] * self.per_round} already")
        self.round, self.before, self.evaluated = map(state.get, ("round", "seconds", "evaluated"))
        for number, worker in np.ndindex(0 if self.c.offline else self.round, self.c.num_envs):
            file = self.dir / self.EPISODE.format(number, worker)
            self.replay.add(**envs.read_episode(file, self.T, self.replay.action.shape[1]))
        return state["metrics_bytes"]

    def close(self):
        self.vec.close()
        self.metrics.close()


def load_checkpoint(folder, agent):
    """Load the run's newest readable checkpoint into the agent -> all that it holds, a dict of
    tensors and plain values, and its `path`; None where there is none. Dies if none can be read."""
    problems = []
    for path in (folder / "checkpoint.pt", folder / "checkpoint.prev.pt"):
        try:
            if zipfile.ZipFile(path).testzip():  # torch.load does not notice a flipped byte
                raise ValueError("checksum")
            state = {**torch.load(path, weights_only=True, map_location="cpu"), "path": path}
            break
        except FileNotFoundError:
            continue  # killed between two renames
        except (OSError, MemoryError):
            raise  # the file itself may be as good as ever
        except Exception as error:  # zip, pickle and tensor errors of many kinds
            problems.append(f"{path} cannot be read ({type(error).__name__})")
    else:
        return die(f"{'; '.join(problems)}; remove it to begin anew") if problems else None
    if problems:
        print(f"cmil: {problems[0]}; going back to {path.name}", file=sys.stderr)
    try:
        agent.load_state_dict(state["agent"])
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, ValueError):
        die(f"the checkpoint in {folder} holds other networks than this version of cmil.py makes "
            "from its config.json; use the commit named there, or start in another --logdir")
    return state


def build(c):
    """The environments and the agent of a config -> vec, facts (dict of envs.env_facts), agent."""
    device = setup_torch(c)
    torch.manual_seed(c.seed)
    vec = envs.make_vec(c.env, c.num_envs, **env_options(c))
    facts = envs.env_facts(vec)
    return vec, facts, AGENTS.get(c.algo, Agent)(c, facts["action_dim"], device)


def setup_torch(c):
    """Device, threads and number formats of this process -> torch.device."""
    device = torch.device("cuda" if torch.cuda.is_available() and c.device != "cpu" else "cpu")
    if c.device == "cuda" != device.type:
        die("--device cuda: torch finds no CUDA device here; use --device cpu")
    if c.graph == "on" and device.type == "cpu":
        die("--graph on: graphs need CUDA; use --graph auto")
    warnings.filterwarnings("ignore", message=".*capturable=True can impair performance")
    if c.threads:
        torch.set_num_threads(c.threads)
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # glibc: keep memory
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, -1)  # no maps, no trimming
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


# --- Command line ---------------------------------------------------------------------------------

def parse(argv):
    """The command line -> (dict of the config fields given, namespace of the other options)."""
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="cmil.py", description=about, allow_abbrev=False)
    parser.error = lambda message: die(f"{message}; see python cmil.py --help")
    tools = parser.add_argument_group("instead of training")
    tool = tools.add_mutually_exclusive_group()
    tool.add_argument("--eval", metavar="RUN", help="evaluate a run's checkpoint; one JSON line")
    tools.add_argument("--episodes", type=int, default=100, help="episodes of --eval (100)")
    tools.add_argument("--video", metavar="FILE.gif", help="with --eval: write a rollout")
    tool.add_argument("--plot", metavar="RUN", nargs="+", help="draw learning curves")
    tool.add_argument("--plot-bound", metavar="RUN", help="draw the terms of the paper's bound")
    tools.add_argument("--out", default="curves.png", help="the picture that is drawn (curves.png)")
    tool.add_argument("--bench", action="store_true", help="measure the speed; one JSON line")
    fields = parser.add_argument_group("configuration (presets change some of the defaults)")
    for field in dataclasses.fields(Config):
        kind = ({"action": argparse.BooleanOptionalAction} if field.type in (bool, "bool") else
                {"type": type(field.default), "choices": field.metadata["choices"], "metavar": "X"})
        fields.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{field.metadata['help']} (default: {field.default})", **kind)
    args = vars(parser.parse_args(argv))
    drawing = "plot_bound" if args["plot_bound"] else "plot"
    for option, needed in (("episodes", "eval"), ("video", "eval"), ("out", drawing)):
        if args[option] != parser.get_default(option) and not args[needed]:
            die(f"--{option} does nothing without --{needed}")
    explicit = {f.name: args.pop(f.name) for f in dataclasses.fields(Config) if f.name in args}
    if explicit and (args["plot"] or args["plot_bound"]):
        die(f"--{next(iter(explicit))} does nothing with --{drawing}".replace("_", "-"))
    return explicit, argparse.Namespace(**args)


def make_config(explicit):
    """Defaults < preset < environment < algorithm < explicit flags; checked, with a logdir."""
    c = Config(**explicit)
    logdir = c.logdir or f"runs/{c.env.replace('/', '-').replace(':', '-')}-{c.algo}-s{c.seed}"
    stored = read_config(logdir)
    preset = c.preset
    if preset == "auto":
        cuda = torch.cuda.is_available() and c.device != "cpu"
        preset = stored["preset"] if stored else "paper" if cuda else "small"
        reason = "the run's own" if stored else f"{'' if cuda else 'no '}CUDA here"
        print(f"preset {preset} ({reason})", file=sys.stderr)
    overrides = {**PRESETS[preset], **ENV_PRESETS.get((c.env, preset), {}), **ALGOS[c.algo]}
    if c.tasks:
        overrides.pop("episode_steps", None)  # the preset's is for all tasks
    c = Config(**{**overrides, **explicit, "preset": preset, "logdir": str(logdir)})
    check_config(c)
    if stored:
        differ = [f"{key} (now {value!r}, run {stored[key]!r})"
                  for key, value in dataclasses.asdict(c).items()
                  if key not in RESUME_MAY_CHANGE and value != stored[key]]
        if differ:
            die(f"{logdir} holds a run with another configuration: {', '.join(differ)}; "
                f"give another --logdir or the run's own flags")
    return c


def read_config(run):
    """The config of the run in folder `run` -> dict of all fields, or None where there is none."""
    path = pathlib.Path(run) / "config.json"
    try:
        c = Config(**json.loads(path.read_text())["config"])  # no field that is unknown here
        check_config(c)
        return dataclasses.asdict(c)
    except (FileNotFoundError, NotADirectoryError):
        if path.with_name("checkpoint.pt").exists():
            die(f"{path} is missing, and without it the checkpoint is of no use; restore it")
        return None
    except (ValueError, KeyError, TypeError):
        die(f"{path} is not the config.json of a run of this version; give another folder")


def check_config(c):
    """Refuse impossible numbers with one line."""
    for field in dataclasses.fields(c):
        value, least, most = getattr(c, field.name), *map(field.metadata.get, ("least", "most"))
        kind, choices = type(field.default), field.metadata["choices"]
        if not isinstance(value, (float, int) if kind is float else kind) or (
                choices and value not in choices):
            die(f"{field.name} {value!r}: expected {choices or kind.__name__}")
        if kind in (int, float) and not (  # NaN fails too
                (value > 0 if least is None else value >= least) and value <= most):
            bounds = "greater than 0" if least is None else f"of {least} or more"
            die(f"--{field.name.replace('_', '-')} {value}: expected a number {bounds}"
                + (f" and at most {most}" if value > most else ""))
    silent = c.reward == "none"
    needs = {"bc": ("--reward none", silent), "dbc": ("--reward none", silent),
             "ditto": ("--offline, a --reward and a --horizon below --length",
                       c.offline and not silent and c.horizon < c.length),
             "pdac": ("--no-offline, a --reward, --length 6 or more, --pretrain 0 and --seed-steps "
                      "above 0", c.length > 5 and c.seed_steps > 0
                      and not (c.offline or silent or c.pretrain))}
    if c.algo in needs and not needs[c.algo][1]:
        die(f"--algo {c.algo} needs {needs[c.algo][0]}")
    if silent and not (c.offline and c.beta):
        die("--reward none needs --offline and a --beta above 0: nothing else would be learned")


def load_agent(run, explicit=None):
    """A finished or stopped run's agent and environments -> Config, agent, vec, T.

    explicit: flags given beside --eval; those of EVAL_MAY_CHANGE replace the run's own."""
    stored = read_config(run)
    if stored is None:
        die(f"{run}: no config.json there; give the folder of a run")
    for name in set(explicit or {}) - set(EVAL_MAY_CHANGE):
        die(f"--{name.replace('_', '-')} belongs to training: with --eval it cannot change")
    c = Config(**{**stored, "logdir": str(run), **(explicit or {}), "graph": "off"})
    check_config(c)
    vec, facts, agent = build(c)
    if load_checkpoint(pathlib.Path(run), agent) is None:
        die(f"{run}: the run has not written a checkpoint.pt yet")
    return c, agent, vec, facts["episode_steps"]


def evaluate_run(run, episodes, video, explicit):
    """--eval: one JSON line, on environment seeds that training and its evaluations never use."""
    if episodes < 1:
        die(f"--episodes {episodes}: expected 1 or more")
    if video and not (video.endswith(".gif") and pathlib.Path(video).parent.is_dir()):
        die(f"--video {video}: expected the name of a .gif file in a folder that exists")
    c, agent, vec, steps = load_agent(run, explicit)
    results, frames = rollouts(agent, vec, steps, episodes, c.seed, FINAL, c.eval_sample)
    vec.close()
    means = {key: value.mean() for key, value in results.items()}
    print(json.dumps({"episodes": episodes, "success": means.pop("success"),
                      "success_ci95": bootstrap_ci(results["success"]), **means, "seed": c.seed,
                      "sampled": c.eval_sample, "update": agent.updates}))
    if video:
        envs.save_gif(video, frames, vec)


def main(argv=None):
    explicit, args = parse(argv)
    import envs
    try:
        if args.eval is not None:
            return evaluate_run(args.eval, args.episodes, args.video, explicit)
        sys.path.append(str(pathlib.Path(__file__).parent / "results"))
        if args.plot or args.plot_bound is not None:
            import figures
            draw = figures.plot if args.plot else figures.plot_bound
            return draw(args.plot or args.plot_bound, args.out)
        if args.bench:
            import bench
            return bench.bench(explicit)
        Trainer(make_config(explicit)).run()
    except (Exception, KeyboardInterrupt) as error:
        die(envs.trouble(error))


if __name__ == "__main__":
    main()
