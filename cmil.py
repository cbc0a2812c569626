"""CMIL, conservative model-based imitation learning from pixels, in one file.

Kolev, Rafailov, Hatch, Wu, Finn: "Efficient Imitation Learning with Conservative World Models",
L4DC 2024 (arXiv 2405.13193). From 10-20 demonstrations, without reward, CMIL learns a world model
with an ensemble of latent priors and a discriminator on latent state-action pairs. Its logit minus
the ensemble's disagreement is the reward of an actor and critics inside the model.

    python cmil.py --env kitchen                         train; the same command resumes
    python cmil.py --eval runs/kitchen-cmil-s0           one JSON line; --video FILE.gif films it

EQUATIONS   [P]: the L4DC paper; [W]: its workshop version; [C]: the released code; [D2]: DreamerV2.
  [P1]  world model    max E_q[ sum_t log p(x_t|s_t)
                                - KL( q(s_t|x_t,s_{t-1},a_{t-1}) || T_i(s_t|s_{t-1},a_{t-1}) ) ]
  [P8]  discriminator  min_D -mean log D(s^E,a^E) - mean log(1 - D(s,a))     expert 1, policy 0
  [P9]  disagreement   u(s,a) = std_i mu_i(s,a), mean over dims      mu_i: mean of the i-th prior
  [P10] reward         r(s,a) = log D - log(1-D) - alpha u(s,a)      the first two are D's logit
  [W-]  values         V_0(s_t) = min_i Q_i(s_t,a_t)
        k steps        V_k(s_t) = sum_{j<k} g^j r_{t+j} + g^k V_0(s_{t+k})
  [W5]  TD(lambda)     V(s_t) = (1-l) sum_{k=1}^{H-t-1} l^{k-1} V_k(s_t) + l^{H-t-1} V_{H-t}(s_t)
  [W6]  actor          L = -mean_{t<H}[ l V(s_t) + (1-l) V_0(s_t) ] + beta BC(expert)
  [W7]  critic, model  L = mean_{t<H} (Q_i(s_t,a_t) - Vbar(s_t))^2   bar: by the target critics
  [W8]  critic, data   L = mean_j (Q_i(s_j,a_j) - y_j)^2
                       y_j = r_j + g((1-l) Vbar_0(s_{j+1}) + l Vbar(s_{j+1}))   r_j: D's logit
  [W9]  critic         [W7] + [W8]

SYMBOLS     B windows of L steps, N = L B imagination starts, H horizon, K prior heads, m critics,
            T steps (an episode's); sizes A action, E embed, S stoch, D deter, F = S + D feat.
            g gamma, l lambda, alpha weight of the penalty, beta of cloning, sigma noise on D's
            input. Tensors are time-major. post: q(s_t|...); prior: T_i(s_t|...);
            feat: [stoch, deter]; logit: the discriminator's output before its sigmoid.

TIME        action[t] LED TO image[t] (row 0: the reset image and a zero action). The paper's pair
            (s_t, a_t) is therefore (feat[t], action[t+1]); only state_action_pairs() makes it.

                row t       0        1        2        3
                image       x0       x1       x2       x3
                action      0        a0       a1       a2         stored: what led here
                feat        s0       s1       s2       s3
                pairs    (s0,a0)  (s1,a1)  (s2,a2)                one fewer than rows

ALGORITHM   put the demonstrations into the replay
            repeat `pretrain` times: one step on [P1] and behaviour cloning, on the demonstrations
            seed rounds: run the cloned policy in the environment, no updates
            repeat: run the policy; for every environment step, `train_ratio` times:
                windows of the replay (R) and of the demonstrations (E) -> posterior states
                world model        [P1] on R
                imagination        from every posterior of R, H steps of policy and prior
                discriminator      [P8]: pairs of E against imagined pairs
                critics            [W9]: towards TD(lambda) of their old copies, the targets
                actor              [W6]: through dynamics, D, disagreement, critics; and cloning
                one optimizer step each, on gradients taken before any of them (take_steps)
"""
import argparse
import copy
import dataclasses
import fcntl
import json
import math
import operator
import os
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

if "OMP_WAIT_POLICY" not in os.environ:  # waiting threads would block others
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
import torch.nn.functional as F
from torch import nn

with suppress(ImportError):  # load_policy works without gymnasium
    import demonstrations
    import envs

# === Configuration ================================================================================
# Each field is a flag. The defaults give the paper-size run; presets override them.

LIMITS = {"choices": lambda value, choices: value in choices,
          "at_least": operator.ge, "above": operator.gt, "at_most": operator.le}

def option(default, help, **limits):
    """Declare a field: its default, its help text, and limits of its value, as in LIMITS."""
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})

@dataclasses.dataclass
class Config:
    # What to run
    env: str = option("kitchen", "kitchen, baoding, point, or a Gymnasium id")
    algo: str = option("cmil", "the method: cmil, vmail, dgail or dbc")
    preset: str = option("auto", "auto: by device", choices=("auto", "paper", "small", "debug"))
    seed: int = option(0, "the random seed", at_least=0, at_most=2**32 - 1)
    logdir: str = option("", "folder; empty: runs/<env>-<algo>-s<seed>")
    steps: int = option(250_000, "environment steps [P]", above=0)
    minutes: float = option(0.0, "stop after X minutes; 0: never", at_least=0)
    device: str = option("auto", "auto: CUDA if available", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads; 0: torch's choice", at_least=0)
    precision: str = option("auto", "auto: by device", choices=("auto", "float32", "bfloat16"))
    graph: bool = option(True, "on CUDA, replay updates as a graph")

    # Environment, demonstrations, logging
    tasks: str = option("", "kitchen: joined by +; empty: all four")
    episode_steps: int = option(0, "T; 0: env's own", at_least=0)
    robot_noise_ratio: float = option(0.0, "kitchen; 0: its own .01; [C] .1", at_least=0)
    num_envs: int = option(5, "environments in lockstep", above=0)
    demos: str = option("", "file or folder; empty: env's own")
    num_demos: int = option(0, "how many; 0: all", at_least=0)
    log_every: int = option(100, "updates per line of metrics", above=0)
    eval_every: int = option(5_000, "steps per evaluation", above=0)
    eval_episodes: int = option(10, "evaluation episodes", above=0)

    # Network sizes [C]
    conv_depth: int = option(48, "first convolution's channels", above=0)
    stoch: int = option(360, "S, latent dimensions", above=0)
    deter: int = option(400, "D, GRU state", above=0)
    hidden: int = option(400, "units in the RSSM", above=0)
    members: int = option(10, "K, prior heads", above=0)
    units: int = option(400, "of actor and critics", above=0)
    layers: int = option(4, "of actor and critics", above=0)
    actor_units: int = option(0, "0: as units", at_least=0)
    actor_layers: int = option(0, "0: as layers", at_least=0)
    min_std: float = option(0.1, "smallest policy std", above=0, at_most=1)
    sample_grad: str = option("exact", "of a policy's sample", choices=("exact", "released"))
    critics: int = option(2, "m, critics", above=0)
    disc_units: int = option(200, "units of D", above=0)
    disc_layers: int = option(2, "layers of D", above=0)

    # Batches and schedule [C]
    batch: int = option(32, "B, windows of replay, of demos", above=0)
    length: int = option(50, "L, window length", at_least=2)
    horizon: int = option(15, "H, imagined steps", above=0)
    pretrain: int = option(1000, "first updates, demos alone", at_least=0)
    seed_steps: int = option(5000, "steps before training", at_least=0)
    train_ratio: float = option(0.4, "updates per step", at_least=0)
    offline: bool = option(False, "from the demos alone")
    demo_share: float = option(0.0, "share of demos in R", at_least=0, at_most=1)

    # Losses and optimizers [C], if not said otherwise
    free_nats: float = option(1.0, "KL below this is free [D2]", at_least=0)
    image_std: float = option(1.0, "std of p(x|s) [P1; D2: 1]", above=0)
    kl_balance: float = option(0.8, "share of the prior [D2]", at_least=0, at_most=1)
    reward: str = option("logit", "[P10] logit; [C] sigmoid; none: cloning only",
                         choices=("logit", "sigmoid", "none"))
    alpha: float = option(10.0, "weight of disagreement [P10]", at_least=0)
    beta: float = option(10.0, "weight of cloning [W6]; 0: none", at_least=0)
    clone_power: float = option(0.0, "p: weighs cloning by std^2p", at_least=0)
    beta_end: float = option(1.0, "beta's share left at the end", above=0, at_most=1)
    sigma: float = option(math.sqrt(2.5), "std of noise on D's input [P8]", at_least=0)
    reward_noise: bool = option(False, "[C]: noise in the reward too")
    target: str = option("min", "[W] min of targets; [C] random", choices=("min", "random"))
    data_critic: bool = option(True, "[W8]: loss on real pairs")
    actor_discount: bool = option(True, "weights g^t of the actor [C]")
    critic_discount: bool = option(True, "weights g^(t+1) of the critic [C]")
    gamma: float = option(0.99, "g, discount [C]", at_least=0, at_most=1)
    lam: float = option(0.95, "l of TD(lambda) [C]", at_least=0, at_most=1)
    entropy: float = option(1e-4, "weight of entropy [C]", at_least=0)
    lr: float = option(3e-4, "Adam's learning rate", above=0)
    disc_lr: float = option(3e-4, "D's learning rate", above=0)
    lr_decay: float = option(0.0, "last share: rates fall to 0", at_least=0, at_most=1)
    adam_eps: float = option(1e-5, "Adam's epsilon", above=0)
    clip: float = option(100.0, "largest gradient norm", above=0)
    weight_decay: float = option(1e-6, "weights shrink per step", at_least=0)
    target_every: int = option(100, "updates between target copies", above=0)

PRESETS = {
    "paper": {},
    "small": dict(
        steps=10_000, eval_every=1_000, eval_episodes=20,
        conv_depth=12, stoch=64, deter=256, hidden=256, members=5, units=128, layers=2,
        disc_units=128, batch=8, length=16, horizon=8, seed_steps=1000, lr=1e-3, disc_lr=5e-4,
        # In a few thousand updates a critic learns the next ten steps, not the next hundred.
        gamma=0.9, target_every=20,
        # With the paper's sigma a small D misses single pixels, and the policy cuts corners. A
        # smaller image_std makes the model reconstruct them.
        sigma=0.5, image_std=0.3),
    "debug": dict(
        steps=400, log_every=10, eval_every=200, eval_episodes=2, num_envs=2, num_demos=2,
        conv_depth=4, stoch=8, deter=16, hidden=16, members=3, units=16, layers=2, disc_units=16,
        batch=4, length=8, horizon=4, pretrain=20, seed_steps=100, train_ratio=0.1),
}

SIMULATED = dict(steps=28_000, eval_every=3_000, eval_episodes=10, lr_decay=0.3, demo_share=0.5)
ENV_PRESETS = {
    ("point", "small"): dict(steps=6_000, image_std=1.0, conv_depth=8),
    # The kitchen's expert is done by about step 160 and then rests.
    ("kitchen", "small"): dict(
        SIMULATED, batch=12, length=20, episode_steps=175, min_std=0.01, beta_end=0.1,
        actor_units=400, actor_layers=4, clone_power=1.0),
    ("baoding", "paper"): dict(length=25),  # [C]
    ("baoding", "small"): dict(SIMULATED, batch=10, length=25, min_std=0.03, beta_end=0.03),
}

# What a resumed run and --eval may change; other differences are refused.
RESUME_MAY_CHANGE = ("steps", "minutes", "log_every", "eval_every", "eval_episodes", "threads",
                     "graph", "logdir", "demos")
EVAL_MAY_CHANGE = ("seed", "device", "threads", "num_envs", "episode_steps")

# === Helpers ======================================================================================

def die(message):
    """Report a user's mistake in one line and exit with code 2."""
    say(f"cmil: error: {' '.join(str(message).split())}", sys.stderr)
    raise SystemExit(2)

def say(text, stream=None):
    """Print at once. A lost terminal or a full disk must not end a run."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

def state_action_pairs(feat, action):
    """Turn rows in stored order into the paper's pairs (s_t, a_t); only this does.
    feat (T, ..., F), action (T, ..., A), where action[t] led to feat[t]
    -> s (T-1, ..., F), a (T-1, ..., A)"""
    return feat[:-1], action[1:]

def to_float(image):
    """uint8 (..., 64, 64, 3) -> float (..., 3, 64, 64) in [-.5, .5]; memory stays channels-last."""
    return image.float().div_(255).sub_(0.5).movedim(-1, -3)  # in place: it is large

def to_uint8(image):
    """Invert to_float, with clipping: (..., 3, 64, 64) -> uint8 (..., 64, 64, 3)."""
    pixels = (image.float().movedim(-3, -1) + 0.5) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8)

def bootstrap_ci(values, draws=10_000):
    """Return the 95% bootstrap confidence interval (low, high) of the mean of a 1-D array."""
    values = np.asarray(values, np.float64)
    index = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return tuple(np.percentile(values[index].mean(1), [2.5, 97.5]).tolist())

# === Distributions ================================================================================

def kl_normal(mean_p, std_p, mean_q, std_q):
    """KL(p || q) of diagonal Gaussians, summed over the last dimension: (..., S) -> (...)."""
    ratio = std_p / std_q
    squares = ratio**2 + ((mean_p - mean_q) / std_q) ** 2
    return (0.5 * (squares - 1) - ratio.log()).sum(-1)

class TruncatedNormal:
    """Independent normals truncated to [-1, 1], with loc inside: the policy's distribution.
    loc, scale (..., A), float32. log_probs and entropy are exact; entropy sums over A."""
    def __init__(self, loc, scale, sample_grad="exact"):
        self.loc, self.scale, self.sample_grad = loc, scale, sample_grad
        self.mode = loc
        self.low, self.high = (-1 - loc) / scale, (1 - loc) / scale
        self.cdf_low = torch.special.ndtr(self.low)
        self.mass = torch.special.ndtr(self.high) - self.cdf_low  # probability inside [-1, 1]

    def rsample(self):
        """Draw x = loc + scale z (..., A), z by the inverse cdf of a uniform number u.
        dx/dloc: exact, 1 - [(1-u) phi(low) + u phi(high)] / phi(z); released [C], 1."""
        p = self.cdf_low + torch.rand_like(self.loc) * self.mass
        z = torch.special.ndtri(p.clamp(1e-6, 1 - 1e-6))
        x = self.loc + self.scale * (z if self.sample_grad == "exact" else z.detach())
        inside = x.clamp(-1 + 1e-6, 1 - 1e-6)
        return x + (inside - x).detach()  # straight-through

    def log_probs(self, x):
        """x (..., A) -> (..., A). Demo actions reach +-1, where the density is still positive."""
        z = (x.clamp(-1 + 1e-6, 1 - 1e-6) - self.loc) / self.scale
        log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - self.scale.log()
        return log_density - self.mass.log()

    def entropy(self):
        """(...): log(sqrt(2 pi e) scale mass) + (low phi(low) - high phi(high)) / (2 mass)."""
        phi_low, phi_high = (torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
                             for x in (self.low, self.high))
        edge = (self.low * phi_low - self.high * phi_high) / (2 * self.mass)
        log_scale = (self.scale * self.mass).log() + 0.5 * math.log(2 * math.pi * math.e)
        return (log_scale + edge).sum(-1)

# === Networks =====================================================================================

def initialize(module):
    """Set Glorot-uniform weights and zero biases in place, as Keras does in the released code."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module

def mlp(inputs, units, layers, outputs):
    """Make `layers` hidden layers of ELU units and a linear output."""
    modules, size = [], inputs
    for _ in range(layers):
        modules += [nn.Linear(size, units), nn.ELU()]
        size = units
    return nn.Sequential(*modules, nn.Linear(size, outputs))

class EnsembleMLP(nn.Module):
    """K MLPs of one shape side by side, evaluated by one batched matrix product a layer."""
    def __init__(self, heads, inputs, units, layers, outputs):
        super().__init__()
        sizes = [inputs] + [units] * layers + [outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in zip(sizes, sizes[1:]):
            weight = torch.empty(heads, i, o)
            for head in weight:  # on the 3-D tensor xavier would get the fan wrong
                nn.init.xavier_uniform_(head)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(heads, 1, o)))

    def forward(self, x, member=None):
        """Every head on the same input:       x (N, in)                  -> (K, N, out)
        one drawn head for each time step:  x (T, N, in), member (T,)  -> (T, N, out)"""
        picked = slice(None) if member is None else member
        weights = [weight[picked] for weight in self.weights]  # (K or T, in, out)
        biases = [bias[picked] for bias in self.biases]  # (K or T, 1, out)
        x = x.expand(len(weights[0]), *x.shape[-2:])  # (K or T, N, in)
        for weight, bias in zip(weights[:-1], biases[:-1]):
            x = F.elu(torch.baddbmm(bias, x, weight))
        with torch.autocast(x.device.type, enabled=False):  # [P9]: a small difference
            return torch.baddbmm(biases[-1], x.float(), weights[-1])

class Encoder(nn.Module):
    """Image -> embedding: four convolutions, kernel 4, stride 2 (64 -> 31 -> 14 -> 6 -> 2)."""
    def __init__(self, depth, inputs=3):
        super().__init__()
        channels, layers = [inputs, depth, 2 * depth, 4 * depth, 8 * depth], []
        for i, o in zip(channels, channels[1:]):
            layers += [nn.Conv2d(i, o, 4, 2), nn.ELU(inplace=True)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.size = 32 * depth  # E

    def forward(self, image):
        """Pixels of to_float (..., inputs, 64, 64) -> (..., E)"""
        x = self.layers(image.flatten(0, -4))
        return x.flatten(1).float().unflatten(0, image.shape[:-3])

class Decoder(nn.Module):
    """feat -> mean of p(x|s): four transposed convolutions, stride 2 (1 -> 5 -> 13 -> 30 -> 64):
    the first as a matrix product, the last as a convolution that makes 2x2 blocks."""
    def __init__(self, depth, feat):
        super().__init__()
        self.input = nn.Sequential(
            nn.Linear(feat, 32 * depth), nn.Linear(32 * depth, 5 * 5 * 4 * depth), nn.ELU())
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4 * depth, 2 * depth, 5, 2), nn.ELU(inplace=True),
            nn.ConvTranspose2d(2 * depth, depth, 6, 2), nn.ELU(inplace=True),
            nn.Conv2d(depth, 2 * 2 * 3, 3, padding=2)).to(memory_format=torch.channels_last)

    def forward(self, feat):
        """(..., F) -> (..., 3, 64, 64)"""
        x = self.input(feat.flatten(0, -2)).unflatten(1, (5, 5, -1)).movedim(-1, 1)
        blocks = self.layers(x).float().movedim(1, -1).unflatten(-1, (2, 2, 3))
        image = blocks.transpose(2, 3).reshape(-1, 64, 64, 3)  # of (N, 32, 2, 32, 2, 3)
        return image.movedim(-1, 1).unflatten(0, feat.shape[:-1])

class Actor(nn.Module):
    """pi(a|s): a truncated normal on [-1, 1]."""
    def __init__(self, feat, action, c):
        super().__init__()
        self.min_std, self.sample_grad = c.min_std, c.sample_grad
        units = c.actor_units or c.units
        layers = c.actor_layers or c.layers
        self.layers = mlp(feat, units, layers, 2 * action)

    def forward(self, feat):
        """(..., F) -> TruncatedNormal over (..., A)"""
        loc, scale = self.layers(feat).float().chunk(2, -1)
        scale = 2 * torch.sigmoid(scale / 2) + self.min_std
        return TruncatedNormal(torch.tanh(loc), scale, self.sample_grad)

class Discriminator(nn.Module):
    """D(s, a): the probability that a pair is the expert's (expert is 1, policy is 0)."""
    def __init__(self, feat, action, units, layers):
        super().__init__()
        self.layers = mlp(feat + action, units, layers, 1)

    def forward(self, s, a, sigma=0.0):
        """s (..., F), a (..., A) -> logit (...); sigma: noise on the whole input."""
        x = torch.cat([s, a], -1)
        if sigma:
            x = x + sigma * torch.randn_like(x)
        return self.layers(x).float().squeeze(-1)

class Critics(EnsembleMLP):
    """Q_1..Q_m(s, a)."""
    def __init__(self, count, feat, action, units, layers):
        super().__init__(count, feat + action, units, layers, 1)

    def forward(self, s, a):
        """s (..., F), a (..., A) -> (m, ...)"""
        x = torch.cat([s, a], -1)
        q = super().forward(x.flatten(0, -2))  # (m, N, 1)
        return q.squeeze(-1).unflatten(-1, x.shape[:-1])

# === World model [P1]: an RSSM with an ensemble of priors; copy these, they need only torch =======

class State(NamedTuple):
    """Latent states with any leading shape; mean and std belong to stoch's distribution."""
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
    posterior q(stoch_t | deter_t, x_t); K priors T_i(stoch_t | deter_t), one head each.
    Arguments are sizes: A, E, S, D, hidden units, K."""
    def __init__(self, action, embed, stoch, deter, hidden, members):
        super().__init__()
        self.stoch, self.deter, self.members = stoch, deter, members
        self.input = nn.Linear(stoch + action, hidden)
        self.gru = nn.Linear(hidden + deter, 3 * deter)
        self.norm = nn.LayerNorm(3 * deter, eps=1e-3)
        self.post_hidden = nn.Linear(deter + embed, hidden)
        self.post_output = nn.Linear(hidden, 2 * stoch)
        self.priors = EnsembleMLP(members, deter, hidden, 1, 2 * stoch)

    def initial(self, batch):
        """Return the zero state (batch, ...), before any observation."""
        stoch = self.gru.weight.new_zeros(batch, self.stoch)
        deter = self.gru.weight.new_zeros(batch, self.deter)
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
        update = torch.sigmoid(update - 1)  # biased to keep deter
        return update * cand + (1 - update) * deter

    def posterior(self, deter, embed):
        """q(stoch_t | deter_t, x_t): deter (..., D), embed (..., E) -> mean, std (..., S)"""
        x = F.elu(self.post_hidden(torch.cat([deter, embed], -1)))
        return self.mean_std(self.post_output(x))

    def step_post(self, state, action, embed, sample=True):
        """Filter one frame: s_{t-1} (B, ...), a_{t-1} (B, A), embed of x_t (B, E) -> s_t.
        Without `sample` stoch is the mean."""
        deter = self.step_deter(state.stoch, state.deter, action)
        mean, std = self.posterior(deter, embed)
        stoch = mean + std * torch.randn_like(std) if sample else mean
        return State(stoch, deter, mean, std)

    def observe(self, embed, action):
        """Filter windows: embed (L, B, E), action (L, B, A) -> posterior State (L, B, ...).
        A window may begin in mid-episode: the scan begins with a zero state and a zero action."""
        length, batch = action.shape[:2]
        action = torch.cat([torch.zeros_like(action[:1]), action[1:]])
        states = [self.initial(batch)]
        for t in range(length):
            states.append(self.step_post(states[-1], action[t], embed[t]))
        return State(*(torch.stack(x) for x in zip(*states[1:])))

    def drawn_prior(self, deter):
        """T_i with i drawn anew at every time step, shared by the batch [P1].
        deter (L, B, D) -> mean, std (L, B, S). All steps at once: the prior is not in the scan."""
        member = torch.randint(self.members, deter.shape[:1], device=deter.device)
        return self.mean_std(self.priors(deter, member))

    def step_prior(self, state, action):
        """Imagine one step: s_t (N, ...), a_t (N, A) -> s_{t+1} of a drawn head, u(s_t,a_t) (N,)"""
        deter = self.step_deter(state.stoch, state.deter, action)
        means, stds = self.mean_std(self.priors(deter))  # (K, N, S)
        member = torch.randint(self.members, (1,), device=deter.device)
        mean, std = means[member].squeeze(0), stds[member].squeeze(0)
        stoch = mean + std * torch.randn_like(std)
        return State(stoch, deter, mean, std), disagreement(means)

def disagreement(means):
    """[P9] how far the members' means lie apart: (K, N, S) -> (N,).
    The population std (ddof 0) over the K members, then the mean over the latent dimensions. One
    member never disagrees, and the std's gradient at zero would be undefined."""
    if means.shape[0] == 1:
        return torch.zeros_like(means[0, :, 0])
    variance = (means - means.mean(0)).square().mean(0)  # (N, S)
    return variance.clamp(min=1e-12).sqrt().mean(-1)  # sqrt has no gradient at zero

class WorldModel(nn.Module):
    def __init__(self, c, action):
        super().__init__()
        self.encoder = Encoder(c.conv_depth)
        self.rssm = RSSM(action, self.encoder.size, c.stoch, c.deter, c.hidden, c.members)
        self.decoder = Decoder(c.conv_depth, c.stoch + c.deter)

def world_model_loss(world, image, post, c):
    """[P1]: image (L, B, 3, 64, 64), pixels of to_float; post State (L, B, ...) -> loss, info.
    row t        0         1         2
    post      q(s0|x0)  q(s1|x1)  q(s2|x2)      every row reconstructs its image
    prior      T_i(s0)   T_j(s1)   T_k(s2)      heads i, j, k drawn anew; deter_t uses a_{t-1}"""
    difference = world.decoder(post.feat) - image
    error = torch.linalg.vector_norm(difference, dim=(-3, -2, -1))  # (L, B)
    recon = 0.5 * error.square().mean()  # -log p(x|s), unit variance, no constant
    mean, std = world.rssm.drawn_prior(post.deter)
    to_post = kl_normal(post.mean, post.std, mean.detach(), std.detach()).mean()
    to_prior = kl_normal(post.mean.detach(), post.std.detach(), mean, std).mean()
    free, balance = c.free_nats, c.kl_balance  # free: the mean, not each term
    kl = (1 - balance) * to_post.clamp(min=free) + balance * to_prior.clamp(min=free)
    return recon / c.image_std**2 + kl, {"recon": recon, "kl": to_prior}

# === Imagination, discriminator, reward [P8]-[P10] ================================================

class Dream(NamedTuple):
    """Imagined rollouts in stored order: action[t] led to feat[t]; state_action_pairs applies."""
    feat: torch.Tensor          # (H+1, N, F)  s_0..s_H; s_0 is a real, replayed state
    action: torch.Tensor        # (H+1, N, A)  the stored action that led to s_0, a_0..a_{H-1}
    last_action: torch.Tensor   # (N, A)       a_H, only for its value
    disagreement: torch.Tensor  # (H, N)       u(s_t, a_t): the spread of the priors of s_{t+1}
    entropy: torch.Tensor       # (H, N)       of pi(.|s_t)

def imagine(rssm, actor, start, first_action, horizon):
    """Roll the policy out in the model from `start`, a State (N, ...) -> Dream.
    first_action (N, A) led to `start`. Gradients reach the actor through its actions and what the
    model makes of them, but not through the policy's own input: a_t ~ pi(.| stop_grad(s_t))."""
    state, feats, actions = start, [start.feat], [first_action]
    spreads, entropies = [], []
    for _ in range(horizon):
        policy = actor(state.feat.detach())
        action = policy.rsample()
        state, spread = rssm.step_prior(state, action)
        feats.append(state.feat)
        actions.append(action)
        spreads.append(spread)
        entropies.append(policy.entropy())
    last_action = actor(state.feat.detach()).rsample()
    return Dream(torch.stack(feats), torch.stack(actions), last_action,
                 torch.stack(spreads), torch.stack(entropies))

def discriminator_loss(disc, expert, policy, sigma):
    """[P8] with expert = 1, policy = 0; the same noise acts on both.
    expert, policy: pairs (s (..., F), a (..., A)) -> loss, info. Inputs carry no gradient."""
    on_expert, on_policy = disc(*expert, sigma), disc(*policy, sigma)
    loss = F.softplus(-on_expert).mean() + F.softplus(on_policy).mean()  # -log D - log(1-D)
    info = {"disc/loss": loss}
    with torch.no_grad():
        for name, pair in (("expert", expert), ("policy", policy)):
            logit = disc(*pair)  # without noise
            info[f"disc/{name}"] = torch.sigmoid(logit).mean()
            info[f"disc/logit_{name}"] = logit.mean()
    return loss, {**info, "disc/gap": info["disc/expert"] - info["disc/policy"]}

def imitation_reward(disc, s, a, c, sigma=0.0):
    """The discriminator's part of [P10]: log D - log(1-D), which is the logit -> (...)."""
    logit = disc(s, a, sigma)
    return logit if c.reward == "logit" else torch.sigmoid(logit)

def conservative_reward(disc, dream, c):
    """[P10] r_t = log D(s_t,a_t) - log(1-D(s_t,a_t)) - alpha u(s_t,a_t) -> (H, N).
    It is differentiable in states and actions."""
    s, a = state_action_pairs(dream.feat, dream.action)
    sigma = c.sigma if c.reward_noise else 0.0
    return imitation_reward(disc, s, a, c, sigma) - c.alpha * dream.disagreement

# === TD(lambda), critics, actor [W-]-[W9] =========================================================
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
    _, a = state_action_pairs(dream.feat, dream.action)  # (H, N, A)
    q = critics(dream.feat, torch.cat([a, dream.last_action[None]]))  # (m, H+1, N)
    if rule == "random":
        return q[torch.randint(len(q), (1,), device=q.device)].squeeze(0)
    return q.min(0).values

def discounts(gamma, like):
    """g^0, g^1, ... along the first dimension of `like` (H, N) -> (H, 1)."""
    steps = torch.arange(len(like), device=like.device, dtype=like.dtype)
    return (gamma**steps)[:, None]

def actor_loss(critics, dream, reward, c):
    """[W6] without its BC term, with the policy's entropy e; reward (H, N) of [P10]:
    -mean_{t<H} g^t [ l V(s_t) + (1-l) V_0(s_t) + c.entropy e_t ]"""
    value = state_values(critics, dream)  # (H+1, N)
    returns = lambda_return(reward, value, c.gamma, c.lam)  # (H, N)
    objective = c.lam * returns + (1 - c.lam) * value[:-1] + c.entropy * dream.entropy
    weight = discounts(c.gamma, returns) if c.actor_discount else 1.0
    return -(weight * objective).mean(), {
        "reward": reward.mean(), "reward_std": reward.std(), "lambda_return": returns.mean(),
        "entropy": dream.entropy.mean(), "uncertainty": dream.disagreement.mean()}

def clone_loss(actor, feat, action, c):
    """BC on the expert's pairs: feat (L, B, F), action (L, B, A) -> loss."""
    s, a = state_action_pairs(feat, action)
    return negative_log_prob(actor(s.detach()), a, c)

def negative_log_prob(policy, a, c):
    """Mean of -log pi(a|s), weighted by std^2p over its batch mean, p = c.clone_power; for p = 0
    a mean with a large std learns slowly (beta-NLL, Seitzer et al. 2022). a (..., A) -> loss."""
    weight = policy.scale.detach() ** (2 * c.clone_power)
    weight = weight / weight.mean()
    return -(weight * policy.log_probs(a)).sum(-1).mean()

def target_values(target_critics, dream, reward, c):
    """Vbar_0 (H+1, N), Vbar (H, N) [W5] of a dream with rewards (H, N), by target critics."""
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
        value = value.view(action.shape[:2])[1:]  # (L-1, B)
        returns = returns.view(action.shape[:2])[1:]  # (L-1, B)
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
    loss = (critics(s, a) - target).square().mean((1, 2)).sum()  # of (m, L-1, B)
    return loss, {"critic/data": loss}

# === Learner: networks, optimizers, targets; the same for every method ============================

class Optimizer:
    """AdamW for one network, gradients clipped; a non-finite gradient changes nothing."""
    def __init__(self, module, lr, c):
        self.params = list(module.parameters())
        self.clip = c.clip
        self.capturable = self.params[0].is_cuda and c.graph
        self.full_lr, self.lr = lr, torch.tensor(lr, device=self.params[0].device)
        # AdamW multiplies weights by 1 - lr * weight_decay; the method wants 1 - c.weight_decay.
        self.adam = torch.optim.AdamW(
            self.params, self.lr, eps=c.adam_eps, weight_decay=c.weight_decay / lr,
            fused=True, capturable=self.capturable)
        self.skipped = torch.zeros(2, device=self.params[0].device)  # in all, in a row

    def step(self, grads):
        """Update the network once -> the gradient's norm before clipping. No host sync."""
        for param, grad in zip(self.params, grads):
            # The fused kernel goes by memory order: another layout would update other weights.
            param.grad = torch.empty_like(param).copy_(grad)
        norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        bad = (~torch.isfinite(norm)).float()
        # With found_inf the fused kernel skips weights, moments, decay and step count together.
        self.adam.grad_scale, self.adam.found_inf = None, bad
        self.adam.step()
        self.adam.zero_grad()
        self.skipped += bad
        self.skipped[1] *= bad
        return norm

    def state_dict(self):
        return {"adam": self.adam.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state):
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:  # of another device
            group.update(capturable=self.capturable, lr=self.lr.fill_(group["lr"]))
        self.skipped.copy_(state["skipped"])

class Learner(nn.Module):
    """What methods share. A subclass assigns its networks, calls set_up(), and defines
    losses(replay) -> losses, info: the loss of each network to step, by its name, and what to log;
    clone_losses(replay): the same for pretraining, on demonstrations alone;
    act(image, carry, sample): as Agent.act. check(c) may refuse a configuration."""
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.updates = 0
        self.cloning_only = c.reward == "none"  # updates are clone_losses alone
        self.targets = None
        self.recorded = {}  # clone or not -> the step that is being repeated

    def set_up(self, device, targets=None):
        """Initialize each network and its optimizer; targets: a network to copy."""
        initialize(self).to(device)
        self.device, self.optimizers = device, {}
        self.beta = torch.tensor(1.0 * self.c.beta, device=device)  # graphs see it
        for name, network in self.named_children():
            lr = self.c.disc_lr if name == "disc" else self.c.lr
            self.optimizers[name] = Optimizer(network, lr, self.c)
        if targets is not None:
            self.target_source = (targets,)  # else saved twice
            self.targets = copy.deepcopy(targets).requires_grad_(False)

    @staticmethod
    def check(c):
        if c.reward == "none" and not (c.offline and c.beta):
            die("--reward none needs --offline and a --beta above 0")

    def autocast(self):
        """Run convolutions and MLPs in bfloat16; cast their outputs back to float32."""
        cuda = self.device.type == "cuda"
        wanted = self.c.precision == "bfloat16" or (cuda and self.c.precision == "auto")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def update(self, replay, clone=False, progress=0.0):
        """Update once, by losses or clone_losses -> info. progress: the run's, from 0 to 1."""
        if clone not in self.recorded:
            graphed = self.c.graph and self.device.type == "cuda"
            self.recorded = {clone: CudaGraph(self.take_steps) if graphed else self.take_steps}
        rate = min(1, (1 - progress) / self.c.lr_decay) if self.c.lr_decay else 1
        for optimizer in self.optimizers.values():
            optimizer.lr.fill_(optimizer.full_lr * rate)
        self.beta.fill_(self.c.beta * self.c.beta_end**progress)
        info = self.recorded[clone](replay, clone)
        self.updates += 1
        if self.targets is not None and self.updates % self.c.target_every == 0:
            self.move_targets()
        return info

    def take_steps(self, replay, clone):
        """Take the gradient of each network's own loss alone, then step all optimizers."""
        losses, info = self.clone_losses(replay) if clone else self.losses(replay)
        grads = {name: torch.autograd.grad(loss, self.optimizers[name].params)
                 for name, loss in losses.items()}
        for name, grad in grads.items():
            info[f"grad/{name}"] = self.optimizers[name].step(grad)
        return {name: value.detach() for name, value in info.items()}

    def move_targets(self, tau=1.0):
        """Move the targets towards their source by tau; 1 copies it."""
        source, = self.target_source
        for target, new in zip(self.targets.parameters(), source.parameters()):
            target.data.lerp_(new.data, tau)

    def in_env_units(self, action):
        """Scale actions (..., A) from [-1, 1] to the environment's bounds, after load_policy."""
        low, high = self.bounds
        return low + (action + 1) / 2 * (high - low)

    def report(self, replay):
        """Return what to log beside the update's own info."""
        return {"skipped": sum(o.skipped[0] for o in self.optimizers.values())}

    def save(self):
        """Return all that an update changes: tensors (not copies) and plain values only."""
        return {"modules": self.state_dict(), "updates": self.updates,
                "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
                "rng": torch.get_rng_state(), "rng_cuda": torch.cuda.get_rng_state_all()}

    def load(self, state):
        """Restore what save() returned; raise RuntimeError if the networks differ."""
        self.load_state_dict(state["modules"])
        for name, saved in state["optimizers"].items():
            self.optimizers[name].load_state_dict(saved)
        self.updates = state["updates"]
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["rng_cuda"][:torch.cuda.device_count()])
        self.recorded = {}  # a graph would still use the old tensors

# === The agent: acting, and the losses of one update ==============================================
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
        super().__init__(c)
        feat, self.action_size = c.stoch + c.deter, action
        self.critics = Critics(c.critics, feat, action, c.units, c.layers)
        self.world = WorldModel(c, action)
        self.actor = Actor(feat, action, c)
        self.disc = Discriminator(feat, action, c.disc_units, c.disc_layers)
        self.set_up(device, targets=self.critics)

    @torch.no_grad()
    def act(self, image, carry=None, sample=True):
        """Filter a frame and act: image (N, 64, 64, 3) uint8 -> action (N, A) float32, carry.
        Pass carry on; None begins an episode. Without `sample`: modes of latent and action."""
        image, N = torch.as_tensor(image, device=self.device), len(image)
        rssm = self.world.rssm
        with self.autocast():
            if carry is None:
                carry = rssm.initial(N), torch.zeros(N, self.action_size, device=self.device)
            state = rssm.step_post(*carry, self.world.encoder(to_float(image)), sample)
            policy = self.actor(state.feat)
            action = policy.rsample() if sample else policy.mode
        return action.cpu().numpy(), (state, action)

    def clone_losses(self, replay):
        """Pretraining: world model and cloning on its latents -> losses, info."""
        c = self.c
        image, action = replay.sample(c.batch, demo_share=1)  # (L, B, ...)
        image = to_float(image)
        with self.autocast():
            post = self.world.rssm.observe(self.world.encoder(image), action)
            world_loss, info = world_model_loss(self.world, image, post, c)  # [P1]
            bc_loss = clone_loss(self.actor, post.feat.detach(), action, c)
        losses = {"world": world_loss}
        if c.beta:  # vmail, dgail and ditto never clone
            losses["actor"] = bc_loss
        return losses, {**info, "bc": bc_loss}

    def losses(self, replay):
        """The losses of one update, the body of the ALGORITHM -> losses, info (0-d tensors).
        No shape and no branch depends on a tensor's value: a CUDA graph can record it."""
        c, world, B = self.c, self.world, self.c.batch
        image, action = replay.sample(B, c.demo_share)  # (L, B, ...)
        expert_image, expert_action = replay.sample(B, demo_share=1)  # (L, B, ...)
        image, expert_image = to_float(image), to_float(expert_image)  # (L, B, 3, 64, 64)
        with self.autocast():
            # World model: one scan over both batches, trained on the replay's.
            embed = world.encoder(image)
            with torch.no_grad():
                expert_embed = world.encoder(expert_image)
            both = torch.cat([embed, expert_embed], 1), torch.cat([action, expert_action], 1)
            post = world.rssm.observe(*both)  # State (L, 2B, ...)
            replay_post = post.map(lambda x: x[:, :B])
            world_loss, info = world_model_loss(world, image, replay_post, c)  # [P1]

            # Data from here on: the model's states without its graph.
            feat, expert_feat = post.feat.detach()[:, :B], post.feat.detach()[:, B:]

            # Imagine H steps from every replayed posterior: N = L B rollouts.
            start = replay_post.map(lambda x: x.detach().flatten(0, 1))
            dream = imagine(world.rssm, self.actor, start, action.flatten(0, 1), c.horizon)

            # Discriminator: the expert's pairs against imagined pairs.
            expert = state_action_pairs(expert_feat, expert_action)
            policy = state_action_pairs(dream.feat.detach(), dream.action.detach())
            disc_loss, disc_info = discriminator_loss(self.disc, expert, policy, c.sigma)  # [P8]

            # The reward of every imagined pair: D's logit, minus the ensemble's disagreement.
            reward = conservative_reward(self.disc, dream, c)  # (H, N) [P9] [P10]

            # Critics and actor: towards TD(lambda) of the rewards, and near the demonstrations.
            q_loss, q_info = self.critic_losses(dream, reward, feat, action)  # [W9]
            pi_loss, pi_info = actor_loss(self.critics, dream, reward, c)  # [W6]
            bc_loss = clone_loss(self.actor, expert_feat, expert_action, c)
        losses = {"world": world_loss, "disc": disc_loss, "critics": q_loss,
                  "actor": pi_loss + self.beta * bc_loss}
        return losses, {**info, **disc_info, **q_info, **pi_info, "bc": bc_loss}

    def critic_losses(self, dream, reward, feat, action):
        """[W9]: imagined and real pairs, each towards TD(lambda) of the target critics."""
        c = self.c
        value, returns = target_values(self.targets, dream, reward, c)  # (H+1, N), (H, N)
        loss, info = model_critic_loss(self.critics, returns, dream, c)  # [W7]
        if c.data_critic:
            target = data_target(self.disc, value[0], returns[0], feat, action, c)
            data_loss, data_info = data_critic_loss(self.critics, target, feat, action)  # [W8]
            loss, info = loss + data_loss, {**info, **data_info}
        return loss, info

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
            feats.append(state.feat)
            spreads.append(spread)
        feat = torch.cat([post.feat, torch.stack(feats)])
        return to_uint8(self.world.decoder(feat)), torch.stack(spreads)

    def report(self, replay):
        """Add [P9] along the expert's actions, after five frames ([C]: after any)."""
        with self.autocast():
            _, spread = self.open_loop(*replay.sample(self.c.batch, demo_share=1))
        return {**super().report(replay), "uncertainty_expert": spread.mean()}

METHODS = {  # name -> (class, fields it overrides); baselines.py adds methods
    "cmil": (Agent, {}),
    "vmail": (Agent, dict(members=1, alpha=0.0, beta=0.0, seed_steps=0)),
    "dgail": (Agent, dict(members=1, alpha=0.0, beta=0.0, offline=True,
                          sample_grad="released", entropy=0.03, lr_decay=0.5)),
    "dbc": (Agent, dict(reward="none", offline=True)),
}

# === Replay =======================================================================================

class Replay:
    """All episodes, demos first, in stored order, allocated on the learner's device.
    `start_rows` lists the rows where a window fits into one episode. Counts are tensors, so that
    a CUDA graph sees them change."""
    def __init__(self, capacity, length, action, device):
        self.length = length
        self.rows, self.windows = 0, 0
        self.image = torch.full((capacity, 64, 64, 3), 0, dtype=torch.uint8, device=device)
        self.action = torch.empty(capacity, action, device=device)
        self.start_rows = torch.empty(capacity, dtype=torch.long, device=device)
        self.n_starts = torch.zeros((), dtype=torch.long, device=device)
        self.n_demo_starts = torch.zeros_like(self.n_starts)
        self.offset = torch.arange(length, device=device)[:, None]  # (L, 1)

    def add(self, image, action, demo=False):
        """Add an episode: image uint8 (T+1, 64, 64, 3), action (T+1, A). Demos come first."""
        device, end = self.image.device, self.rows + len(image)
        starts = torch.arange(self.rows, end - self.length + 1, device=device)
        self.image[self.rows:end] = torch.as_tensor(image, device=device)
        self.action[self.rows:end] = torch.as_tensor(action, device=device)
        self.start_rows[self.windows:self.windows + len(starts)] = starts
        self.rows, self.windows = end, self.windows + len(starts)
        self.n_starts.fill_(self.windows)
        if demo:
            self.n_demo_starts.fill_(self.windows)

    def draw(self, first, end, batch):
        """Draw windows from start numbers `first` to `end` - 1 (tensors, 0-d or (batch,))."""
        u = torch.rand(batch, device=self.start_rows.device)
        index = torch.minimum(first + (u * (end - first)).long(), end - 1)  # if rounded up
        rows = self.start_rows[index] + self.offset  # (L, batch)
        return self.image[rows], self.action[rows]

    def sample(self, batch, demo_share=0.0):
        """Windows of everything, but the first demo_share * batch of the demos alone
        -> image uint8 (L, batch, 64, 64, 3), action (L, batch, A)"""
        end = self.n_starts.repeat(batch)
        end[:round(demo_share * batch)] = self.n_demo_starts
        return self.draw(0, end, batch)

# === Training loop: lockstep rounds ===============================================================

class Stop(Exception):
    """A signal or --minutes ends the run."""

class Trainer:
    """Train in rounds: one episode per environment, and the updates due. Each round ends with a
    checkpoint, so that a resumed run equals one that was never stopped."""
    def __init__(self, c):
        self.c, self.folder = c, Path(c.logdir)
        device = setup_torch(c)
        demos = demonstrations.load_demos(
            c.demos, c.env, c.num_demos, min_steps=c.length - 1, **env_options(c))
        torch.manual_seed(c.seed)
        self.vec = envs.make_vec(c.env, c.num_envs, **env_options(c))
        self.env_info = envs.env_info(self.vec)
        self.agent = METHODS[c.algo][0](c, self.env_info["action_dim"], device)
        self.T = self.env_info["episode_steps"]
        self.per_round = c.num_envs * self.T  # environment steps
        self.rounds = math.ceil(c.steps / self.per_round)
        self.seed_steps = math.ceil(c.seed_steps / self.per_round) * self.per_round
        self.round, self.steps_in_round = 0, 0
        self.last_eval = -1  # the last evaluation's step; -1: none
        self.began = self.clock = time.monotonic()  # this process, the run
        self.stop_reason, self.progress = "", Progress()
        played = 0 if c.offline else self.rounds * c.num_envs  # episodes
        rows = sum(len(demo["image"]) for demo in demos) + played * (self.T + 1)
        self.replay = Replay(rows, c.length, self.env_info["action_dim"], self.agent.device)
        for demo in demos:
            self.replay.add(demo["image"], demo["action"], demo=True)
        self.demos_crc = zlib.crc32(self.replay.action[:self.replay.rows].cpu().numpy())
        self.metrics = open_log(self.folder / "metrics.jsonl")
        self.resume()
        write_config(c, {**provenance(), **self.env_info, "update": self.agent.updates})
        if self.agent.updates == 0:
            self.checkpoint()  # a new run's first
        say(f"{c.algo} on {c.env}, preset {c.preset}, {self.agent.device}, {self.folder}: "
            f"step {self.step}, update {self.agent.updates}")

    def run(self):
        """Train to the end or to a stop -> True if the run is complete."""
        signals = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
        handlers = [signal.signal(number, self.on_signal) for number in signals]
        try:
            self.pretrain()
            self.evaluate_if_due()
            while self.round < self.rounds:
                self.with_workers(self.learn_offline if self.c.offline else self.play_round)
                self.round, self.steps_in_round = self.round + 1, 0
                self.checkpoint()  # a resumed run begins here
                self.evaluate_if_due()
            say(f"done: {self.folder}; next: python {sys.argv[0]} --eval {self.folder}")
            return True
        except Stop:
            say(f"stopped ({self.stop_reason}) at step {self.step}: the same command resumes")
            return False
        finally:
            envs.close(self.vec)
            self.metrics.close()
            for number, handler in zip(signals, handlers):
                signal.signal(number, handler)

    @property
    def step(self):
        """Environment steps so far; offline: those of an online run with as many updates."""
        return self.round * self.per_round + self.steps_in_round

    def updates_due(self, step):
        """Updates due by a step: `pretrain`, then `train_ratio` per step after seed rounds."""
        learning = max(0, step - self.seed_steps)
        return self.c.pretrain + int(learning * self.c.train_ratio + 1e-6)

    def pretrain(self):
        """Make the first updates, of world model and clone, on the demonstrations alone."""
        while self.agent.updates < self.c.pretrain:
            self.update(clone=True)
            self.progress.show("pretraining", self.agent.updates, self.c.pretrain)
            if self.agent.updates % self.c.log_every == 0:
                self.checkpoint()
            self.check_stop()
        self.checkpoint()

    def play_round(self):
        """Play an episode in every environment, in lockstep, and make the updates due."""
        N, T, A = self.c.num_envs, self.T, self.env_info["action_dim"]
        images = np.zeros((T + 1, N, 64, 64, 3), np.uint8)
        actions = np.zeros((T + 1, N, A), np.float32)  # actions[t] led to images[t]
        images[0], _ = self.vec.reset(seed=env_seeds(self.c.seed, TRAIN, self.round * N, N))
        carry = None
        for t in range(T):
            actions[t + 1], carry = self.agent.act(images[t], carry)
            self.vec.step_async(actions[t + 1])
            self.steps_in_round += N
            self.learn()
            images[t + 1], _, _, _, info = self.vec.step_wait(timeout=300)
            actions[t + 1][info["padded"]] = 0  # the episode was over
        self.log({f"train/{name}": x.mean() for name, x in task_metrics(info).items()})
        for i in range(N):
            self.replay.add(images[:, i], actions[:, i])
            write_episode(self.folder, self.round, i, images[:, i], actions[:, i])

    def learn_offline(self):
        """Make the updates of a round, and play no episode."""
        for _ in range(self.T):
            self.steps_in_round += self.c.num_envs
            self.learn()

    def learn(self):
        """Make the updates that are due."""
        due = self.updates_due(self.step)
        while self.agent.updates < due:
            self.update(self.agent.cloning_only)
        seeding = self.step < self.seed_steps
        total = self.seed_steps if seeding else self.rounds * self.per_round
        self.progress.show("seed rounds" if seeding else "training", self.step, total)
        self.check_stop()

    def update(self, clone):
        """Make one update, and at log steps write its metrics."""
        progress = self.agent.updates / self.updates_due(self.rounds * self.per_round)
        info = self.agent.update(self.replay, clone, progress)
        if self.agent.updates % self.c.log_every == 0:
            with torch.random.fork_rng():  # logging changes no update
                self.log({**info, **self.agent.report(self.replay)})
        for name, optimizer in self.agent.optimizers.items():
            if self.agent.updates % 10 == 0 and optimizer.skipped[1] >= 10:
                die(f"ten non-finite {name} gradients in a row; begin anew with a lower --lr")

    def evaluate_if_due(self):
        """Evaluate after pretraining, every `eval_every` steps, and at the end."""
        every, last = self.c.eval_every, self.last_eval
        at_end = self.round == self.rounds and last < self.step
        if last < 0 or at_end or self.step // every > last // every:
            self.with_workers(self.evaluate)
            self.last_eval = self.step
            self.checkpoint()

    def evaluate(self):
        """Log eval/*: modes of policy and latent, on seeds used for nothing else."""
        results, video = rollouts(
            self.agent, self.vec, self.T, self.c.eval_episodes, self.c.seed, EVALUATE,
            sample=False, progress=self.progress, check_stop=self.check_stop)
        means = {f"eval/{name}": float(value.mean()) for name, value in results.items()}
        self.log(means)
        text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        say(f"step {self.step} evaluation: {text}")
        write_gif(self.folder / f"videos/eval-{self.step:07d}.gif", video, self.vec)

    def with_workers(self, job):
        """Run job(). If an environment's process dies, go back and repeat with new ones."""
        for _ in range(4):
            try:
                return job()
            except envs.WORKER_GONE as error:
                self.check_stop()  # signals reach workers too
                if self.c.num_envs == 1:
                    raise  # its own error
                codes = [process.exitcode for process in self.vec.processes]
                say(f"an environment's process died ({error!r}; exit codes {codes})")
                envs.close(self.vec)
                self.vec = envs.make_vec(self.c.env, self.c.num_envs, **env_options(self.c))
                self.go_back()
        die("environments died four times; begin anew with fewer --num-envs")

    def on_signal(self, number, _):
        """Ask for a stop. A second signal ends the process at once; checkpoints are safe."""
        if self.stop_reason:
            os._exit(128 + number)
        self.stop_reason = signal.Signals(number).name

    def check_stop(self):
        """Raise Stop if a signal or --minutes asked for it."""
        if self.c.minutes and time.monotonic() - self.began > 60 * self.c.minutes:
            self.stop_reason = self.stop_reason or f"--minutes {self.c.minutes:g}"
        if self.stop_reason:
            raise Stop

    def checkpoint(self):
        """Write the state, after the metrics; keep the previous checkpoint."""
        state = {"agent": self.agent.save(), "round": self.round, "last_eval": self.last_eval,
                 "seconds": time.monotonic() - self.clock, "demos": self.demos_crc,
                 "metrics_bytes": self.metrics.tell()}
        os.fsync(self.metrics.fileno())
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(state, file),
                         previous=self.folder / "checkpoint.prev.pt")

    def go_back(self):
        """Return to the last checkpoint -> its contents, or None."""
        state = load_checkpoint(self.folder, self.agent)
        if state is not None:
            if "round" not in state:
                die(f"{self.folder} has weights alone, for --eval; give another --logdir")
            os.replace(state["path"], self.folder / "checkpoint.pt")
            self.round, self.steps_in_round = state["round"], 0
            self.last_eval = state["last_eval"]
            cut_log(self.metrics, state["metrics_bytes"])
        return state

    def resume(self):
        """Continue the folder's run, if there is one."""
        state = self.go_back()
        if state is None and self.metrics.tell():
            die(f"{self.folder} has metrics but no checkpoint; give another --logdir")
        if state is None:
            return
        self.clock -= state["seconds"]
        if state["demos"] != self.demos_crc:
            die(f"--demos {self.c.demos}: {self.folder} has other demonstrations; use those")
        if self.round > self.rounds:
            die(f"--steps {self.c.steps}: {self.folder} has made {self.step}; give more")
        for number in range(0 if self.c.offline else self.round):
            for worker in range(self.c.num_envs):
                self.replay.add(*read_episode(self.folder, number, worker))

    def log(self, values):
        """Write a line of metrics.jsonl. experiments/README.md explains every name."""
        line = {"step": self.step, "update": self.agent.updates,
                "time": time.monotonic() - self.clock}
        line.update({name: float(value) for name, value in values.items()})
        print(json.dumps(line), file=self.metrics, flush=True)

class Progress:
    """Print a phase, its speed and the time left, every ten seconds."""
    phase = ""

    def show(self, phase, done, total):
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.first = phase, done
            self.start = self.shown = now
        if now - self.shown >= 10 and done > self.first:
            self.shown, rate = now, (done - self.first) / (now - self.start)
            left = f"{(total - done) / rate / 60:.0f} minutes left"
            say(f"{phase} {done}/{total}, {rate:.2g} a second, {left}", sys.stderr)

# Disjoint streams of environment seeds: training, evaluation while training, --eval.
TRAIN, EVALUATE, FINAL = 1, 2, 3

def env_seeds(seed, stream, first, count):
    """Return the reset seeds of episodes first .. first + count - 1 of a stream."""
    numbers = np.random.SeedSequence([seed, stream]).generate_state(first + count)
    return (numbers[first:] >> 1).tolist()

def env_options(c):
    """Return the config's options for make_env; None: the environment's own."""
    names = "tasks", "episode_steps", "robot_noise_ratio"
    return {name: getattr(c, name) or None for name in names}

def task_metrics(info):
    """Return success and the task's measures `log/<name>` of an episode's last info."""
    names = ["success", *(name for name in info if name.startswith("log/"))]
    return {name.removeprefix("log/"): np.array(info[name], float) for name in names}

def rollouts(agent, vec, steps, episodes, seed, stream, sample, progress, check_stop=lambda: None):
    """Run `episodes` episodes of `steps` steps in `vec` -> dict of success, return and the task's
    measures, arrays (episodes,); video (steps+1, 64, 64, 3) uint8 of the first episode."""
    results, video, N = {}, [], vec.num_envs
    with torch.random.fork_rng():
        for done in range(0, episodes, N):
            seeds = env_seeds(seed, stream, done, N)
            image, _ = vec.reset(seed=seeds)
            carry, total, first = [None] * N, np.zeros(N), [image[0].copy()]
            action = np.zeros(vec.action_space.shape, np.float32)
            for t in range(steps):
                for i in range(N):  # an episode must not depend on --num-envs
                    torch.manual_seed(seeds[i] + t)
                    action[i], carry[i] = agent.act(image[i:i + 1], carry[i], sample)
                vec.step_async(action)
                image, reward, _, _, info = vec.step_wait(timeout=300)
                total += reward
                first.append(image[0].copy())
                check_stop()
            progress.show("evaluating", min(done + N, episodes), episodes)
            video = video or first
            for name, value in {**task_metrics(info), "return": total}.items():
                results.setdefault(name, []).extend(value)
    return {name: np.array(x[:episodes]) for name, x in results.items()}, np.stack(video)

# === Run folder: config.json, metrics.jsonl, checkpoint.pt, episodes/, videos/ ====================

def open_log(path):
    """Open a run's log for appending, and lock it: one process writes at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"{path} is in use by another process; give another --logdir")
    except OSError:
        pass  # no locks here
    return file

def cut_log(file, size):
    """Shorten an open log to `size` bytes, or to its last whole line before that."""
    data = Path(file.name).read_bytes()[:size]
    file.seek(file.truncate(data.rfind(b"\n") + 1))

def write_config(c, facts):
    """Write config.json; a resumed run keeps its first facts and adds today's to `resumed`."""
    path = Path(c.logdir) / "config.json"
    if path.exists():
        first = json.loads(path.read_text())
        facts = {**first, "resumed": [*first.get("resumed", []), facts]}
    text = json.dumps({**facts, "config": dataclasses.asdict(c)}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))

def provenance():
    """Return what a run depends on beside its config: command, commit, versions, hardware."""
    facts = {"command": " ".join(["python", *sys.argv]), "commit": "", "versions": {},
             "python": sys.version.split()[0], "threads": torch.get_num_threads(),
             "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError):  # no git here
        facts["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    for name in ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics"):
        with suppress(metadata.PackageNotFoundError):
            facts["versions"][name] = metadata.version(name)
    return facts

def write_atomically(path, write, previous=None):
    """Call write(file) on a temporary file, sync it, and rename it to `path`.
    `previous`: the new name for the file that it replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)

def write_episode(folder, number, worker, image, action):
    """Write an episode: image (T+1, 64, 64, 3) uint8, action (T+1, A) float32."""
    path = folder / f"episodes/r{number:06d}-w{worker}.npz"
    write_atomically(path, lambda file: np.savez_compressed(file, image=image, action=action))

def read_episode(folder, number, worker):
    """Read image and action of an episode."""
    path = folder / f"episodes/r{number:06d}-w{worker}.npz"
    try:
        with np.load(path) as file:
            return file["image"], file["action"]
    except Exception as error:  # of many kinds
        die(f"{path} cannot be read ({error}); restore it or begin anew")

def write_gif(path, frames, vec, scale=4):
    """Write frames uint8 (T, 64, 64, 3) as a looping GIF at `vec`'s rate, enlarged."""
    import imageio
    large = list(frames.repeat(scale, 1).repeat(scale, 2))
    pace = {"duration": 1000 / vec.metadata["render_fps"], "loop": 0}
    write_atomically(path, lambda file: imageio.mimsave(file, large, format="GIF", **pace))

def load_checkpoint(folder, agent):
    """Load a run's newest readable checkpoint into the agent -> its contents; None: it has none."""
    paths = [folder / "checkpoint.pt", folder / "checkpoint.prev.pt"]
    for path in filter(Path.exists, paths):
        try:
            if zipfile.ZipFile(path).testzip():  # torch.load misses bit flips
                raise ValueError("checksum")
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, MemoryError):
            raise  # the file itself may be good
        except Exception as error:
            say(f"{path} cannot be read ({type(error).__name__})", sys.stderr)
        else:
            agent.load(state["agent"])
            return {**state, "path": path}
    if any(map(Path.exists, paths)):
        die(f"{path} cannot be read; restore it, or give another folder")

# === Speed: CUDA graph and memory; skip at first reading ==========================================

class CudaGraph:
    """step(replay, clone), recorded as a CUDA graph and then replayed: one launch, not thousands.
    The first calls run normally: they are real steps, and create what recording needs. Recording
    computes nothing. A replayed step overwrites what the last one returned."""
    def __init__(self, step, warm_up=3):
        self.step, self.calls_left, self.graph = step, warm_up, None
        self.stream = torch.cuda.Stream()

    def __call__(self, replay, clone):
        if self.graph is None and self.calls_left == 0:
            self.record(replay, clone)
        if self.graph:
            assert replay is self.replay  # its memory is part of the recording
            self.graph.replay()
            return self.info
        self.calls_left -= 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            info = self.step(replay, clone)
        torch.cuda.current_stream().wait_stream(self.stream)
        return info

    def record(self, replay, clone):
        self.graph, self.replay = torch.cuda.CUDAGraph(), replay
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.info = self.step(replay, clone)
        except RuntimeError as error:
            cause = str(error.__context__ or error).splitlines()[0]
            die(f"no CUDA graph of an update ({cause}); use --no-graph")

def setup_torch(c):
    """Set device, threads and number formats of this process -> torch.device."""
    device = torch.device("cuda" if torch.cuda.is_available() and c.device != "cpu" else "cpu")
    if c.device == "cuda" != device.type:
        die("--device cuda: no CUDA device here; use --device cpu")
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device

# === Command line =================================================================================

def parse(argv):
    """Parse argv -> (dict of the config fields given, namespace of the other options)."""
    parser = argparse.ArgumentParser(
        prog="cmil.py", allow_abbrev=False,
        description=__doc__.split("\n")[0] + " Defaults: --preset paper.")
    path = os.path.expanduser
    parser.error = lambda message: die(f"{message}; see --help")
    parser.add_argument("--eval", metavar="RUN", type=path, help="evaluate a run")
    parser.add_argument("--episodes", type=int, default=100, help="of --eval (100)")
    parser.add_argument("--video", metavar="FILE.gif", type=path, help="film of --eval")
    for field in dataclasses.fields(Config):
        kind = type(field.default)
        kind = {"type": path if kind is str else kind, "metavar": "X"}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        about = f"{field.metadata['help']} (default: {field.default})"
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=about, **kind)
    args = vars(parser.parse_args(argv))
    explicit = {f.name: args.pop(f.name) for f in dataclasses.fields(Config) if f.name in args}
    return explicit, argparse.Namespace(**args)

def flag(name):  # of a field
    return "--" + name.replace("_", "-")

def make_config(explicit):
    """Return the config of the run in logdir or, for a new one, defaults < preset < environment
    < method; explicit flags win. Refuse what a resumed run cannot change."""
    c = Config(**explicit)
    check_config(c)
    name = f"{c.env}-{c.algo}-s{c.seed}".replace("/", "-").replace(":", "-")
    logdir = c.logdir or f"runs/{name}"
    stored = (read_config(logdir) or {}).get("config")
    if stored is None:
        cuda = torch.cuda.is_available() and c.device != "cpu"
        preset = c.preset if c.preset != "auto" else "paper" if cuda else "small"
        base = {**PRESETS[preset], **ENV_PRESETS.get((c.env, preset), {}), **METHODS[c.algo][1],
                "preset": preset}
        if c.tasks:
            base.pop("episode_steps", None)  # the preset's is for all tasks
    else:
        base = {**stored, "minutes": 0.0}
    if c.preset == "auto":
        explicit = {**explicit, "preset": base["preset"]}
    for name, value in explicit.items():
        if stored and name not in RESUME_MAY_CHANGE and value != stored[name]:
            change = f"{flag(name)} {value} (the run's: {stored[name]})"
            die(f"{logdir}: cannot change {change}; give another --logdir")
    c = Config(**{**base, **explicit, "logdir": str(logdir)})
    check_config(c)
    METHODS[c.algo][0].check(c)
    return c

def read_config(run):
    """Return a run's config.json, with its config checked; None if there is none."""
    path = Path(run) / "config.json"
    if not path.exists():
        if path.with_name("checkpoint.pt").exists():
            die(f"{path} is missing: restore it")
        return None
    try:
        stored = json.loads(path.read_text())
        c = Config(**stored["config"])
        check_config(c)
    except (ValueError, KeyError, TypeError):
        die(f"{path} is damaged or of another version; give another folder")
    return {**stored, "config": dataclasses.asdict(c)}

def check_config(c):
    """Refuse an unknown method, and values outside their limits (NaN too), in one line."""
    if c.algo not in METHODS:
        die(f"--algo {c.algo}: give {', '.join(METHODS)}, or see experiments/baselines.py")
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        for name, limit in field.metadata["limits"].items():
            if not LIMITS[name](value, limit):
                die(f"{flag(field.name)} {value}: expected {name.replace('_', ' ')} {limit}")

def load_policy(run, **changes):
    """Load a run's trained agent; torch and numpy suffice. changes: fields of EVAL_MAY_CHANGE.
        action, carry = agent.act(image[None], carry, sample=False)  # carry: None at the start
        action = agent.in_env_units(action[0])  # before: in [-1, 1]"""
    stored = read_config(run)
    if stored is None:
        die(f"{run}: no config.json there; give the folder of a run")
    for name in set(changes) - set(EVAL_MAY_CHANGE):
        die(f"{flag(name)} belongs to training: --eval cannot change it")
    c = Config(**{**stored["config"], "logdir": str(run), **changes})
    check_config(c)
    agent = METHODS[c.algo][0](c, stored["action_dim"], setup_torch(c))
    agent.bounds = np.array(stored["action_low"]), np.array(stored["action_high"])
    if load_checkpoint(Path(run), agent) is None:
        die(f"{run} has no checkpoint.pt yet; train it first")
    return agent

def evaluate_run(run, episodes, video, changes):
    """--eval: one JSON line, on environment seeds that training and its evaluations never use."""
    if episodes < 1 or not (video or ".gif").endswith(".gif"):
        die("--episodes takes a number above 0, --video a .gif file")
    agent = load_policy(run, **changes)
    c = agent.c
    vec = envs.make_vec(c.env, c.num_envs, **env_options(c))
    T = envs.env_info(vec)["episode_steps"]
    report = {"episodes": episodes, "seed": c.seed, "update": agent.updates}
    for name, sample in (("modes", False), ("sampled", True)):
        results, frames = rollouts(agent, vec, T, episodes, c.seed, FINAL, sample, Progress())
        report[name] = {key: float(value.mean()) for key, value in results.items()}
        report[name]["success_ci95"] = bootstrap_ci(results["success"])
        if video and not sample:
            write_gif(Path(video), frames, vec)
    envs.close(vec)
    print(json.dumps(report))

def main(argv=None):
    explicit, args = parse(argv)
    import envs  # a clear error without gymnasium
    if argv is None:  # a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before run()
    try:
        if args.eval is None:
            Trainer(make_config(explicit)).run()
        else:
            evaluate_run(args.eval, args.episodes, args.video, explicit)
    except envs.UserError as error:
        die(error)

if __name__ == "__main__":
    main()
