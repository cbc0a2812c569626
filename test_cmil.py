"""Tests of cmil.py, envs.py and the experiments, in the order of cmil.py.

Numbers are compared with something INDEPENDENT of the code: sums in float64, integrals on a grid,
or examples worked by hand. Simple functions, different in every argument, may replace networks.
"""
import ast
import contextlib
import copy
import dataclasses
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from pytest import approx
from torch import nn

import cmil
import demonstrations
import envs
from experiments import baselines, bench, figures, sweep

HERE = Path(cmil.__file__).resolve().parent
CPU = torch.device("cpu")
torch.set_num_threads(1)
sys.path.append(str(HERE / "demos"))

# === Tools ========================================================================================

@pytest.fixture(autouse=True)
def fixed_start():
    torch.manual_seed(0)

def config(**changes):
    base = dict(preset="debug", env="point", device="cpu", threads=1, num_envs=1)
    return cmil.Config(**{**cmil.PRESETS["debug"], **base, **changes})

def agent_and_replay(algo="cmil", **changes):
    """A small agent with A = 2 and a replay of random episodes: 2 demos, 2 others, of 20 steps."""
    kind, own = cmil.METHODS[algo]
    c = config(algo=algo, **{**own, **changes})
    agent = kind(c, 2, cmil.setup_torch(c))
    replay = cmil.Replay(126, c.length, 2, agent.device)
    rng = np.random.default_rng(0)
    for i in range(4):
        action = rng.uniform(-1, 1, (21, 2)).astype(np.float32)
        action[0] = 0
        replay.add(rng.integers(0, 256, (21, 64, 64, 3), np.uint8), action, demo=i < 2)
    return agent, replay

def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def calls_of(monkeypatch, owner, name, replacement=None):
    """Record the calls of owner.name -> list of (arguments, result)."""
    function, calls = replacement or getattr(owner, name), []
    def recorded(*args, **options):
        calls.append(((*args, *options.values()), function(*args, **options)))
        return calls[-1][1]
    monkeypatch.setattr(owner, name, recorded)
    return calls

def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))

def sigmoid(x):
    return 1 / (1 + np.exp(-x))

def numbers(x):
    return np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64)

def near(got, want, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(numbers(got), numbers(want), rtol, atol)

def integral(y, x):
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()

def linear(layer, x):
    return x @ numbers(layer.weight).T + numbers(layer.bias)

def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)

def randomize(module):
    """Give every parameter (the biases, which begin at zero, too) a random value."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module

# === House style ==================================================================================

def golf(node):
    """Whether a node of a syntax tree saves a line at the reader's cost."""
    match node:
        case (ast.NamedExpr() | ast.Expr(value=ast.Tuple())
              | ast.For(iter=ast.IfExp()) | ast.comprehension(iter=ast.IfExp())):
            return True
        case ast.Lambda():
            return node.end_lineno > node.lineno
        case ast.BinOp(op=ast.Mult()):
            sides = [node.left, node.right]
            text = any(isinstance(getattr(side, "value", 0), str) for side in sides)
            return text and any(isinstance(side, (ast.Compare, ast.BoolOp)) for side in sides)
    return False

def test_house_style():
    for code in ("f(), g()", "for x in (a if b else c): pass", "'s' * (a > b)", "f(x := 1)",
                 "sorted(x, key=lambda y: (\n y))"):
        assert any(map(golf, ast.walk(ast.parse(code)))), code
    budget = {"cmil.py": 1500, "envs.py": 720, "demonstrations.py": 240, "test_cmil.py": 2600,
              "README.md": 120, "experiments/README.md": 160}
    length = {name: len((HERE / name).read_text().splitlines()) for name in budget}
    assert not [name for name in budget if length[name] > budget[name]], length
    experiments = list(HERE.glob("experiments/*.py"))
    assert sum(len(path.read_text().splitlines()) for path in experiments) <= 700
    for path in [*HERE.glob("*.py"), *HERE.glob("demos/*.py"), *experiments]:
        comments, text = set(), path.read_text()
        for node in ast.walk(ast.parse(text)):
            assert not golf(node), f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", 0), str):
                comments.update(range(node.lineno, node.end_lineno + 1))
            if path.name == "cmil.py" and isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, node.name
        lines = [line for i, line in enumerate(text.splitlines(), 1) if i not in comments]
        widths = [len(line) for line in lines if line.strip() and line.strip()[0] != "#"]
        assert sum(width >= 90 for width in widths) < len(widths) / 10, path.name
        assert path.name != "cmil.py" or np.mean(widths) <= 52

# === Configuration ================================================================================

def test_every_field_of_the_config_is_read():
    """Each is read as c.x or self.c.x (oracle: the AST)."""
    read = set(cmil.env_options(cmil.Config()))
    for node in ast.walk(ast.parse((HERE / "cmil.py").read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            if owner == "c":
                read.add(node.attr)
    assert not {field.name for field in dataclasses.fields(cmil.Config)} - read

def test_paper_preset_has_the_papers_values():
    expected = dict(
        alpha=10, beta=10, gamma=0.99, lam=0.95, entropy=1e-4, horizon=15, batch=32, length=50,
        members=10, critics=2, stoch=360, deter=400, hidden=400, units=400, layers=4,
        disc_units=200, disc_layers=2, conv_depth=48, lr=3e-4, disc_lr=3e-4, adam_eps=1e-5,
        clip=100, weight_decay=1e-6, target_every=100, train_ratio=0.4, num_envs=5, pretrain=1000,
        seed_steps=5000, steps=250_000, free_nats=1, kl_balance=0.8, reward="logit", target="min",
        reward_noise=False, data_critic=True, actor_discount=True, critic_discount=True,
        offline=False, demo_share=0)
    assert {key: getattr(cmil.Config(), key) for key in expected} == expected
    assert cmil.Config().sigma ** 2 == approx(2.5) and cmil.PRESETS["paper"] == {}

def test_precedence_of_the_config(tmp_path):
    """Defaults < preset < environment < method < flags (oracle: the tables, one of each)."""
    small, base = cmil.ENV_PRESETS["kitchen", "small"], {"logdir": str(tmp_path / "run")}
    c = cmil.make_config({**base, "env": "kitchen", "preset": "small", "algo": "dbc", "units": 99})
    assert c.members == cmil.PRESETS["small"]["members"] and c.units == 99 and c.lam == 0.95
    assert (c.episode_steps, c.batch) == (small["episode_steps"], small["batch"])
    assert c.offline and c.reward == "none" and c.algo == "dbc"
    c = cmil.make_config({**base, "algo": "vmail", "preset": "debug", "members": 4})
    assert c.members == 4 and c.alpha == 0 and c.episode_steps == 0
    c = cmil.make_config({**base, "tasks": "kettle", "preset": "small"})
    assert c.episode_steps == 0 and c.steps == small["steps"]

# === Helpers and distributions ====================================================================

def test_images_to_floats_and_back():
    image = torch.arange(256, dtype=torch.uint8).repeat(48).view(1, 64, 64, 3)
    x = cmil.to_float(image)
    near(x, image.numpy().transpose(0, 3, 1, 2) / 255 - 0.5, rtol=0, atol=1e-6)
    assert torch.equal(cmil.to_uint8(x), image)
    assert cmil.to_uint8(torch.full((3, 64, 64), 9.0)).unique().tolist() == [255]

def test_bootstrap_ci():
    interval = cmil.bootstrap_ci(np.arange(400) % 2)  # a coin: near the normal approximation
    assert interval == approx((0.5 - 1.96 * 0.5 / 20, 0.5 + 1.96 * 0.5 / 20), abs=0.01)
    assert cmil.bootstrap_ci([0.25] * 5) == (0.25, 0.25)

def test_kl_normal_against_an_integral():
    x, expected = np.linspace(-30, 30, 200_001), 0
    def log_density(mean, std):
        return -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    p, q = [(0.0, 1.0), (1.5, 0.3)], [(0.5, 2.0), (1.0, 1.1)]
    for first, second in zip(p, q):
        log_p, log_q = log_density(*first), log_density(*second)
        expected += integral(np.exp(log_p) * (log_p - log_q), x)
    p, q = torch.tensor(p).T, torch.tensor(q).T
    assert cmil.kl_normal(*p, *q).item() == approx(expected, rel=1e-5)
    assert cmil.kl_normal(*p, *p).item() == approx(0, abs=1e-6)

@pytest.mark.parametrize("loc, scale", [
    (0.0, 0.1), (0.3, 0.5), (-0.999, 0.3), (0.9, 0.1), (0.3, 2.1), (1.0, 2.1), (-1.0, 0.1)])
def test_truncated_normal_against_integrals(loc, scale):
    """log_probs (also at +-1), entropy, mode of A = 2; samples by Kolmogorov-Smirnov, at 1e-6."""
    x, n = np.linspace(-1, 1, 400_001), 200_000
    p, q = (np.exp(-0.5 * ((x - m) / std) ** 2) for m, std in ((loc, scale), (-0.5, 0.2)))
    p, q = p / integral(p, x), q / integral(q, x)
    policy = cmil.TruncatedNormal(torch.tensor([loc, -0.5]), torch.tensor([scale, 0.2]))
    pick = np.linspace(0, len(x) - 1, 41).astype(int)  # both ends are among them
    pick = pick[p[pick] > 1e-30]
    log_probs = policy.log_probs(torch.tensor([[a, -0.9] for a in x[pick]], dtype=torch.float32))
    expected = np.stack([np.log(p[pick]), np.full(len(pick), np.log(q[len(x) // 20]))], -1)
    near(log_probs, expected, rtol=1e-4, atol=2e-3)
    entropy = -sum(integral(y * np.log(np.maximum(y, 1e-300)), x) for y in (p, q))
    assert policy.entropy().item() == approx(entropy, abs=1e-4)
    assert policy.mode.tolist() == approx([x[p.argmax()], -0.5], abs=1e-5)
    policy = cmil.TruncatedNormal(torch.full((n, 1), loc), torch.full((n, 1), scale))
    sample = np.sort(policy.rsample().numpy()[:, 0])
    assert sample[0] > -1 and sample[-1] < 1
    cdf = np.concatenate([[0], np.cumsum((p[1:] + p[:-1]) / 2 * np.diff(x))])
    distance = np.abs(np.interp(sample, x, cdf) - (np.arange(n) + 0.5) / n).max()
    assert distance < 2.7 / math.sqrt(n)

def test_truncated_normal_sample_gradients():
    """d sample / d loc, scale equal finite differences with the same random numbers."""
    x = torch.tensor([[0.2, -0.7, 0.95], [0.5, 0.1, 1.7]], dtype=torch.float64, requires_grad=True)
    def sample(x):
        torch.manual_seed(1)
        return cmil.TruncatedNormal(*x).rsample()
    assert torch.autograd.gradcheck(sample, x)

@pytest.mark.parametrize("loc, scale, mean", [
    (0.0, 0.15, 1.0), (0.0, 0.5, 0.77), (0.0, 1.1, 0.25), (0.0, 2.1, 0.07), (0.7, 0.5, 0.51)])
def test_sample_grad_against_closed_forms(loc, scale, mean):
    """A sample's mean derivative by loc: exact, its variance / scale^2; released, 1. By scale,
    released: z. Both settings draw the same sample."""
    x = torch.tensor([loc, scale], dtype=torch.float64, requires_grad=True)
    samples, slopes = {}, {}
    for setting in ("exact", "released"):
        torch.manual_seed(0)
        sample = cmil.TruncatedNormal(*x.repeat(100_000, 1).T, setting).rsample()
        slopes[setting] = (torch.autograd.grad(sample.sum(), x)[0] / len(sample)).tolist()
        samples[setting] = sample.detach()
    near(samples["exact"], samples["released"])
    assert slopes["exact"][0] == approx(samples["exact"].var().item() / scale**2, rel=0.01)
    assert slopes["exact"][0] == approx(mean, abs=0.006)
    z = (samples["released"].mean().item() - loc) / scale
    assert slopes["released"] == approx([1.0, z], abs=1e-6)

def test_truncated_normal_gradients_are_finite():
    loc = torch.tensor([-1.0, -0.99999, 0.0, 1.0]).repeat(200_000)[:, None].requires_grad_()
    scale = torch.tensor([0.1, 2.1]).repeat_interleave(400_000)[:, None].requires_grad_()
    pi, ends = cmil.TruncatedNormal(loc, scale), torch.ones_like(loc)
    for value in (pi.rsample(), pi.log_probs(ends), pi.log_probs(-ends), pi.entropy()):
        gradients = torch.autograd.grad(value.sum(), (loc, scale), retain_graph=True)
        assert all(torch.isfinite(x).all() for x in (value, *gradients))

# === Networks =====================================================================================

def test_glorot_weights_and_zero_biases():
    """|w| <= sqrt(6 / (fan_in + fan_out)), with that distribution's std; heads are no copies."""
    net = nn.Sequential(nn.Linear(200, 100), nn.Conv2d(8, 16, 4), nn.ConvTranspose2d(8, 16, 5))
    heads = cmil.EnsembleMLP(5, 120, 80, 2, 60)
    weights = [layer.weight[None] for layer in cmil.initialize(net)] + list(heads.weights)
    for weight, fans in zip(weights, (300, 16 * 24, 25 * 24, 200, 160, 140)):
        bound = math.sqrt(6 / fans)
        for head in weight:
            assert 0.98 * bound < head.abs().max() <= bound
            assert head.std().item() == approx(bound / math.sqrt(3), rel=0.05)
        assert len({head.sum().item() for head in weight}) == len(weight)
    assert not any(bias.any() for bias in (*(layer.bias for layer in net), *heads.biases))

def heads_by_loop(net, x, k):
    """Head k of an EnsembleMLP on x (N, in), layer by layer in float64."""
    x = numbers(x)
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases)):
        x = (elu(x) if i else x) @ numbers(weight[k]) + numbers(bias[k])
    return x

def test_ensemble_against_a_loop_over_heads():
    net, x = randomize(cmil.EnsembleMLP(4, 5, 7, 2, 3)), torch.randn(6, 8, 5)
    near(net(x[0]), [heads_by_loop(net, x[0], k) for k in range(4)])
    member = torch.tensor([3, 0, 3, 1, 2, 1])
    near(net(x, member), [heads_by_loop(net, x[t], k) for t, k in enumerate(member)])
    critics, joined = randomize(cmil.Critics(3, 4, 2, 6, 1)), torch.randn(5, 7, 6)
    every = [heads_by_loop(critics, joined.view(35, 6), i).reshape(5, 7) for i in range(3)]
    near(critics(joined[..., :4], joined[..., 4:]), every)

def test_the_last_layer_of_an_ensemble_is_float32_under_autocast():
    """bfloat16 has 8 bits: two means that differ by 1/1000 would often become one ([P9])."""
    heads = cmil.EnsembleMLP(2, 1, 4, 1, 3)
    for weight in heads.weights:
        nn.init.constant_(weight, 1.0)
    heads.biases[-1].data[1] += 0.001
    with torch.autocast("cpu", torch.bfloat16):
        out = heads(torch.ones(5, 1))  # (2, 5, 3): 4 elu(1) = 4
    assert out.dtype == torch.float32 and (out[0] == 4).all()
    near(out[1], np.full((5, 3), 4.001), rtol=0, atol=1e-6)

def test_encoder_and_decoder():
    """Any leading shape is kept, and every row is its own."""
    encoder, decoder = randomize(cmil.Encoder(2)), randomize(cmil.Decoder(1, 10))
    image, feat = torch.rand(2, 3, 3, 64, 64), torch.randn(2, 3, 10)
    embed, picture = encoder(image), decoder(feat)
    assert embed.shape == (2, 3, 64) and encoder.size == 64 and picture.shape == image.shape
    near(embed[1, 2], encoder(image[1:, 2:])[0, 0])
    near(picture[0, 1], decoder(feat[:1, 1:])[0, 0])

def test_the_decoder_is_four_transposed_convolutions():
    """Its matrix product is a ConvTranspose2d with kernel 5 on a 1x1 map; its last convolution, one
    with kernel 6 and stride 2. Oracle: those two, with the same weights put in their places."""
    decoder, feat = randomize(cmil.Decoder(2, 10)), torch.randn(7, 10)
    product, last = decoder.input[1], decoder.layers[-1]
    first = nn.ConvTranspose2d(64, 8, 5, 2, bias=False)
    first.weight.data = product.weight.view(5, 5, 8, 64).permute(3, 2, 0, 1)
    x = first(decoder.input[0](feat)[..., None, None])
    x = nn.functional.elu(x + product.bias.view(5, 5, 8).movedim(-1, 0))
    x = decoder.layers[:-1](x)  # (7, 2, 30, 30)
    # Pixel (2i + p, 2j + q) of the picture sees input (i - 2 + y, j - 2 + x) through weight[p, q]
    # of the convolution, at (y, x), and through tap (p + 4 - 2y, q + 4 - 2x) of the transposed one.
    pixels, blocks = nn.ConvTranspose2d(2, 3, 6, 2, bias=False), last.weight.view(2, 2, 3, 2, 3, 3)
    for p, q, i, j in itertools.product(range(2), range(2), range(3), range(3)):
        pixels.weight.data[:, :, p + 4 - 2 * i, q + 4 - 2 * j] = blocks[p, q, :, :, i, j].T
    bias = last.bias.view(2, 2, 3).movedim(-1, 0).repeat(1, 32, 32)  # (3, 64, 64)
    torch.testing.assert_close(decoder(feat), pixels(x) + bias, rtol=1e-4, atol=1e-5)

def test_actor_distribution():
    """loc = tanh, scale = 2 sigmoid(x / 2) + min_std, from the two halves of the last layer."""
    c, feat = config(actor_units=8, actor_layers=2, min_std=0.03), torch.randn(6, 4)
    actor = randomize(cmil.Actor(4, 2, c))
    x = elu(linear(actor.layers[2], elu(linear(actor.layers[0], numbers(feat)))))
    loc, scale = np.split(linear(actor.layers[4], x), 2, -1)
    near(actor(feat).loc, np.tanh(loc))
    near(actor(feat).scale, 2 * sigmoid(scale / 2) + 0.03)

def test_discriminator_noise_acts_on_the_whole_input():
    """sigma is the std of independent noise on every dimension of [feat, action]; 0 means none."""
    disc, seen = cmil.Discriminator(3, 2, 4, 1), []
    disc.layers.forward = lambda x: seen.append(x) or x[..., :1]
    s, a = torch.full((50_000, 3), 5.0), torch.full((50_000, 2), -1.0)
    disc(s, a, 1.5)
    disc(s, a)
    noise = numbers(seen[0]) - [5, 5, 5, -1, -1]
    near(np.cov(noise.T), 2.25 * np.eye(5), rtol=0, atol=0.06)
    near(noise.mean(0), np.zeros(5), atol=0.03)
    assert torch.equal(seen[1], torch.cat([s, a], -1))

# === World model ==================================================================================

def small_rssm():
    """A = 2, E = 7, S = 4, D = 6, 5 hidden units, K = 3."""
    return randomize(cmil.RSSM(2, 7, 4, 6, 5, 3))

def gru_by_hand(rssm, stoch, deter, action):
    """The released code's GRU in float64: one matrix, one layer norm over all gates, a split."""
    x = elu(linear(rssm.input, np.concatenate([stoch, action], -1)))
    gates = linear(rssm.gru, np.concatenate([x, deter], -1))
    mean, variance = gates.mean(-1, keepdims=True), gates.var(-1, keepdims=True)
    gates = (gates - mean) / np.sqrt(variance + 1e-3)
    gates = gates * numbers(rssm.norm.weight) + numbers(rssm.norm.bias)
    reset, candidate, update = np.split(gates, 3, -1)
    candidate, update = np.tanh(sigmoid(reset) * candidate), sigmoid(update - 1)
    return update * candidate + (1 - update) * deter

def test_observe_is_filtering_by_hand(monkeypatch):
    """GRU and posterior in float64: a window starts from zeros with a zero action."""
    rssm, embed, action = small_rssm(), torch.randn(5, 3, 7), torch.randn(5, 3, 2)
    noise = torch.randn(5, 3, 4)
    drawn = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
    states = rssm.observe(embed, action)
    for b in range(3):
        stoch, deter = np.zeros(4), np.zeros(6)
        for t in range(5):
            deter = gru_by_hand(rssm, stoch, deter, numbers(action[t, b]) * (t > 0))
            x = np.concatenate([deter, numbers(embed[t, b])])
            x = linear(rssm.post_output, elu(linear(rssm.post_hidden, x)))
            mean, std = x[:4], 2 * sigmoid(x[4:] / 2) + 0.1
            stoch = mean + std * numbers(noise[t, b])
            for got, want in zip(states, (stoch, deter, mean, std)):
                near(got[t, b], want)
    assert torch.equal(states.feat, torch.cat([states.stoch, states.deter], -1))
    mode = rssm.step_post(states.map(lambda x: x[3]), action[4], embed[4], sample=False)
    assert torch.equal(mode.stoch, mode.mean) and torch.equal(mode.mean, states.mean[4])

def test_drawn_prior_trains_one_head_at_each_time_step():
    rssm, deter, seen = small_rssm(), torch.randn(40, 5, 6), set()
    parameters = list(rssm.priors.parameters())
    mean, std = rssm.drawn_prior(deter)
    for t in range(40):
        gradients = torch.autograd.grad(mean[t].sum() + std[t].sum(), parameters, retain_graph=True)
        trained = {k for g in gradients for k in range(3) if g[k].any()}
        assert len(trained) == 1, f"step {t} trains heads {trained}"
        seen |= trained
        out = heads_by_loop(rssm.priors, deter[t], *trained)
        near(mean[t], out[:, :4], rtol=1e-4, atol=1e-4)
        near(std[t], 2 * sigmoid(out[:, 4:] / 2) + 0.1, rtol=1e-4, atol=0)
    assert seen == {0, 1, 2}

def test_imagination_draws_a_member_at_every_step():
    """The imagined states jump between the members' means, all rows of a step together."""
    rssm, actor = small_rssm(), cmil.Actor(10, 2, config(units=8, layers=1))
    for weight in rssm.priors.weights:
        nn.init.zeros_(weight)
    bias = rssm.priors.biases[-1].data[:, 0]  # (K, 2 S)
    bias[:, :4], bias[:, 4:] = 10 * torch.arange(3)[:, None], -100  # a std of 0.1
    dream = cmil.imagine(rssm, actor, rssm.initial(6), torch.zeros(6, 2), 40)
    member = (dream.feat[1:, :, :4] / 10).round()  # (H, N, S)
    assert (member == member[:, :1, :1]).all()
    assert set(member[:, 0, 0].tolist()) == {0, 1, 2}
    near(dream.disagreement, np.full((40, 6), np.std([0, 10, 20])), atol=0)
    noise = dream.feat[1:, :, :4] - 10 * member  # and each row has its own sample
    assert noise.std().item() == approx(0.1, rel=0.1)

def test_disagreement_by_hand():
    """[P9] population std (ddof 0) over members, then the mean over S; agreement is no 0 / 0."""
    means = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[5.0, 6.0]]])  # (K, N, S) = (3, 1, 2)
    # dim 0: 1 3 5, variance (4 + 0 + 4) / 3;   dim 1: 0 0 6, variance (4 + 4 + 16) / 3
    expected = (math.sqrt(8 / 3) + math.sqrt(24 / 3)) / 2
    assert cmil.disagreement(means).tolist() == approx([expected])
    assert not cmil.disagreement(torch.randn(1, 5, 4)).any()
    means = torch.ones(3, 5, 4, requires_grad=True)
    spread = cmil.disagreement(means)
    gradient, = torch.autograd.grad(spread.sum(), means)
    assert (spread.abs() < 1e-5).all() and torch.isfinite(gradient).all()

def test_world_model_loss_by_hand():
    """-log p of a normal, summed over pixels; free nats for the mean KL [D2]; kl_balance = .8."""
    def loss_of(post_mean, picture=0.5, **changes):  # std 1, a prior of mean 0, white images
        L, B, S = post_mean.shape
        image = torch.full((L, B, 3, 64, 64), 0.5, dtype=torch.float64)
        prior, ones = torch.zeros(L, B, S, requires_grad=True), torch.ones(L, B, S)
        post = cmil.State(post_mean, torch.zeros(L, B, 1), post_mean, ones)
        rssm = types.SimpleNamespace(drawn_prior=lambda deter: (prior, ones))
        world = types.SimpleNamespace(decoder=lambda feat: 0 * image + picture, rssm=rssm)
        return *cmil.world_model_loss(world, image, post, config(**changes)), prior
    for std in (1.0, 0.3):
        loss, info, _ = loss_of(torch.zeros(2, 3, 4), picture=0.1, image_std=std)
        recon = 0.5 * 0.4 ** 2 * 3 * 64 * 64
        assert info["recon"].item() == approx(recon, rel=1e-5)
        assert loss.item() == approx(recon / std ** 2 + 1, rel=1e-5)  # 1: free nats
    post_mean = torch.zeros(2, 1, 2)
    post_mean[0, 0, 0] = math.sqrt(2 * 1.8)  # KL = mean^2 / 2: of 1.8 and 0 nats
    loss, info, prior = loss_of(post_mean.requires_grad_())
    assert info["kl"].item() == approx(0.9)
    assert loss.item() == approx(1)  # clamping each KL before the mean would give 1.4
    assert not any(g.any() for g in torch.autograd.grad(loss, (post_mean, prior)))
    post_mean = torch.full((2, 3, 4), 2.0, requires_grad=True)
    loss, info, prior = loss_of(post_mean)
    assert info["kl"].item() == loss.item() == approx(4 * 2 ** 2 / 2)  # summed over S alone
    to_post, to_prior = torch.autograd.grad(loss, (post_mean, prior))
    assert to_post.numpy() == approx(0.2 * 2 / 6, rel=1e-5)  # d KL / d mean = mean
    assert to_prior.numpy() == approx(-0.8 * 2 / 6, rel=1e-5)

# === Discriminator and reward =====================================================================

def test_discriminator_loss_by_hand():
    """[P8] a mean over each side's own pairs, both with noise; disc/* is measured without."""
    sigmas = []
    def disc(s, a, sigma=0.0):
        sigmas.append(sigma)
        return s[..., 0] + 2 * a[..., 0]
    expert = torch.tensor([[1.0], [0.5]]), torch.tensor([[1.0], [0.0]])  # logits 3, .5
    policy = torch.tensor([[-1.0], [0.0], [2.0]]), torch.tensor([[0.0], [0.0], [-1.5]])
    d_expert, d_policy = sigmoid(np.array([3, 0.5])), sigmoid(np.array([-1, 0, -1]))
    loss, info = cmil.discriminator_loss(disc, expert, policy, 1.5)
    expected = -np.log(d_expert).mean() - np.log(1 - d_policy).mean()
    assert loss.item() == approx(expected, rel=1e-5)
    got = [info[f"disc/{name}"].item() for name in ("expert", "policy", "gap", "logit_policy")]
    expert, policy = d_expert.mean(), d_policy.mean()
    assert got == approx([expert, policy, expert - policy, -2 / 3], rel=1e-5)
    assert sigmas == [1.5, 1.5, 0.0, 0.0]

def random_dream():
    return cmil.Dream(randn(5, 6, 3), randn(5, 6, 2), randn(6, 2), randn(4, 6).abs(), randn(4, 6))

def toy_disc(s, a, sigma=0.0):
    return torch.sin(s.sum(-1)) + 0.7 * a[..., 0] - 0.2 * a[..., -1] * s[..., 0]

def toy_critics(s, a):
    first, second = s[..., 0] + 0.5 * a.sum(-1), 0.8 - s[..., 1] * a[..., 0]
    return torch.stack([first, second, s.sum(-1) - a[..., 1]])

def literal_reward(s, a, u=0):
    """[P10] log D - log(1 - D) - alpha u for single vectors, through D itself; alpha = 3."""
    D = sigmoid(numbers(toy_disc(s, a)))
    return np.log(D) - np.log(1 - D) - 3 * u

def test_conservative_reward_is_literally_P10():
    """Number by number in float64. [C]: D itself instead of its logit; and reward_noise."""
    dream, c, sigmas = random_dream(), config(alpha=3.0), []
    got, u = cmil.conservative_reward(toy_disc, dream, c), numbers(dream.disagreement)
    assert got.shape == (4, 6)
    for t, n in np.ndindex(4, 6):
        expected = literal_reward(dream.feat[t, n], dream.action[t + 1, n], u[t, n])
        assert got[t, n].item() == approx(expected, abs=1e-9)
    D = sigmoid(numbers(toy_disc(dream.feat[:-1], dream.action[1:])))
    c.reward = "sigmoid"
    near(cmil.conservative_reward(toy_disc, dream, c), D - 3 * u, rtol=1e-7, atol=1e-12)
    for noise in (False, True):
        c = config(sigma=1.5, reward_noise=noise)
        cmil.conservative_reward(lambda s, a, sigma: sigmas.append(sigma) or s[..., 0], dream, c)
    assert sigmas == [0, 1.5]

def test_dream_rows():
    """u_t: spread of the priors of s_{t+1}. a_t ~ pi(.|stop_grad(s_t)) has no gradient of s_0."""
    rssm, actor = small_rssm(), randomize(cmil.Actor(10, 2, config(units=8, layers=1)))
    stoch, first_action = torch.randn(5, 4, requires_grad=True), torch.randn(5, 2)
    start = cmil.State(stoch, torch.randn(5, 6), torch.zeros(5, 4), torch.ones(5, 4))
    dream = cmil.imagine(rssm, actor, start, first_action, 3)
    assert torch.equal(dream.feat[0], start.feat) and torch.equal(dream.action[0], first_action)
    assert dream.last_action.shape == (5, 2) and dream.last_action.abs().max() < 1
    feat, action = numbers(dream.feat), numbers(dream.action)
    for t in range(3):
        deter = gru_by_hand(rssm, feat[t, :, :4], feat[t, :, 4:], action[t + 1])
        near(feat[t + 1, :, 4:], deter, rtol=1e-4, atol=1e-4)
        heads = [heads_by_loop(rssm.priors, feat[t + 1, :, 4:], k) for k in range(3)]
        spread = np.stack(heads)[:, :, :4].std(0).mean(-1)
        near(dream.disagreement[t], spread, rtol=1e-3, atol=0)
        near(dream.entropy[t], actor(dream.feat[t]).entropy(), atol=0)
    for value, expected in ((dream.feat[3], True), (dream.disagreement[2], True),
                            (dream.action[1:], False), (dream.last_action, False),
                            (dream.entropy, False)):
        g, = torch.autograd.grad(value.sum(), stoch, allow_unused=True, retain_graph=True)
        assert value.requires_grad and (g is not None and g.any().item()) == expected

# === Values =======================================================================================

def literal_lambda_return(r, v, g, lam):
    """[W5] as printed, with V_k of [W-]: r (H,), v (H+1,) -> H numbers."""
    H, returns = len(r), []
    for t in range(H):
        V = [sum(g ** i * r[t + i] for i in range(k)) + g ** k * v[t + k] for k in range(H - t + 1)]
        total = (1 - lam) * sum(lam ** (k - 1) * V[k] for k in range(1, H - t))
        returns.append(total + lam ** (H - t - 1) * V[H - t])
    return returns

def literal_values(dream, rule=min):
    """V_0 (H+1, N) by a rule from the critics (m,), and V (H, N); g = .9, l = .8."""
    action = torch.cat([dream.action[1:], dream.last_action[None]])
    v, V, u = np.zeros((5, 6)), np.zeros((4, 6)), numbers(dream.disagreement)
    for n in range(6):
        s, a = dream.feat[:, n], action[:, n]
        r = [literal_reward(s[t], a[t], u[t, n]) for t in range(4)]
        v[:, n] = [rule(numbers(toy_critics(s[t], a[t]))) for t in range(5)]
        V[:, n] = literal_lambda_return(r, v[:, n], 0.9, 0.8)
    return v, V

def test_lambda_return_by_hand():
    """V_1 = 3 + 8/2 = 7 and V_0 = 1 + (4/2 + 7/2)/2 = 3.75; and the double sum of [W5]."""
    reward, value = torch.tensor([[1.0], [3.0]]), torch.tensor([[99.0], [4.0], [8.0]])
    assert cmil.lambda_return(reward, value, 0.5, 0.5).flatten().tolist() == [3.75, 7.0]
    assert cmil.discounts(0.5, torch.zeros(3, 2)).flatten().tolist() == [1, 0.5, 0.25]
    reward, value = randn(7, 4), randn(8, 4)
    for rates in [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)]:
        want = literal_lambda_return(numbers(reward), numbers(value), *rates)
        near(cmil.lambda_return(reward, value, *rates), want, rtol=1e-12, atol=0)

@pytest.mark.parametrize("discount", [True, False])
def test_losses_are_literally_W6_W7_W8(discount):
    """-mean g^t [ l V + (1-l) V_0 + entropy e ];  sum_i mean [g^{t+1}] (Q_i - target)^2"""
    dream, target = random_dream(), randn(4, 6)
    c = config(alpha=3.0, gamma=0.9, lam=0.8, entropy=0.05, actor_discount=discount,
               critic_discount=discount)
    (v, V), g, W6, W7, W8 = literal_values(dream), 0.9 if discount else 1, 0, 0, 0
    for t, n in np.ndindex(4, 6):
        entropy = dream.entropy[t, n].item()
        W6 -= g ** t * (0.8 * V[t, n] + 0.2 * v[t, n] + 0.05 * entropy) / 24
        q = numbers(toy_critics(dream.feat[t, n], dream.action[t + 1, n]))
        error = ((q - target[t, n].item()) ** 2).sum() / 24
        W7, W8 = W7 + g ** (t + 1) * error, W8 + error
    def objective(*dream):  # every part of it has a gradient
        dream = cmil.Dream(*dream)
        reward = cmil.conservative_reward(toy_disc, dream, c)
        return cmil.actor_loss(toy_critics, dream, reward, c)
    loss, info = objective(*dream)
    assert loss.item() == approx(W6, rel=1e-9)
    assert info["uncertainty"].item() == approx(numbers(dream.disagreement).mean())
    assert torch.autograd.gradcheck(lambda *x: objective(*x)[0],
                                    [x.clone().requires_grad_() for x in dream])
    loss, info = cmil.model_critic_loss(toy_critics, target, dream, c)
    assert loss.item() == info["critic/model"].item() == approx(W7, rel=1e-9)
    loss, info = cmil.data_critic_loss(toy_critics, target, dream.feat, dream.action)
    assert loss.item() == info["critic/data"].item() == approx(W8, rel=1e-9)

@pytest.mark.parametrize("target", ["min", "random"])
def test_critic_targets_are_literally_W7_and_W8(target):
    """V_0 = min_i Q_i or a drawn one; Vbar; r_j + g((1-l) Vbar_0 + l Vbar)(s_{j+1}); in loops."""
    dream, L, B, literal, drawn = random_dream(), 3, 2, [], set()  # N = 6 = L B
    s, a = dream.feat[0].view(L, B, 3), dream.action[0].view(L, B, 2)
    c = config(alpha=3.0, gamma=0.9, lam=0.8, target=target)
    reward = cmil.conservative_reward(toy_disc, dream, c)
    r = [[literal_reward(s[j, b], a[j + 1, b]) for b in range(B)] for j in range(L - 1)]
    rules = [min] if target == "min" else [lambda q, i=i: q[i] for i in range(3)]
    for rule in rules:
        v, V = literal_values(dream, rule)
        after = (0.2 * v[0] + 0.8 * V[0]).reshape(L, B)[1:]  # the rollouts from the next rows
        literal.append((v, V, r + 0.9 * after))
    for _ in range(40):
        value, model = cmil.target_values(toy_critics, dream, reward, c)
        got = value, model, cmil.data_target(toy_disc, value[0], model[0], s, a, c)
        assert [x.shape for x in got] == [(5, 6), (4, 6), (2, 2)]
        fits = [all(np.allclose(*x, atol=1e-9) for x in zip(got, want)) for want in literal]
        assert sum(fits) == 1
        drawn.add(fits.index(True))
    assert drawn == set(range(len(rules)))

def test_real_pairs_by_hand():
    """[W8]: L = 3, B = 1, g = l = 1/2, D's logit is s - a.  BC: log pi = -(a - s)^2."""
    value, returns = torch.tensor([2.0, 3.0, 3.0]), torch.tensor([-0.5, 0.0, 5.5])
    s, a = torch.tensor([[1.0, 2.0, 3.0], [9.0, 0.5, -1.0]]).view(2, 3, 1, 1)  # s0 -> .5, s1 -> -1
    c = config(gamma=0.5, lam=0.5, alpha=1.0)
    data = cmil.data_target(lambda s, a, sigma: (s - a)[..., 0], value, returns, s, a, c)
    # r_j = s_j - a_j, no penalty:          1 - .5 = .5              2 + 1 = 3
    # + (Vbar_0 / 2 + Vbar / 2) / 2 there:  (3/2 + 0/2) / 2 = .75    (3/2 + 5.5/2) / 2 = 2.125
    assert data.flatten().tolist() == approx([0.5 + 0.75, 3 + 2.125])
    def actor(s):
        assert not s.requires_grad
        return types.SimpleNamespace(scale=torch.ones_like(s), log_probs=lambda a: -((a - s) ** 2))
    loss = cmil.clone_loss(actor, s.clone().requires_grad_(), a, c)
    assert loss.item() == approx(((0.5 - 1) ** 2 + (-1 - 2) ** 2) / 2)

def test_cloning_weights_by_hand():
    """Power 1 weighs by the variances .01, .01, .09, .01 over their mean, .03; power 0 by 1."""
    scale = torch.tensor([[0.1, 0.1], [0.3, 0.1]], requires_grad=True)
    log_probs = torch.zeros(2, 2, requires_grad=True)
    policy = types.SimpleNamespace(scale=scale, log_probs=lambda a: log_probs)
    for power, weight in (0.0, [[1, 1], [1, 1]]), (1.0, [[1 / 3, 1 / 3], [3, 1 / 3]]):
        log_probs.grad = None
        cmil.negative_log_prob(policy, None, config(clone_power=power)).backward()
        near(-2 * log_probs.grad, weight)  # a mean over two rows
    assert scale.grad is None

# === Who learns ===================================================================================

def touched(loss, module):
    """Names of the parameters of `module` with a gradient of `loss` that is not zero."""
    names, parameters = zip(*module.named_parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, g in zip(names, gradients) if g is not None and g.any()}

def everything(module):
    return {name for name, _ in module.named_parameters()}

@pytest.mark.parametrize("data_critic", [True, False])
def test_gradient_routing_table(data_critic):
    """Who learns from what (the table above class Agent), by autograd over ALL parameters."""
    # With free nats the priors might have no gradient. Without data_critic [W9] is [W7] alone.
    agent, replay = agent_and_replay(alpha=3.0, free_nats=0.0, data_critic=data_critic)
    losses, info = agent.losses(replay)
    agent.targets.requires_grad_(True)
    nets = dict(agent.named_children())
    reach = {(loss, name): touched(losses[loss], nets[name]) for loss in losses for name in nets}
    assert set(losses) == {"world", "disc", "critics", "actor"} == set(nets) - {"targets"}
    for loss, name in reach:
        if loss == name:  # every parameter (of the priors: the drawn heads) learns
            assert reach[loss, name] == everything(nets[name])
        elif loss != "actor":
            assert not reach[loss, name], f"the {loss} loss reaches {name}"
    # The actor's loss runs through D, critics and dynamics, not to encoder, posterior or decoder.
    assert reach["actor", "disc"] and reach["actor", "critics"] and not reach["actor", "targets"]
    parts = {".".join(name.split(".")[:2]) for name in reach["actor", "world"]}
    assert parts == {"rssm.input", "rssm.gru", "rssm.norm", "rssm.priors"}
    assert ("critic/data" in info) == data_critic
    assert torch.equal(losses["critics"], info["critic/model"] + info.get("critic/data", 0))
    losses, _ = agent.clone_losses(replay)
    for loss, name in itertools.product(("world", "actor"), nets):
        assert bool(touched(losses[loss], nets[name])) == (loss == name)

@pytest.mark.parametrize("clone", [False, True])
def test_update_steps_each_network_on_its_own_gradient(clone, monkeypatch):
    agent, replay = agent_and_replay()
    torch.manual_seed(1)
    losses, _ = agent.clone_losses(replay) if clone else agent.losses(replay)
    expected = {}
    for name, loss in losses.items():
        parameters = list(getattr(agent, name).parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected[agent.optimizers[name]] = gradients
    calls = calls_of(monkeypatch, cmil.Optimizer, "step")
    torch.manual_seed(1)
    agent.update(replay, clone)
    assert same(dict(arguments for arguments, _ in calls), expected)
    assert all(p.grad is None for p in agent.parameters())
    owners = [p for optimizer in agent.optimizers.values() for p in optimizer.params]
    assert len(owners) == len(set(owners))  # no parameter has two owners
    assert set(owners) == set(agent.parameters()) - set(agent.targets.parameters())

def test_update_uses_the_replay_half_and_the_demo_half(monkeypatch):
    """Replay pictures are black and its actions -0.5; those of the demos are white and +0.5."""
    agent, _ = agent_and_replay(demo_share=0.25)
    agent.beta.fill_(3)  # it has fallen
    of_replay = torch.tensor([0.5, -0.5, -0.5, -0.5])  # the first window is a demo's
    c, replay = agent.c, cmil.Replay(42, agent.c.length, 2, CPU)
    half = np.full((21, 2), 0.5, np.float32)
    replay.add(np.full((21, 64, 64, 3), 255, np.uint8), half, demo=True)
    replay.add(np.zeros((21, 64, 64, 3), np.uint8), -half)
    # Of each half, draw windows at nine tenths of the starts.
    monkeypatch.setattr(torch, "rand", lambda n, device=None: torch.full((n,), 0.9))
    names = ("world_model_loss", "imagine", "discriminator_loss", "target_values", "data_target",
             "model_critic_loss", "data_critic_loss", "clone_loss", "actor_loss")
    seen = {name: calls_of(monkeypatch, cmil, name) for name in names}
    losses, _ = agent.losses(replay)
    assert all(len(calls) == 1 for calls in seen.values())
    given, made = ({name: calls[0][i] for name, calls in seen.items()} for i in (0, 1))
    _, image, post, _ = given["world_model_loss"]
    assert same(image, of_replay.view(4, 1, 1, 1).expand(c.length, c.batch, 3, 64, 64))
    _, _, start, first_action, _ = given["imagine"]
    assert (first_action.view(c.length, 4, 2) == of_replay[:, None]).all()
    near(start.feat, post.feat.flatten(0, 1))  # row t B + b
    _, (s, a), policy, sigma = given["discriminator_loss"]
    dream = made["imagine"]
    assert (a == 0.5).all() and sigma == c.sigma
    assert same(policy, (dream.feat[:-1], dream.action[1:])) and len(policy[0]) == c.horizon
    critics, *of_dream, _ = given["target_values"]
    reward = cmil.conservative_reward(agent.disc, dream, c)  # [P10], once
    assert critics is agent.targets and of_dream[0] is dream and torch.equal(of_dream[1], reward)
    value, V = made["target_values"]
    assert same(given["data_target"][1:3], (value[0], V[0]))
    for feat, action in (given["data_target"][3:5], given["data_critic_loss"][2:]):
        assert (action == of_replay[:, None]).all() and torch.equal(feat, post.feat)
    assert given["model_critic_loss"][:3] == (agent.critics, V, dream)
    assert given["data_critic_loss"][:2] == (agent.critics, made["data_target"])
    _, feat, action, _ = given["clone_loss"]
    assert (action == 0.5).all() and torch.equal(feat[:-1], s)
    assert given["actor_loss"][:3] == (agent.critics, *of_dream)
    assert torch.equal(losses["actor"], made["actor_loss"][0] + 3 * made["clone_loss"])

# === Other methods ================================================================================

@pytest.mark.parametrize("algo, flags", [
    ("vmail", dict(members=1, alpha=0.0, beta=0.0, seed_steps=0)),
    ("dgail", dict(members=1, alpha=0.0, beta=0.0, offline=True, entropy=0.03, lr_decay=0.5,
                   sample_grad="released")), ("dbc", dict(reward="none", offline=True))])
def test_rows_of_the_table_are_cmil_with_other_options(algo, flags):
    states = []
    for name, changes in ((algo, {}), ("cmil", flags)):
        torch.manual_seed(0)
        agent, replay = agent_and_replay(name, **changes)
        agent.update(replay, clone=True)
        agent.update(replay)
        states.append([agent.save(), {**dataclasses.asdict(agent.c), "algo": ""}])
    clones = "actor" in agent.clone_losses(replay)[0]
    assert same(*states) and clones == (agent.c.beta > 0)

@pytest.mark.parametrize("algo", list(cmil.METHODS))
def test_every_method_trains_and_resumes(algo, tmp_path):
    changes = {"algo": algo, "steps": 40, "seed_steps": 20, "pretrain": 3, "eval_episodes": 1,
               **cmil.METHODS[algo][1]}
    state, lines = run_train(tmp_path / "a", **changes)
    run_train(tmp_path / "b", stop_at=state["updates"] - 4, **changes)
    again, again_lines = run_train(tmp_path / "b", **changes)
    assert same(state, again) and lines == again_lines and state["updates"] >= 8
    assert lines[-1]["step"] == 40 and "eval/success" in lines[-1]
    played = list((tmp_path / "a").glob("episodes/*.npz"))
    assert len(played) == (0 if changes.get("offline") else 4)

def test_match_and_n_step_target_are_literal():
    """[T] eq. 8: equals are 1, zero vectors no NaN; and sum_{k<n} g^k r_{t+k} + g^n v_{t+n}."""
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    cases = [(x, y, 11 / 25), (x, x, 1), (x, -x, -1), (x, 2 * x, 0.5), (0 * x, 0 * x, 0)]
    for x, y in randn(12, 2, 6):
        xx, yy, xy = (sum(numbers(a * b)) for a, b in ((x, x), (y, y), (x, y)))
        cases.append((x, y, xy / max(xx, yy)))
    for x, y, expected in cases:
        assert baselines.match(x, y).item() == approx(expected)
    reward, value = randn(6, 3), randn(7, 3)
    want = [sum(0.9 ** k * numbers(reward[t + k]) for k in range(3))
            + 0.9 ** 3 * numbers(value[t + 3]) for t in range(4)]
    near(baselines.n_step_target(reward, value, 0.9, 3), want, rtol=1e-6, atol=0)
    reward, value = torch.tensor([[1.0], [2.0]]), torch.tensor([[9.0], [9.0], [4.0]])
    assert baselines.n_step_target(reward, value, 0.5, 2).tolist() == [[1 + 1 + 1]]

def test_ditto_compares_states_of_the_same_step(monkeypatch):
    """After k steps from row t, the dream's deter meets the expert's of row t + k."""
    agent, replay = agent_and_replay("ditto")
    c, L, B, H = agent.c, agent.c.length, agent.c.batch, agent.c.horizon
    names = ("imagine", "world_model_loss", "actor_loss", "target_values", "model_critic_loss")
    seen = {name: calls_of(monkeypatch, cmil, name) for name in names}
    seen["match"] = calls_of(monkeypatch, baselines, "match")
    seen["sample"] = calls_of(monkeypatch, replay, "sample")
    losses, _ = agent.losses(replay)
    assert all(len(calls) == 1 for calls in seen.values())
    given, made = ({name: calls[0][i] for name, calls in seen.items()} for i in (0, 1))
    (_, share), (sampled, action) = given["sample"], made["sample"]
    _, image, post, _ = given["world_model_loss"]
    _, _, start, first_action, horizon = given["imagine"]
    assert torch.equal(image, cmil.to_float(sampled)) and horizon == H and share == 1
    rows = [x[:L - H].flatten(0, 1) for x in (*post, action)]  # row t B + b
    assert same([*start, first_action], rows)
    x, y = given["match"]
    assert x.shape == y.shape == (H, (L - H) * B, c.deter) and not y.requires_grad
    for k, t, b in np.ndindex(H, L - H, B):
        assert torch.equal(y[k, t * B + b], post.deter[t + k + 1, b])
    dream, reward, V = made["imagine"], made["match"], made["target_values"][1]
    assert torch.equal(x, dream.feat[1:, :, c.stoch:])
    assert given["actor_loss"][:3] == (agent.critics, dream, reward)
    assert given["target_values"][:3] == (agent.targets, dream, reward)
    assert given["model_critic_loss"][:3] == (agent.critics, V, dream)
    assert losses.keys() == {"world", "critics", "actor"}
    parts = {name.split(".")[1] for name in touched(losses["actor"], agent.world)}
    assert parts == {"input", "gru", "norm", "priors"}  # gradients go through the dynamics

def test_bc_clones_single_frames_end_to_end():
    """-mean log pi(action[t+1] | image[t]) of the demos' windows; encoder and policy learn."""
    agent, replay = agent_and_replay("bc")
    torch.manual_seed(0)
    loss, = agent.clone_losses(replay)[0].values()
    torch.manual_seed(0)
    image, action = replay.sample(agent.c.batch, 1.0)
    terms = [agent.policy(cmil.to_float(x)).log_probs(a) for x, a in zip(image[:-1], action[1:])]
    assert loss.item() == approx(-torch.stack(terms).sum(-1).mean().item(), rel=1e-4)
    assert touched(loss, agent.policy) == everything(agent.policy)
    first, carry = agent.act(image[0].numpy(), None, False)
    _, carry = agent.act(image[1].numpy(), carry, False)
    assert np.array_equal(first, agent.act(image[0].numpy(), carry, False)[0])  # no memory

def test_gradient_penalty_by_hand(monkeypatch):
    """logit = w x: the penalty is (|w| - 1)^2 everywhere; |x|^2: it is taken between the pairs."""
    disc, w = cmil.Discriminator(2, 1, 8, 1), nn.Parameter(torch.tensor([2.0, 3.0, 6.0]))
    disc.layers.forward = lambda x: (x * w).sum(-1, keepdim=True)
    expert, policy = torch.randn(2, 5, 3)
    pairs = expert.split([2, 1], -1), policy.split([2, 1], -1)
    penalty = baselines.gradient_penalty(disc, *pairs)
    assert penalty.item() == approx((7 - 1) ** 2)
    gradient, = torch.autograd.grad(penalty, w)
    near(gradient, 2 * 6 * w.detach() / 7, atol=0)
    # logit = |x|^2: the gradient is 2 x, here three tenths of the way from policy to expert.
    disc.layers.forward = lambda x: (x ** 2).sum(-1, keepdim=True)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.3))
    expected = (2 * (0.3 * expert + 0.7 * policy).norm(dim=-1) - 1).square().mean().item()
    assert baselines.gradient_penalty(disc, *pairs).item() == approx(expected, rel=1e-5)

def test_random_shifts_are_crops_of_the_padded_frame():
    x, seen = torch.randn(400, 2, 8, 8), []
    padded = nn.functional.pad(x, (4, 4, 4, 4), mode="replicate")
    shifted = baselines.random_shift(x)
    for frame, large in zip(shifted, padded):
        seen += [(row, column) for row, column in np.ndindex(9, 9)
                 if torch.equal(frame, large[:, row:row + 8, column:column + 8])]
    assert shifted.shape == x.shape and len(seen) == 400 and len(set(seen)) > 60
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(9))

def test_pdac_pairs_stacks_actions_and_targets(monkeypatch):
    """A stack ends in its row's frame; three rewards and the targets' value three rows later."""
    agent, replay = agent_and_replay("pdac")
    number = torch.arange(len(replay.image), dtype=torch.uint8)
    replay.image[:] = number[:, None, None, None]  # each row's number, in its pixels ...
    replay.action[:] = number[:, None] / 255  # ... and in its action
    # The windows begin in row 32 of the demos (of 42 rows) and 42 + 32 of what was played.
    monkeypatch.setattr(torch, "rand", lambda n, device=None: torch.full((n,), 0.9))
    monkeypatch.setattr(cmil.TruncatedNormal, "rsample", lambda pi: pi.loc + 0.25)  # not the mode
    # embed: the number of the stack's last frame / 255
    agent.critics.encoder.forward = lambda x: x[..., 6:7, 0, 0] + 0.5
    agent.disc.layers.forward = lambda x: x[..., :1] - 2 * x[..., 1:2]
    factors = torch.tensor([1.0, 2.0]).view(2, 1, 1).requires_grad_()
    agent.critics.heads.forward = lambda s, a: factors * s[..., 0] + a[..., 0]
    agent.targets.forward = lambda s, a: (5 - factors) * s[..., 0] + a[..., 0]
    before_tanh = torch.full((6, 4, 2), math.atanh(0.5), requires_grad=True)
    agent.actor.layers.forward = lambda s: before_tanh
    shifted = calls_of(monkeypatch, baselines, "random_shift", lambda x: x)
    penalised = calls_of(monkeypatch, baselines, "gradient_penalty")
    losses, _ = agent.losses(replay)
    starts = 42 + 32, 32
    for ((stack,), _), start in zip(shifted, starts, strict=True):
        frames = (stack[:, ::3, 0, 0].view(6, 4, 3) + 0.5) * 255  # (L-2, B, 3)
        near(frames, start + np.indices((6, 4, 3))[[0, 2]].sum(0), atol=1e-4)
    s, expert = (np.arange(start + 2, start + 8) / 255 for start in starts)
    for pair, rows in zip(penalised[0][0][1:], (expert, s)):  # (embed[t], action[t+1])
        near(torch.cat(pair, -1)[:, 0], np.stack([rows[:-1], rows[1:], rows[1:]], 1))
    on_expert, reward = (x[:-1] - 2 * x[1:] for x in (expert, s))
    loss = -np.log(sigmoid(on_expert)).mean() - np.log(1 - sigmoid(reward)).mean()
    penalty = (math.sqrt(5) - 1) ** 2  # of D's gradient (1, -2)
    assert losses["disc"].item() == approx(loss + 10 * penalty, rel=1e-5)
    value, g = 3 * s + 0.75, agent.c.gamma  # the least of the targets
    y = sum(g ** k * reward[k:k + 3] for k in range(3)) + g ** 3 * value[3:]
    q = np.outer([1, 2], s[:3]) + s[1:4]
    assert losses["critics"].item() == approx(((q - y) ** 2).mean(1).sum(), rel=1e-5)
    small = 0.01 * 2 * math.atanh(0.5) ** 2  # of two actions
    assert losses["actor"].item() == approx(small - (s + 0.75).mean(), rel=1e-4)

def test_pdac_gradients_and_targets():
    """The encoder learns from the critics alone; the targets follow by a hundredth each update.
    The policy's std falls from 1 to .1 in the first half of the updates."""
    agent, replay = agent_and_replay("pdac", seed_steps=20, steps=60, train_ratio=0.5)
    losses, _ = agent.losses(replay)
    nets = {name: net for name, net in agent.named_children() if name != "targets"}
    reach = {(loss, name): touched(losses[loss], nets[name]) for loss in losses for name in nets}
    assert losses.keys() == nets.keys() == {"critics", "actor", "disc"}
    assert reach["critics", "critics"] == everything(agent.critics)
    assert {name.split(".")[0] for name in reach["actor", "critics"]} == {"heads"}
    reached = {pair for pair, names in reach.items() if names}
    assert reached == {*((name, name) for name in nets), ("actor", "critics")}
    randomize(agent.targets)  # far from what they follow
    before = copy.deepcopy(agent.targets.state_dict())
    agent.update(replay)
    heads = agent.critics["heads"].state_dict()
    for name, now in agent.targets.state_dict().items():
        near(now, 0.99 * before[name] + 0.01 * heads[name], rtol=1e-6, atol=1e-7)
    assert agent.actor(torch.zeros(3, 50)).scale[0, 0].item() == approx(1 - 0.9 / 10)
    agent.updates = 15
    agent.move_targets()
    assert agent.actor(torch.zeros(3, 50)).scale[0, 0].item() == approx(0.1)

def test_pdac_embeds_the_last_three_frames():
    """The oldest first; [Q]'s trunk: a linear layer to 50, normalised, tanh; in float64."""
    agent, _ = agent_and_replay("pdac")
    carry, stacks = None, []
    for t in range(5):
        _, carry = agent.act(np.full((2, 64, 64, 3), 50 * t, np.uint8), carry)
        stacks.append(((carry[0, ::3, 0, 0] + 0.5) * 255).round().tolist())
    assert stacks == [[0, 0, 0], [0, 0, 50], [0, 50, 100], [50, 100, 150], [100, 150, 200]]
    convolutions, last, norm, _ = randomize(agent.critics.encoder)
    stack = torch.rand(3, 9, 64, 64) - 0.5
    x = linear(last, numbers(convolutions(stack)))
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    x = np.tanh(x * numbers(norm.weight) + numbers(norm.bias))
    assert x.shape == (3, 50) and x.std() > 0.3
    near(agent.critics.encoder(stack), x, rtol=1e-4)

# === Optimizer and agent ==========================================================================

def test_optimizer_is_adam_with_clipping():
    """Three steps, one clipped, in float64; weights of another memory layout than gradients."""
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    c, rng = config(clip=5.0, weight_decay=1e-3), np.random.default_rng(0)
    optimizer = cmil.Optimizer(net, 0.01, c)
    before = w = np.concatenate([numbers(p).ravel() for p in net.parameters()])
    m, v = np.zeros(52), np.zeros(52)
    for step, scale in enumerate((0.5, 100.0, 0.3), 1):
        g = rng.normal(size=52) * scale
        parts = torch.tensor(g[:48].reshape(4, 3, 2, 2)).float(), torch.tensor(g[48:]).float()
        assert optimizer.step(parts).item() == approx(np.linalg.norm(g), rel=1e-5)
        g = g * min(1, 5 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        move = (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.999 ** step)) + c.adam_eps)
        w = w * (1 - 1e-3) - 0.01 * move
    after = np.concatenate([numbers(p).ravel() for p in net.parameters()])
    near(after, w, atol=1e-6)
    assert np.abs(after - before).max() > 1e-2

@pytest.mark.parametrize("lr", [3e-4, 5e-4, 1e-2])
@pytest.mark.parametrize("decay", [1e-6, 0.0])
def test_weight_decay_factor(lr, decay):
    """With a zero gradient a step multiplies weights by 1 - decay, to within one float32."""
    net = nn.Linear(100, 100)
    before = numbers(net.weight)
    cmil.Optimizer(net, lr, config(weight_decay=decay)).step(
        [torch.zeros_like(p) for p in net.parameters()])
    expected, after = before * (1 - decay), numbers(net.weight)
    neighbour = np.spacing(np.abs(expected).astype(np.float32)) if decay else 0
    assert (np.abs(after - expected) <= neighbour).all()
    assert not decay or (after != before).mean() > 0.99

@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_changes_nothing(poison):
    net, states = nn.Linear(4, 3), []
    optimizer = cmil.Optimizer(net, 0.01, config())
    for value in (1.0, poison, poison, 1.0):
        optimizer.step([torch.ones(3, 4), torch.tensor([1.0, 1.0, value])])
        counts, adam = tuple(optimizer.skipped.tolist()), optimizer.adam.state_dict()["state"]
        states.append(copy.deepcopy([counts, net.state_dict(), adam]))
    first, second, third, last = states
    assert same(first[1:], second[1:]) and same(first[1:], third[1:])
    assert [counts for counts, *_ in states] == [(0, 0), (1, 1), (2, 2), (2, 0)]
    assert not same(last[1], first[1]) and last[2][0]["step"] == 2

def test_targets_are_copied_on_schedule_only():
    agent, replay = agent_and_replay(target_every=3)
    expected = copy.deepcopy(agent.critics.state_dict())
    for update in range(1, 8):
        agent.update(replay)
        assert not same(agent.critics.state_dict(), expected)
        if update % 3 == 0:
            expected = copy.deepcopy(agent.critics.state_dict())
        assert same(agent.targets.state_dict(), expected), f"update {update}"

def test_acting_is_filtering(monkeypatch):
    agent, _ = agent_and_replay()
    randomize(agent.world.rssm)
    randomize(agent.actor)
    image = np.random.default_rng(0).integers(0, 256, (7, 3, 64, 64, 3), np.uint8)
    actions, states, carry = [np.zeros((3, 2), np.float32)], [], None
    for frame in image:
        action, carry = agent.act(frame, carry, sample=False)
        states.append(carry[0].feat)
        actions.append(action)
        near(action, agent.actor(states[-1]).mode)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    embed = agent.world.encoder(cmil.to_float(torch.tensor(image)))
    post = agent.world.rssm.observe(embed, torch.tensor(np.stack(actions[:7])))
    near(torch.stack(states), post.feat, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("algo", ["cmil", "bc", "pdac"])
def test_acting_samples_latents_and_actions(algo):
    """sample=True draws for each environment anew; False never. No std is below --min-std."""
    agent, _ = agent_and_replay(algo, min_std=0.04)
    image = np.zeros((2, 64, 64, 3), np.uint8)
    first, second = (agent.act(image, sample=False)[0] for _ in range(2))
    assert np.array_equal(first, second)
    near(first[0], first[1], rtol=0, atol=1e-6)  # rows may be summed in another order
    (first, carry), (second, carry2) = (agent.act(image) for _ in range(2))
    assert (first != second).all() and (first[0] != first[1]).all()
    assert np.abs(first).max() <= 1 and first.dtype == np.float32
    assert algo != "cmil" or (carry[0].stoch != carry2[0].stoch).all()
    if algo != "pdac":
        actor, = (module for module in agent.modules() if isinstance(module, cmil.Actor))
        nn.init.constant_(actor.layers[-1].bias, -100)
        near(actor(torch.randn(3, actor.layers[0].in_features)).scale, np.full((3, 2), 0.04))

def test_open_loop():
    """Predictions see the context's frames and all actions, never the later frames."""
    agent, replay = agent_and_replay()
    image, action = replay.sample(3, 1.0)  # (8, 3, ...)
    def predict(image, action):
        torch.manual_seed(0)
        return agent.open_loop(image, action)
    picture, spread = predict(image, action)
    assert picture.shape == image.shape and picture.dtype == torch.uint8
    assert spread.shape == (3, 3) and (spread > 0).all()
    assert same((picture, spread), predict(torch.cat([image[:5], 0 * image[5:]]), action))
    for other in ((image.flip(0), action), (image, action.flip(0))):
        assert not torch.equal(spread, predict(*other)[1])

# === Speed ========================================================================================

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")

# Every update that is code of its own: method, and whether it is one of clone_losses.
each_step = pytest.mark.parametrize("algo, clone", [
    ("cmil", True), ("cmil", False), ("bc", True), ("ditto", False), ("pdac", False)])

@each_step
def test_an_update_never_asks_for_a_value(algo, clone):
    """No host synchronisation, no branch on a value: torch's fake tensors have shapes alone."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    agent, replay = agent_and_replay(algo)
    with FakeTensorMode(allow_non_fake_inputs=True):
        info = agent.update(replay, clone)
        assert all(value.shape == () for value in info.values())
        with pytest.raises(DataDependentOutputException):
            float(next(iter(info.values())))

@each_step
def test_an_update_in_bfloat16(algo, clone):
    infos = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        agent, replay = agent_and_replay(algo, precision=precision, free_nats=0.0)
        torch.manual_seed(1)
        info = agent.update(replay, clone)
        infos.append({key: value.item() for key, value in info.items()})
    exact, rounded = infos
    assert rounded == approx(exact, rel=0.1, abs=0.05) and rounded != exact
    assert all(p.dtype == torch.float32 for p in agent.parameters())

def test_recorded_steps_are_let_go():
    """A recorded step serves until the other kind follows, or loading replaces some tensors."""
    agent, replay = agent_and_replay()
    held = []
    for clone in (True, True, False, False):
        agent.update(replay, clone)
        held.append(agent.recorded[clone])
        assert set(agent.recorded) == {clone}
    assert held[0] is held[1] is not held[2] is held[3]
    state = agent.save()
    for optimizer in state["optimizers"].values():
        optimizer["adam"]["param_groups"][0]["capturable"] = True  # as written on CUDA
    agent.load(state)
    agent.update(replay)
    assert agent.recorded[False] is not held[3]
    assert not any(x.adam.param_groups[0]["capturable"] for x in agent.optimizers.values())
    with pytest.raises(RuntimeError):  # other networks
        agent_and_replay(units=17)[0].load(state)

@needs_cuda
@pytest.mark.parametrize("precision, rtol, atol", [("float32", 2e-3, 2e-4),
                                                   ("bfloat16", 2e-2, 2e-3)])
def test_a_graphed_update_is_the_eager_one(precision, rtol, atol):
    """Ten steps of each kind; an episode added after the recording; a gradient of NaN."""
    states = {}
    for graph in (True, False):
        torch.manual_seed(0)
        agent, replay = agent_and_replay(
            device="cuda", graph=graph, precision=precision, target_every=5, beta_end=0.5)
        torch.manual_seed(1)
        bias = agent.actor.layers[0].bias.data
        for clone, i in itertools.product((True, False), range(10)):
            if i == 6:  # one more of the same: other draws follow
                replay.add(replay.image[:21].cpu(), replay.action[:21].cpu())
            kept = bias.clone()
            bias.add_(math.nan if i == 8 else 0)
            agent.update(replay, clone, progress=i / 10)
            if i == 8:
                bias.copy_(kept)
            agent.report(replay)
            agent.act(np.zeros((2, 64, 64, 3), np.uint8))
        assert graph == (getattr(agent.recorded[False], "graph", None) is not None)
        assert agent.optimizers["actor"].skipped[0] == 2
        states[graph] = agent.save()
    assert all(map(torch.equal, states[True]["rng_cuda"], states[False]["rng_cuda"]))
    for name, value in states[True]["modules"].items():
        near(value.cpu(), states[False]["modules"][name].cpu(), rtol, atol)

@needs_cuda
def test_a_step_that_cannot_be_recorded():
    """One line names the remedy. In a process of its own: CUDA draws no numbers afterwards."""
    code = ('import cmil, torch; draw = lambda *_: torch.rand(2, device="cuda").sum().item();'
            'step = cmil.CudaGraph(draw); [step(None, False) for _ in range(6)]')
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--no-graph" in run.stderr

@needs_cuda
@pytest.mark.parametrize("graph", [True, False])
@each_step
def test_an_update_does_not_synchronise_with_the_host(algo, clone, graph):
    agent, replay = agent_and_replay(algo, device="cuda", graph=graph)
    for i in range(10):
        torch.cuda.set_sync_debug_mode("default" if i < 5 else "error")
        try:
            agent.update(replay, clone)
        finally:
            torch.cuda.set_sync_debug_mode("default")

# === Replay =======================================================================================

def test_replay_windows(monkeypatch):
    """Windows are rows of one episode with their own actions; all starts are drawn, evenly."""
    replay, starts, k = cmil.Replay(25, 4, 1, CPU), [], 0
    for i, rows in enumerate((9, 4, 12)):  # two demos, one of exactly one window
        ids = torch.arange(k, k + rows)  # in an episode's pixels and actions
        image = ids.to(torch.uint8)[:, None, None, None].expand(rows, 64, 64, 3)
        replay.add(image, ids[:, None] / 100, demo=i < 2)
        starts.append(set(range(k, k + rows - 3)))
        k += rows
    played = replay.draw(replay.n_demo_starts, replay.n_starts, 1000)
    for (image, action), expected in ((replay.sample(1000), set.union(*starts)),
                                      (replay.sample(1000, 1.0), starts[0] | starts[1]),
                                      (played, starts[2])):
        assert image.shape == (4, 1000, 64, 64, 3) and image.dtype == torch.uint8
        rows = image[:, :, 0, 0, 0].long()
        assert (image == rows[:, :, None, None, None]).all()
        near(action[..., 0], rows / 100)
        assert (rows == rows[0] + torch.arange(4)[:, None]).all()
        count, share = torch.bincount(rows[0]), 1000 / len(expected)
        assert set(rows[0].tolist()) == expected
        assert (count[sorted(expected)] - share).abs().max() < 5 * math.sqrt(share)
    for edge, expected in ((0.0, 0), (1.0, 21)):  # even 1 (rounding) is no window behind the last
        monkeypatch.setattr(torch, "rand", lambda n, device, u=edge: torch.full((n,), u))
        rows = replay.sample(5)[0][..., 0, 0, 0]
        assert (rows == expected + torch.arange(4)[:, None]).all()

# === It learns ====================================================================================

def test_pretraining_learns():
    """Losses fall far; unseen actions are predicted better than by the best constant action."""
    demos = demonstrations.load_demos("", "point")
    agent, _ = agent_and_replay(conv_depth=8, stoch=16, deter=64, hidden=64, units=64, lr=3e-3)
    replay = cmil.Replay(600, 8, 2, CPU)
    for demo in demos[:-2]:
        replay.add(demo["image"], demo["action"], demo=True)
    info = [agent.update(replay, clone=True) for _ in range(200)]
    recon, bc = (np.array([float(line[key]) for line in info]) for key in ("recon", "bc"))
    assert recon[-20:].mean() < 0.05 * recon[:5].mean()
    assert bc[-20:].mean() < bc[:5].mean() - 0.3
    image, action = (np.stack([demo[key] for demo in demos[-2:]], 1) for key in ("image", "action"))
    carry, error = None, 0
    for x, a in zip(image[:-1], action[1:]):
        guess, (state, _) = agent.act(x, carry, sample=False)
        carry = state, torch.tensor(a)
        error += ((guess - a) ** 2).sum()
    assert error < 0.9 * ((action[1:] - action[1:].mean((0, 1))) ** 2).sum()

@pytest.mark.parametrize("algo, steps, flags", [
    ("cmil", 90, dict(lr=3e-3, disc_lr=3e-3, gamma=0.5, alpha=0.0, beta=0.0, sigma=0.5)),
    ("ditto", 80, dict(lr=3e-3, gamma=0.9)),
    ("pdac", 200, dict(lr=1.5e-3, disc_lr=5e-3, gamma=0.2, batch=6, units=32, disc_units=32))])
def test_the_policy_learns_what_the_expert_does(algo, steps, flags, monkeypatch):
    """pdac's expert acts one way in the dark, the other way in the light: it cannot be blind."""
    agent, replay = agent_and_replay(algo, **flags)
    expert = np.float32([[-0.9, 0.9], [0.9, -0.9] if algo == "pdac" else [-0.9, 0.9]])
    for episode in range(4):
        rows, light = slice(21 * episode, 21 * episode + 21), episode % 2
        replay.image[rows] = replay.image[rows] // 6 + 200 * light
        if episode < 2:  # the demonstrations
            replay.action[rows] = torch.tensor(expert[light])
    if algo == "ditto":  # in a model that stays as it is, and in which actions matter
        agent.world.rssm.input.weight.data[:, -2:] *= 5
        monkeypatch.setattr(agent.optimizers["world"], "step", lambda grads: torch.zeros(()))
    pictures = np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in (20, 220)])
    before = np.abs(agent.act(pictures, sample=False)[0] - expert).max()
    for _ in range(steps):
        agent.update(replay)
    after = np.abs(agent.act(pictures, sample=False)[0] - expert).max()
    assert after < 0.3 and before > 0.6, (before, after)

@pytest.mark.stress
def test_cmil_beats_its_own_start_on_point(tmp_path):
    """The small preset on point (minutes): far more episodes succeed than after cloning alone."""
    words = ["--env", "point", "--preset", "small", "--seed", "3", "--logdir", str(tmp_path),
             "--eval-every", "6000", "--eval-episodes", "50", "--device", "cpu"]
    subprocess.run([sys.executable, HERE / "cmil.py", *words], check=True, cwd=HERE)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    success = [line["eval/success"] for line in lines if "eval/success" in line]
    assert success[-1] > success[0] + 0.25, success

# === Tools for whole runs =========================================================================

def run_config(logdir, **changes):
    """A run of a second: 5 rounds of 10 steps; two seed rounds, then 4 updates a round."""
    small = dict(
        preset="debug", env="point", device="cpu", threads=1, num_envs=1, logdir=str(logdir),
        episode_steps=10, steps=50, seed_steps=20, eval_every=20, train_ratio=0.4,
        pretrain=7, log_every=3, target_every=5, batch=2, length=6, horizon=3, conv_depth=2,
        lr_decay=0.5, beta_end=0.5)
    return cmil.Config(**{**cmil.PRESETS["debug"], **small, **changes})

TWO = dict(num_envs=2, steps=80, train_ratio=0.2, eval_every=40)  # 4 rounds, two processes

def run_train(logdir, stop_at=None, by=signal.SIGTERM, **changes):
    """Train, or stop by a signal when `stop_at` updates are made -> state, metrics."""
    trainer, handler = cmil.Trainer(run_config(logdir, **changes)), signal.getsignal(by)
    update = trainer.update
    def update_and_stop(clone):
        update(clone)
        if trainer.agent.updates == stop_at:
            signal.raise_signal(by)
    trainer.update = update_and_stop
    assert trainer.run() == (stop_at is None)
    assert trainer.stop_reason == (by.name if stop_at else "")
    assert signal.getsignal(by) is handler
    return trainer.agent.save(), run_metrics(logdir)

def run_metrics(logdir):
    """The lines of metrics.jsonl without their times."""
    lines = (Path(logdir) / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "time": 0} for line in lines]

def run_updates(logdir):
    return torch.load(logdir / "checkpoint.pt", weights_only=True)["agent"]["updates"]

def at_each_act(trainer, function):
    """Call function(number) before the agent acts for the `number`-th time."""
    act, counter = trainer.agent.act, itertools.count(1)
    def act_too(*args):
        function(next(counter))
        return act(*args)
    trainer.agent.act = act_too

def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def run_words(c):
    """The command line of a config, every field a flag."""
    fields = [(cmil.flag(name), value) for name, value in dataclasses.asdict(c).items()]
    switches = [f"--{'' if on else 'no-'}{flag[2:]}" for flag, on in fields if type(on) is bool]
    pairs = [(flag, str(value)) for flag, value in fields if type(value) is not bool]
    return [*switches, *itertools.chain(*pairs)]

def refused(capsys, function, *args):
    """Call what must end with exit code 2 and one line on stderr -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("cmil: error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run from start to end: folder, final state, metrics."""
    torch.manual_seed(123)  # must not matter
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, *run_train(folder)

@pytest.fixture(scope="module")
def uninterrupted_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted_two")
    return folder, *run_train(folder, **TWO)

# === Evaluation ===================================================================================

def test_seeds_of_streams_never_meet():
    drawn = [seed for run in range(3) for stream in (cmil.TRAIN, cmil.EVALUATE, cmil.FINAL)
             for seed in cmil.env_seeds(run, stream, 0, 250)]
    assert len(set(drawn)) == len(drawn) == 2250
    assert all(0 <= seed < 2**31 for seed in drawn)
    assert cmil.env_seeds(1, 2, 3, 4) == cmil.env_seeds(1, 2, 0, 7)[3:]

class ParitySteps:
    """A vector environment: success at step 3 if the reset seed is even."""
    def __init__(self, num_envs):
        self.num_envs, self.seeds, self.actions = num_envs, [], []
        self.action_space = gym.spaces.Box(-1, 1, (num_envs, 2))

    def reset(self, seed):
        self.seed, self.t = np.array(seed), 0
        self.seeds += seed
        return np.zeros((self.num_envs, 64, 64, 3), np.uint8), {}

    def step_async(self, action):
        self.t += 1
        self.actions.append(action.copy())

    def step_wait(self, timeout):
        done = (self.seed % 2 == 0) & (self.t >= 3)
        image = np.full((self.num_envs, 64, 64, 3), self.t, np.uint8)
        info = {"success": done, "log/tasks": 2.0 * done}
        return image, np.ones(self.num_envs) * self.t, None, None, info

@pytest.mark.parametrize("num_envs", [1, 2, 5])
def test_rollouts(num_envs, tmp_path):
    """7 episodes with the seeds and noise of their numbers, however many run at a time."""
    agent = cmil.Agent(run_config(tmp_path), 2, torch.device("cpu"))
    vec, before = ParitySteps(num_envs), torch.get_rng_state()
    results, video = cmil.rollouts(agent, vec, 4, 7, 0, cmil.EVALUATE, True, cmil.Progress())
    seeds = cmil.env_seeds(0, cmil.EVALUATE, 0, 7)
    assert vec.seeds[:7] == seeds
    assert results["success"].tolist() == [float(seed % 2 == 0) for seed in seeds]
    assert results["tasks"].tolist() == (2 * results["success"]).tolist()
    assert results["return"].tolist() == [10.0] * 7  # 1 + 2 + 3 + 4
    assert video[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(before, torch.get_rng_state())
    carry = None
    for t in range(4):  # episode 6 by hand
        torch.manual_seed(seeds[6] + t)
        action, carry = agent.act(np.full((1, 64, 64, 3), t, np.uint8), carry)
        assert np.array_equal(vec.actions[6 // num_envs * 4 + t][6 % num_envs], action[0])

def test_training_episodes_have_their_own_resets(uninterrupted, uninterrupted_two):
    """Episode i begins alike with one environment (round i) and two (round i // 2)."""
    one = [cmil.read_episode(uninterrupted[0], i, 0)[0][0] for i in range(5)]
    two = [cmil.read_episode(uninterrupted_two[0], i // 2, i % 2)[0][0] for i in range(5)]
    assert (np.array(one) == two).all() and len({image.tobytes() for image in one}) == 5

def test_eval_prints_one_json_object(uninterrupted, tmp_path, monkeypatch, capsys):
    """Modes, then samples, on the seeds of FINAL; modes by hand; a film; longer episodes."""
    folder, answers, acted = uninterrupted[0], [], []
    files, act = files_in(folder), cmil.Agent.act
    def noted(self, image, carry=None, sample=True):
        acted.append(sample)
        return act(self, image, carry, sample)
    monkeypatch.setattr(cmil.Agent, "act", noted)
    words = f"--eval {folder} --episodes 3 --episode-steps 12 --seed 7 --video {tmp_path}/x.gif"
    for _ in range(2):
        cmil.main(words.split())
        [line] = capsys.readouterr().out.splitlines()
        answers.append(json.loads(line))
    assert answers[0] == answers[1] and acted == 2 * (36 * [False] + 36 * [True])
    assert answers[0].keys() == {"episodes", "seed", "update", "modes", "sampled"}
    assert [answers[0][key] for key in ("episodes", "seed", "update")] == [3, 7, 19]
    for kind in ("modes", "sampled"):
        low, high = answers[0][kind]["success_ci95"]
        assert 0 <= low <= answers[0][kind]["success"] <= high <= 1
    assert files_in(folder) == files
    from PIL import Image, ImageSequence
    with Image.open(tmp_path / "x.gif") as gif:  # equal neighbours are stored as one, longer
        shown = sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif))
        assert gif.size == (256, 256) and shown == pytest.approx(13 * 1000 / 12, rel=0.05)
    policy, env = cmil.load_policy(folder), envs.make_env("point", episode_steps=12)
    totals = []
    for seed in cmil.env_seeds(7, cmil.FINAL, 0, 3):
        image, carry, total = env.reset(seed=seed)[0], None, 0.0
        for _ in range(12):
            action, carry = policy.act(image[None], carry, sample=False)
            image, reward, *_ = env.step(action[0])
            total += reward
        totals.append(total)
    assert answers[0]["modes"]["return"] == np.mean(totals)

# === Training =====================================================================================

PROMISED = """step update recon kl bc disc/expert disc/policy disc/gap uncertainty skipped reward
    uncertainty_expert lambda_return critic/model critic/data grad/world grad/actor grad/disc
    grad/critics""".split()

def test_a_run_does_what_its_schedule_says(uninterrupted):
    """Updates, steps, evaluations, episodes, names and files, worked out by hand."""
    folder, state, lines = uninterrupted
    # 7 updates of pretraining; 50 steps in 5 rounds; the last three earn 30 * .4 = 12.
    assert state["updates"] == 19 and lines[-1]["step"] == 50
    assert [line["update"] for line in lines if "recon" in line] == [3, 6, 9, 12, 15, 18]
    assert [line["step"] for line in lines if "eval/success" in line] == [0, 20, 40, 50]
    played = [line for line in lines if "train/success" in line]
    assert [(line["step"], line["update"]) for line in played] == [
        (10, 7), (20, 7), (30, 11), (40, 15), (50, 19)]  # two seed rounds earn nothing
    assert all(0 <= line["train/success"] <= 1 for line in played)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert set(PROMISED) <= set(lines[-3])
    assert {"eval/success", "eval/return"} <= set(lines[-1])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line.get("skipped", 0) == 0 for line in lines)
    image, action = cmil.read_episode(folder, 0, 0)
    assert image.shape == (11, 64, 64, 3) and image.dtype == np.uint8
    assert action.shape == (11, 2) and not action[0].any() and (action[1:] != 0).any(1).all()
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"] == dataclasses.asdict(run_config(folder))
    assert {"torch", "numpy", "gymnasium"} <= set(stored["versions"])
    assert sorted(str(path.relative_to(folder)) for path in files_in(folder)) == [
        "checkpoint.prev.pt", "checkpoint.pt", "config.json",
        *(f"episodes/r{i:06d}-w0.npz" for i in range(5)), "metrics.jsonl",
        *(f"videos/eval-{step:07d}.gif" for step in (0, 20, 40, 50))]

def test_same_command_same_metrics(uninterrupted_two, tmp_path):
    """Another process makes the same run, though its reader goes away (cmil.py | head -1)."""
    words = [sys.executable, HERE / "cmil.py", *run_words(run_config(tmp_path, **TWO))]
    with subprocess.Popen(words, text=True, cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as run:
        assert "cmil on point" in run.stdout.readline()
        run.stdout.close()
        assert "Traceback" not in run.stderr.read()
        assert run.wait(timeout=300) == 0
    assert run_metrics(tmp_path) == uninterrupted_two[2]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert same(saved["agent"], uninterrupted_two[1])

def test_logging_does_not_change_learning(uninterrupted, tmp_path):
    """Nor do evaluations. Another seed makes other networks and other episodes."""
    state, lines = run_train(tmp_path / "same", log_every=1, eval_every=10)
    assert same(state, uninterrupted[1])
    assert all(line in lines for line in uninterrupted[2] if "eval/success" in line)
    other = run_train(tmp_path / "other", seed=1, steps=10)[1]
    assert other[0]["recon"] != uninterrupted[2][0]["recon"]
    first = [cmil.read_episode(tmp_path / name, 0, 0)[0][0] for name in ("same", "other")]
    assert (first[0] != first[1]).any()

def test_a_finished_run_can_go_on_but_not_be_shortened(tmp_path, capsys):
    """config.json keeps the first start's facts; every later start adds its own."""
    short = dict(pretrain=2, seed_steps=10, eval_every=1000)
    run_train(tmp_path, steps=10, **short)
    first = json.loads((tmp_path / "config.json").read_text())
    git = ["git", "-C", HERE, "rev-parse", "HEAD"]
    assert first["commit"] == subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert "resumed" not in first and first["update"] == 0
    state, lines = run_train(tmp_path, steps=20, **short)
    assert lines[-1]["step"] == 20 and state["updates"] == 6
    assert run_train(tmp_path, steps=20, **short)[1] == lines  # nothing left to do
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("resumed") == [
        {**{name: value for name, value in first.items() if name != "config"}, "update": update}
        for update in (2, 6)]
    assert stored == {**first, "config": {**first["config"], "steps": 20}}
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for changes, words in ((dict(steps=10), "has made 20"),
                           (dict(steps=20, num_demos=1), "has other demonstrations")):
        assert words in refused(capsys, partial(run_train, tmp_path, **short, **changes))
        gc.collect()  # so that the run's lock goes
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and run_metrics(tmp_path) == lines

def test_offline_method_takes_no_environment_steps(tmp_path):
    """dbc: the demos alone, and as many updates as the online run."""
    dbc = dict(algo="dbc", **cmil.METHODS["dbc"][1])
    state, lines = run_train(tmp_path, **dbc)
    assert state["updates"] == 19 and lines[-1]["step"] == 50
    assert not (tmp_path / "episodes").exists()
    assert not any("disc/gap" in line for line in lines)
    for name in ("disc", "critics"):  # they have never stepped
        assert state["optimizers"][name]["adam"]["state"] == {}
    run_train(tmp_path / "stopped", 13, **dbc)
    again, resumed = run_train(tmp_path / "stopped", **dbc)
    assert resumed == lines and same(again, state)

def test_learning_rates_and_beta_fall(tmp_path, monkeypatch):
    """19 updates. In the second half the rates are a share of what is left; beta falls to half."""
    monkeypatch.setattr(cmil.Learner, "take_steps",
                        lambda agent, *_: {"beta": agent.beta, "lr": agent.optimizers["world"].lr})
    _, lines = run_train(tmp_path, algo="dbc", log_every=1, **cmil.METHODS["dbc"][1])
    seen = [[line["beta"], line["lr"] / 3e-4] for line in lines if "beta" in line]
    near(seen, [[10 * 0.5 ** (i / 19), min(1, 2 - 2 * i / 19)] for i in range(19)], rtol=1e-5)

@pytest.mark.parametrize("log_every", [5, 1000])
def test_non_finite_gradients(log_every, tmp_path, capsys, monkeypatch):
    """Such updates are skipped and counted; ten in a row end the run, nine do not."""
    clone_loss, counter = cmil.clone_loss, itertools.count(1)
    bad = {2, *range(12, 21), 30, *range(41, 51)}
    def spoiled(*args):
        return clone_loss(*args) * (math.nan if next(counter) in bad else 1)
    monkeypatch.setattr(cmil, "clone_loss", spoiled)
    changes = dict(pretrain=24, seed_steps=10, steps=50, train_ratio=1.2, log_every=log_every)
    line = refused(capsys, partial(run_train, tmp_path, **changes))
    assert re.search("ten non-finite actor gradients in a row; .*--lr", line)
    counts = {line["update"]: line.get("skipped") for line in run_metrics(tmp_path)}
    if log_every == 5:
        assert [counts[update] for update in (5, 10, 25, 35)] == [1, 1, 10, 11]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    assert saved["updates"] == 48
    assert all(value.isfinite().all() for value in saved["modules"].values())

def test_minutes(tmp_path, capsys):
    for _ in range(2):
        cmil.main(run_words(run_config(tmp_path, minutes=0.005, pretrain=10**6)))
        out = capsys.readouterr().out
        assert "stopped (--minutes 0.005) at step 0: the same command resumes" in out

def test_progress(monkeypatch, capsys):
    """The rate and the time left by a clock of this test; silent for ten seconds."""
    now = [5.0]
    monkeypatch.setattr(cmil, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    progress = cmil.Progress()
    for now[0], phase, done in ((5, "training", 100), (14, "training", 130),
            (25, "training", 140), (30, "evaluating", 0), (130, "evaluating", 10)):
        progress.show(phase, done, 1000)
    assert "".join(capsys.readouterr()).splitlines() == [
        "training 140/1000, 2 a second, 7 minutes left",  # 40 in 20 s; 860 / 2 / 60
        "evaluating 10/1000, 0.1 a second, 165 minutes left"]  # 10 in 100 s; 990 / .1 / 60

def test_padded_steps_have_no_action(tmp_path, monkeypatch):
    step = envs.Point._step
    def over_after_seven(self, action):
        self.padded = self._t >= 7
        return step(self, action)
    monkeypatch.setattr(envs.Point, "_step", over_after_seven)
    run_train(tmp_path, steps=10, pretrain=2)
    action = cmil.read_episode(tmp_path, 0, 0)[1]
    assert (action != 0).any(1).tolist() == [False] + [True] * 7 + [False] * 3

# === Faults: each ends as the uninterrupted run ===================================================

def stopped(folder, by, *moments):
    """Stop by a signal at update `at`; the checkpoint has `kept` of them."""
    for at, kept in moments:
        run_train(folder, at, by)
        assert run_updates(folder) == kept

def stopped_in_an_evaluation(folder):
    """Stop at the first evaluation's third step: the other steps are not waited for."""
    trainer, moments = cmil.Trainer(run_config(folder)), []
    def stop(number):
        moments.append(number)
        trainer.stop_reason = "test" if number == 3 else ""
    at_each_act(trainer, stop)
    assert not trainer.run() and moments == [1, 2, 3]

def log_longer_than_checkpoint(folder):
    """Give a finished run round 3's checkpoint back; the log ends in half a line."""
    run_train(folder, 13)
    old = (folder / "checkpoint.pt").read_bytes()
    run_train(folder)
    (folder / "checkpoint.pt").write_bytes(old)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 250, "half a li')

def strike_at(call, name, number, act):
    """Call act() before os.fsync or os.replace of file `name` for the `number`-th time."""
    original, seen = getattr(os, call), []
    def struck(*args):
        path = os.readlink(f"/proc/self/fd/{args[0]}") if call == "fsync" else args[1]
        seen.append(str(path).endswith(name))
        if seen[-1] and sum(seen) == number:
            if call == "fsync" and name.endswith(".tmp"):  # half of it has been written
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            act()
        return original(*args)
    setattr(os, call, struck)

FORKS = multiprocessing.get_context("forkserver")  # it imports torch once for all
FORKS.set_forkserver_preload(["cmil"])

def run_struck(folder, numbers, *where):
    strike_at(*where, lambda: [signal.raise_signal(number) for number in numbers])
    cmil.main(run_words(run_config(folder)))

def struck_down(folder, code, *numbers_and_where):
    """Signals reach a process while it writes a file; it ends with `code`."""
    process = FORKS.Process(target=run_struck, args=(folder, *numbers_and_where))
    process.start()
    process.join()
    assert process.exitcode == code
    assert bool(list(folder.rglob("*.tmp"))) == (code != 0)  # in the middle of something

def disk_full(folder, *where):
    """The disk is full at some file: that is the error, and the last checkpoint is whole."""
    def fail():
        raise OSError(28, "No space left on device")
    trainer = cmil.Trainer(run_config(folder))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", os.fsync)  # so that it is restored
        strike_at("fsync", *where, fail)
        trainer.run()
    assert run_updates(folder) >= 7

def workers_killed(folder, moments, stop_reason=""):
    """kill -9 workers at these acts; new ones complete the run, if it was not told to stop."""
    trainer, killed = cmil.Trainer(run_config(folder, **TWO)), []
    def kill(number):
        if number in moments:
            killed.append(trainer.vec.processes[len(killed) % 2])
            trainer.stop_reason = stop_reason
            killed[-1].kill()
            killed[-1].join()
    at_each_act(trainer, kill)
    assert trainer.run() == (not stop_reason) and len(killed) == len(moments)
    assert (killed[-1] in trainer.vec.processes) == bool(stop_reason)

def workers_stopped(folder, killed):
    """A worker with a step in hand is killed when the other one has answered, or hangs."""
    trainer = cmil.Trainer(run_config(folder, **TWO))
    vec, wait = trainer.vec, trainer.vec.step_wait
    def step_wait(timeout):
        assert timeout == 300 and vec.parent_pipes[1].poll(60)
        if killed:
            vec.processes[0].kill()
        return wait(timeout=60 if killed else 0.2)
    def halt(number):
        if number == 25:
            os.kill(vec.processes[0].pid, signal.SIGSTOP)
            vec.step_wait = step_wait
    at_each_act(trainer, halt)
    assert trainer.run() and trainer.vec is not vec

def run_flip(data, position=5000):
    return data[:position] + bytes([data[position] ^ 64]) + data[position + 1:]

def checkpoint_damaged(folder, damage):
    """--eval uses the checkpoint before, and prints nothing but its JSON."""
    run_train(folder, 13)
    newest = folder / "checkpoint.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    before = files_in(folder)
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        cmil.main(["--eval", str(folder), "--episodes", "1"])
    assert "checkpoint.pt cannot be read" in error.getvalue()
    assert json.loads(out.getvalue())["update"] == 7  # the newest had 11
    assert files_in(folder) == before
    run_train(folder, 10)  # goes back to it, too

KILL, TERM = [signal.SIGKILL], [signal.SIGTERM]
INTERRUPTIONS = {  # name -> function, what it is called with
    "stopped in pretraining": (stopped, signal.SIGINT, (4, 3)),
    "stopped in a round": (stopped, signal.SIGTERM, (13, 11)),
    "stopped in an evaluation": (stopped_in_an_evaluation,),
    "stopped four times": (stopped, signal.SIGUSR1, (2, 0), (7, 6), (9, 7), (19, 15)),
    "killed in a checkpoint": (struck_down, -9, KILL, "fsync", "checkpoint.pt.tmp", 9),
    "killed between the two renames": (struck_down, -9, KILL, "replace", "checkpoint.pt", 7),
    "killed in an episode": (struck_down, -9, KILL, "fsync", "r000003-w0.npz.tmp", 1),
    "a signal": (struck_down, 0, TERM, "replace", "r000002-w0.npz", 1),
    "a second signal": (struck_down, 143, TERM * 2, "fsync", "checkpoint.pt.tmp", 10),
    "log longer than the checkpoint": (log_longer_than_checkpoint,),
    "disk full at a checkpoint": (disk_full, "checkpoint.pt.tmp", 8),
    "disk full at an episode": (disk_full, "r000002-w0.npz.tmp", 1),
    "disk full at the log": (disk_full, "metrics.jsonl", 6),
    "disk full at a film": (disk_full, ".gif.tmp", 2),
    "checkpoint truncated": (checkpoint_damaged, lambda data: data[:5000]),
    "checkpoint empty": (checkpoint_damaged, lambda data: b""),
    "bit of the checkpoint flipped": (checkpoint_damaged, run_flip),
    "workers killed": (workers_killed, (3, 17, 55)),
    "workers killed in mid-step": (workers_stopped, True),
    "workers hang": (workers_stopped, False),
    "workers killed with the run": (workers_killed, (25,), "SIGTERM"),
}

@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_interrupted(name, request, tmp_path):
    """Resumed, state and metrics are the uninterrupted run's, bit for bit."""
    two = name.startswith("workers")
    _, state, lines = request.getfixturevalue("uninterrupted_two" if two else "uninterrupted")
    interrupt, *arguments = INTERRUPTIONS[name]
    interrupt(tmp_path, *arguments)
    torch.manual_seed(99)  # a new process has other random numbers, too
    again, resumed = run_train(tmp_path, **(TWO if two else {}))
    assert resumed == lines and same(again, state)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list((tmp_path / "episodes").iterdir())) == (8 if two else 5)

def test_workers_that_always_die_end_the_run(tmp_path, capsys):
    assert "died four times" in refused(capsys, workers_killed, tmp_path, (1, 3, 5, 7))
    assert run_updates(tmp_path) == 7

def run_field(text, **change):
    """Change a field in the text of a config.json."""
    stored = json.loads(text)
    return json.dumps({**stored, "config": {**stored["config"], **change}}).encode()

UNREADABLE = {  # what is damaged -> files, how (None: they are gone), words of the line
    "checkpoints": ("checkpoint*.pt", run_flip, "checkpoint.prev.pt cannot be read"),
    "no checkpoints": ("checkpoint*.pt", None, "has metrics but no checkpoint"),
    "episode": ("episodes/r000001*", lambda x: run_flip(x, 400), "w0.npz cannot be read"),
    "no episode": ("episodes/r000001*", None, "r000001-w0.npz cannot be read"),
    "no config": ("config.json", None, "config.json is missing"),
    "config of text": ("config.json", lambda x: b"{", "config.json is"),
    "unknown field": ("config.json", partial(run_field, warp=1), "config.json is"),
    "text for a number": ("config.json", partial(run_field, deter="16"), "config.json is"),
    "out of bounds": ("config.json", partial(run_field, length=0), "--length 0"),
}

@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_resumed(what, uninterrupted, tmp_path, capsys):
    """Nor evaluated, episodes aside; nothing is changed, and restored it serves."""
    run, (pattern, damage, words) = tmp_path / "run", UNREADABLE[what]
    shutil.copytree(uninterrupted[0], run)
    whole = {path: path.read_bytes() for path in run.glob(pattern)}
    for path, data in whole.items():
        path.unlink()
        if damage:
            path.write_bytes(damage(data))
    before = files_in(run)
    assert words in refused(capsys, cmil.main, run_words(run_config(run)))
    gc.collect()  # so that the run's lock goes
    if "episode" not in what:
        refused(capsys, cmil.main, ["--eval", str(run)])
    assert files_in(run) == before
    for path, data in whole.items():
        path.write_bytes(data)
    assert run_train(run)[1] == uninterrupted[2]

def test_one_run_has_one_writer(tmp_path, capsys):
    c = run_config(tmp_path, steps=10, pretrain=2)
    trainer, before = cmil.Trainer(c), files_in(tmp_path)
    assert "in use by another process" in refused(capsys, cmil.main, run_words(c))
    assert files_in(tmp_path) == before
    assert trainer.run() and cmil.Trainer(c).run()

@pytest.mark.stress
def test_killed_twenty_times(tmp_path):
    changes = dict(num_envs=2, steps=1000)
    state, lines = run_train(tmp_path / "calm", **changes)
    seed = int(time.time())
    print("seed", seed)  # pytest shows it if the test fails
    rng = np.random.default_rng(seed)
    words = run_words(run_config(tmp_path / "struck", **changes))
    for _ in range(20):
        with subprocess.Popen([sys.executable, HERE / "cmil.py", *words]) as run:
            time.sleep(rng.uniform(0, 12))  # while it starts, resumes, or works
            run.kill()
    again, resumed = run_train(tmp_path / "struck", **changes)
    assert resumed == lines and same(again, state)
    assert len(list((tmp_path / "struck/episodes").iterdir())) == 100

# === Command line =================================================================================

BAD_COMMANDS = [  # words, what the line names
    ("--alhpa 3", "--alhpa"), ("--alph 3", "--alph"), ("--alpha", "--alpha"), ("10", "10"),
    ("--alpha much", "--alpha"), ("--steps 1e5", "--steps"), ("--lr nan", "--lr nan"),
    ("--seed 100000000000000000000", "--seed"), ("--env nowhere", "nowhere"),
    ("--env no.such.module:Thing-v0", "no.such.module"), ("--algo gail", "--algo gail"),
    ("--algo ditto", "see experiments/baselines.py"), ("--graph on", "on"),
    ("--device cuda", "no CUDA device"), ("--length 60", "expected 59 or more"),
    ("--tasks microwave", "tasks"), ("--robot-noise-ratio 0.5", "robot_noise_ratio"),
    ("--demos /no/such/place", "/no/such/pl"), ("--num-demos 1000", "10 demonstrations"),
    ("--episode-steps 3", "expected 7 or more"), ("--reward none", "needs --offline"),
    ("--algo dbc --no-offline", "needs --offline"), ("--algo dbc --beta 0", "a --beta above 0"),
    ("--eval", "--eval"), ("--eval /no/such/run", "/no/such/run: no config.json"),
    ("--eval RUN --video x.avi", "--video"), ("--eval RUN --episodes 0", "--episodes"),
    ("--eval RUN --num-envs 0", "--num-envs 0"), ("--eval RUN --alpha 3", "--alpha belongs to"),
    ("--logdir RUN --alpha 3", "--alpha 3.0 (the run's: 10.0); give another --logdir"),
    ("--logdir RUN --no-data-critic", "--data-critic False (the run's: True)")]

@pytest.mark.parametrize("words, named", BAD_COMMANDS, ids=[words for words, _ in BAD_COMMANDS])
def test_mistakes_get_one_line(words, named, uninterrupted, tmp_path, capsys, monkeypatch):
    """The line names what was wrong; no folder is left behind, RUN is left as it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(cmil.METHODS, "ditto")  # baselines.py, imported above, has added it
    given = words.replace("RUN", str(uninterrupted[0])).split()
    if given[0] != "--eval":
        defaults = f"--preset debug --env point --logdir {tmp_path}/run --num-envs 1 --device cpu"
        given = [*defaults.split(), *given]
    before = files_in(uninterrupted[0])
    assert named in refused(capsys, cmil.main, given)
    assert not (tmp_path / "run").exists() and files_in(uninterrupted[0]) == before

def test_values_of_every_field_are_checked(capsys):
    """Its bounds are allowed; what lies beyond, NaN, or no choice is not."""
    checked = 0
    for field in dataclasses.fields(cmil.Config):
        limit, good, bad = field.metadata["limits"], [field.default], []
        if "choices" in limit:
            good, bad = limit["choices"], ["nonsense", ""]
        elif type(field.default) in (int, float):
            low, above, high = (limit.get(x, math.inf) for x in ("at_least", "above", "at_most"))
            good += filter(math.isfinite, (low, high))
            bad = [math.nan, *filter(math.isfinite, (low - 1e-6, above, high + 1e-6))]
        for value in good:
            cmil.check_config(cmil.Config(**{field.name: value}))
        for value in bad:
            line = refused(capsys, cmil.check_config, cmil.Config(**{field.name: value}))
            assert f"{cmil.flag(field.name)} {value}: expected " in line
            checked += 1
    assert checked > 80

def test_what_may_change_on_resume(uninterrupted, tmp_path):
    """All of RESUME_MAY_CHANGE takes effect; what is not given is the run's own."""
    changes = dict(steps=300, minutes=1.0, log_every=3, eval_every=70, eval_episodes=3,
                   threads=2, graph=False, demos="/moved/to.npz")
    assert set(changes) | {"logdir"} == set(cmil.RESUME_MAY_CHANGE)
    changed = run_config(uninterrupted[0], **changes)
    assert cmil.make_config(cmil.parse(run_words(changed))[0]) == changed
    few = cmil.make_config({"logdir": str(uninterrupted[0]), "env": "point", "preset": "auto"})
    assert few == run_config(uninterrupted[0])
    stored = dataclasses.asdict(run_config(tmp_path))
    del stored["reward_noise"]  # a run from before a field had its default
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    assert cmil.make_config({"logdir": str(tmp_path), "env": "point"}) == run_config(tmp_path)

def test_load_policy_needs_torch_and_numpy_alone(uninterrupted, tmp_path):
    """The trained agent's actions, and in the environment's units, without gymnasium."""
    run = shutil.copytree(uninterrupted[0], tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    stored.update(action_low=[-2.0, 0.0], action_high=[6.0, 1.0])
    (run / "config.json").write_text(json.dumps(stored))
    code = """
import json, sys
blocked = "mujoco gymnasium gymnasium_robotics OpenGL imageio matplotlib".split()
sys.modules.update(dict.fromkeys(blocked))  # importing these fails
import cmil
import numpy as np
agent, carry, actions = cmil.load_policy(sys.argv[1]), None, []
for level in (0, 100, 200):
    image = np.full((1, 64, 64, 3), level, np.uint8)
    action, carry = agent.act(image, carry, sample=False)
    actions.append([action[0].tolist(), agent.in_env_units(action[0]).tolist()])
print(json.dumps(actions))
"""
    answer = subprocess.run([sys.executable, "-c", code, run], cwd=HERE, text=True,
                            capture_output=True)
    assert answer.returncode == 0, answer.stderr
    agent, carry = cmil.Agent(run_config(run), 2, torch.device("cpu")), None
    agent.load(uninterrupted[1])
    for level, (action, own) in zip((0, 100, 200), json.loads(answer.stdout)):
        expected, carry = agent.act(np.full((1, 64, 64, 3), level, np.uint8), carry, False)
        np.testing.assert_array_equal(np.float32(action), expected[0])
        np.testing.assert_allclose(own, [2 + 4 * action[0], 0.5 + 0.5 * action[1]])

# === Figures ======================================================================================

def fake_run(folder, seed, algo="cmil", points=4, **extra):
    """A run folder whose success grows by (seed + 1) / 10 an evaluation."""
    folder.mkdir(parents=True)
    config = {"env": "kitchen", "algo": algo, "seed": seed, **extra}
    (folder / "config.json").write_text(json.dumps({"config": config}))
    lines = [{"step": 10 * i, "update": i, "time": 60.0 * i, "eval/success": i * (seed + 1) / 10,
              "eval/tasks": i / 2, "eval/return": i} for i in range(points)]
    lines.insert(1, {"step": 5, "recon": 3.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "eval/succ')  # being written
    return str(folder)

def run_script(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    module.main()

def test_curves_are_means_over_seeds(tmp_path):
    """The curve ends with the shortest seed; between its evaluations a seed is interpolated."""
    runs = [figures.read_run(fake_run(tmp_path / str(i), i, points=4 + i)) for i in range(3)]
    found = figures.curve(runs, "eval/success", "step")
    np.testing.assert_allclose(found, [  # of three values, the interval is their range
        [0, 10, 20, 30], [0, 0.2, 0.4, 0.6], [0, 0.1, 0.2, 0.3], [0, 0.3, 0.6, 0.9]])
    logs = [[{"step": 0, "y": 0}, {"step": 10, "y": 1}],
            [{"step": 5, "y": 4}, {"step": 9, "y": 8}]]
    runs = [run._replace(log=log) for run, log in zip(runs, logs)]
    x, mean, _, _ = figures.curve(runs, "y", "step")
    assert x.tolist() == [5, 9]
    np.testing.assert_allclose(mean, [(0.5 + 4) / 2, (0.9 + 8) / 2])

@pytest.mark.parametrize("x, last", [("step", 30), ("update", 3), ("time", 3)])
def test_what_a_figure_shows(x, last, tmp_path, monkeypatch):
    """Means as lines, their 95% intervals as bands, and the level of the demonstrations."""
    pytest.importorskip("matplotlib")
    runs = [fake_run(tmp_path / f"{algo}{seed}", seed, algo) for seed in range(5)
            for algo in ("cmil", "dbc")]
    saved = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args: saved.append(args[0]))
    run_script(monkeypatch, figures, *runs, "--x", x)
    success, tasks = saved[0].axes
    first, other, level = success.lines
    assert first.get_label() == "cmil (5 seeds)" and other.get_label() == "dbc (5 seeds)"
    assert first.get_color() != other.get_color()
    assert first.get_linestyle() != other.get_linestyle()
    at = np.arange(4) * last / 3  # steps, updates, minutes
    np.testing.assert_allclose(first.get_data(), [at, 0.3 * np.arange(4)])  # of .1 .2 .3 .4 .5
    low, high = cmil.bootstrap_ci([0.1, 0.2, 0.3, 0.4, 0.5])
    assert low > 0.15 and high < 0.45  # so not least and most
    band = success.collections[0].get_paths()[0].vertices
    band = band[np.isclose(band[:, 0], at[1]), 1]
    np.testing.assert_allclose([band.min(), band.max()], [low, high])
    assert [*level.get_ydata(), *tasks.lines[2].get_ydata()] == [1, 1, 4, 4]

def test_settings_are_curves_of_their_own(tmp_path, capsys):
    runs = [fake_run(tmp_path / name, seed, alpha=alpha, logdir=name)
            for name, seed, alpha in (("a", 0, 1.0), ("b", 1, 1.0), ("c", 0, 10.0))]
    curves = {name: len(seeds) for name, seeds in figures.read_runs(runs).items()}
    assert curves == {"cmil, alpha 1.0": 2, "cmil, alpha 10.0": 1}
    assert "its settings and " in refused(capsys, figures.read_runs, runs[:1] * 2)

def test_parts_of_the_bound(tmp_path):
    """Running means by a loop, scaled, from the discriminator on; the return is a gap."""
    values = np.random.default_rng(0).normal(size=40)
    log = [{"step": i, "disc/gap": 0.0, "uncertainty": value} for i, value in enumerate(values)]
    step, found = figures.bound_term([{"step": 0, "uncertainty": 99.0}, *log], "uncertainty")
    means = np.array([values[max(0, i - 2):i + 3].mean() for i in range(40)])
    np.testing.assert_allclose(found, (means - means.min()) / (means.max() - means.min()))
    assert step.tolist() == list(range(40))
    assert not figures.bound_term(log, "disc/gap")[1].any()  # a constant becomes zeros
    step, gap = figures.bound_term(figures.read_run(fake_run(tmp_path / "1", 1)).log, "eval/return")
    np.testing.assert_allclose([step, gap], [[0, 10, 20, 30], [1, 2 / 3, 1 / 3, 0]])

@pytest.mark.parametrize("kind", [("--x", "time"), ("--bound",), ("--open-loop",)])
def test_pictures_of_a_real_run(kind, uninterrupted, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run_script(monkeypatch, figures, uninterrupted[0], *kind, "--out", tmp_path / "x.png")
    import imageio.v3 as iio
    assert len(np.unique(iio.imread(tmp_path / "x.png"))) > 20

def test_weights_in_half_precision(uninterrupted, tmp_path, monkeypatch, capsys):
    """They suffice to load the policy and to evaluate it."""
    run, state, _ = uninterrupted
    shutil.copy(run / "config.json", tmp_path)
    run_script(monkeypatch, figures, "--weights", run, "--out", tmp_path / "checkpoint.pt")
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["modules"]
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    agent = cmil.load_policy(tmp_path)
    for name, weight in agent.state_dict().items():
        near(weight, state["modules"][name], rtol=1e-3, atol=1e-7)
    cmil.main(["--eval", str(tmp_path), "--episodes", "1"])
    assert json.loads(capsys.readouterr().out)["update"] == state["updates"]
    shutil.copy(run / "metrics.jsonl", tmp_path)
    assert "has weights alone" in refused(capsys, cmil.Trainer, run_config(tmp_path))

def test_table_of_methods(tmp_path, monkeypatch, capsys):
    runs = [fake_run(tmp_path / f"{algo}{i}", i, algo, offline=algo == "dbc")
            for algo in ("cmil", "dbc") for i in range(2)]
    for run, success in zip(runs, (0.5, 0.7, 0.1, 0.3)):
        modes = {"success": success, "success_ci95": [0, 1], "tasks": 4 * success, "return": 9}
        final = {"episodes": 100, "modes": modes}
        if "cmil" in run:
            final["sampled"] = {**modes, "success": success / 2}
        (Path(run) / "eval.json").write_text(json.dumps(final))
    run_script(monkeypatch, figures, "--table", *runs)
    assert capsys.readouterr().out == (
        "| method | success: modes / sampled | tasks completed: modes / sampled | seeds "
        "| episodes | steps | updates | minutes |\n" + 8 * "|---" + "|\n"
        "| cmil | 0.60 (0.50-0.70) / 0.30 (0.25-0.35) | 2.40 / 2.40 | 0, 1 "
        "| 100 | 30 | 3 | 3 |\n"
        "| dbc | 0.20 (0.10-0.30) / - | 0.80 / - | 0, 1 | 100 | 0 | 3 | 3 |\n")
    final["modes"] = {"success": 0.0, "success_ci95": [0, 0], "return": 9}  # and nothing else
    (Path(runs[2]) / "eval.json").write_text(json.dumps(final))
    run_script(monkeypatch, figures, "--table", runs[2])
    assert "| dbc | 9.00 / - | 0 | 100 | 0 | 3 | 3 |" in capsys.readouterr().out

# === Sweeps and speed =============================================================================

def test_sweep(tmp_path, monkeypatch, capsys):
    """A line of --dry-run makes one run: stopped, it ends with 3; then it is evaluated."""
    options = "--seeds 3 4 --episodes 1 --dry-run -- --env point --preset debug --threads 1"
    variants = ["--no-data-critic", "--sigma 0.5 --algo dbc"]
    run_script(monkeypatch, sweep, "--out", tmp_path, "--variants", *variants, *options.split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    words = shlex.split(lines[3])[2:]  # without python and the script
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, sweep, *words, "--pretrain", 5, "--minutes", 0.001)
    assert stopped.value.code == 3
    run_script(monkeypatch, sweep, *words, "--pretrain", 5)
    assert json.loads((tmp_path / "dbc-sigma-0.5-s4/eval.json").read_text())["episodes"] == 1
    assert "| dbc |" in capsys.readouterr().out

def test_bench(monkeypatch, capsys):
    """Rates by a clock that moves 1/3 s a look, over more than an episode of steps."""
    clock = itertools.count()
    pretended = types.SimpleNamespace(perf_counter=lambda: next(clock) / 3)
    monkeypatch.setattr(bench, "time", pretended)
    monkeypatch.setattr(cmil.Agent, "update", lambda self, replay, clone=False: None)
    words = "--env point --preset debug --device cpu --num-envs 2 --train-ratio 1.5"
    run_script(monkeypatch, bench, *words.split(), "--episode-steps", 20)
    line = json.loads(capsys.readouterr().out)  # nothing else is printed there
    # 3 turns a second: an update, a step of two environments, or such a step and its 3 updates.
    rates = [line["updates_per_s"], line["env_steps_per_s"], line["both"]["env_steps_per_s"],
             line["both"]["updates_per_s"]]
    assert rates == pytest.approx([3, 3 * 2, 3 * 2, 3 * 3], rel=0.05)
    assert line["seconds_per_update"] == 1 / line["updates_per_s"] and line["peak_mem_gb"] > 0

# === Environments: what all three promise =========================================================

@pytest.fixture(scope="module", params=["point", "kitchen", "baoding"])
def world_name(request):
    return request.param

@pytest.fixture(scope="module")
def world(world_name):
    with contextlib.closing(envs.make_env(world_name)) as env:
        yield env

@pytest.fixture(scope="module")
def hand():
    with contextlib.closing(envs.make_env("baoding")) as env:
        yield env

@pytest.fixture
def dark(monkeypatch):
    """Environments whose frames are not drawn: the physics alone, at a tenth of the time."""
    for made in (envs.Point, envs.Simulated, envs.Kitchen):
        monkeypatch.setattr(made, "draw", lambda env, qpos: np.zeros((64, 64, 3), np.uint8))

def played(env, seed, policy, steps=None):
    """The first steps -> images (t+1, ...), infos (t+1), (reward, terminated, truncated) (t, 3)."""
    image, info = env.reset(seed=seed)
    images, infos, outcomes = [image], [info], []
    for t in range(steps or env.episode_steps):
        image, *outcome, info = env.step(policy(t))
        images.append(image)
        infos.append(info)
        outcomes.append(outcome)
    return np.stack(images), infos, np.array(outcomes)

def randomly(env, seed=0):
    rng = np.random.default_rng(seed)
    return lambda t: rng.uniform(-1, 1, env.action_dim).astype(np.float32)

def one_line(named, function, *args, **options):
    """Call what must raise a UserError of one line with the word `named` -> that line."""
    with pytest.raises(envs.UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value) and str(named) in str(error.value)
    return str(error.value)

def test_environments_pass_gymnasiums_checks(world_name, world):
    check_env(world, skip_render_check=True)
    image, _ = world.reset(seed=0)
    assert image.shape == (64, 64, 3) and image.std() > 20
    expected = {"point": (50, 2), "kitchen": (280, 9), "baoding": (75, 20)}[world_name]
    assert (world.episode_steps, world.action_dim) == expected
    assert bool(world.gl_renderer) == (world_name != "point")

@pytest.mark.parametrize("name, options, steps", [
    ("point", {"episode_steps": 7}, 7), ("kitchen", {"tasks": "microwave"}, 75),
    ("baoding", {}, 75)])
def test_fixed_length_and_bad_actions(name, options, steps, dark):
    """Truncated exactly at step T, terminated never; info as promised; bad actions move nothing."""
    env = envs.make_env(name, **options)
    images, infos, outcomes = played(env, 0, randomly(env))
    assert images.shape == (steps + 1, 64, 64, 3) and images.dtype == np.uint8
    assert outcomes[:, 1:].tolist() == [[False, False]] * (steps - 1) + [[False, True]]
    for info in infos:
        assert info.pop("success") is info.pop("padded") is False
        assert all(key.startswith("log/") and isinstance(info[key], float) for key in info)
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros(env.action_dim))
    env.reset(seed=0)
    before = env.qpos
    bad = [np.zeros(env.action_dim - 1), np.zeros(env.action_dim + 1), np.zeros(())]
    for value in (np.nan, np.inf, -np.inf, 1.5, -2):
        bad.append(np.zeros(env.action_dim))
        bad[-1][1] = value
    for action in bad:  # MuJoCo would take some of them silently
        with pytest.raises(ValueError, match="action"):
            env.step(action)
        assert np.array_equal(env.qpos, before)
    env.step(np.full(env.action_dim, 1 + 1e-7))  # rounding

def test_a_reset_is_a_fresh_start_drawn_or_not(world_name, world, monkeypatch):
    """A used and a fresh environment go on alike, each bit; drawing disturbs no physics."""
    played(world, 3, lambda t: np.ones(world.action_dim), 10)
    with contextlib.closing(envs.make_env(world_name)) as fresh:
        images, infos, _ = played(world, 7, randomly(world), 5)
        again, same_infos, _ = played(fresh, 7, randomly(fresh), 5)
        assert np.array_equal(images, again) and infos == same_infos
        assert np.array_equal(world.qpos, fresh.qpos) and (images[0] != images[-1]).any()
        monkeypatch.setattr(world, "draw", lambda qpos: images[0])
        played(world, 7, randomly(world), 5)
        assert np.array_equal(world.qpos, fresh.qpos)
        played(world, 8, randomly(world), 5)
        assert not np.array_equal(world.qpos, fresh.qpos)

@pytest.mark.parametrize("name, options, named", [
    ("nowhere", {}, "nowhere"), ("nowhere:It-v0", {}, "nowhere"),
    ("WorldUnbounded-v0", {}, "bounded Box"), ("WorldEndless-v0", {}, "give episode_steps"),
    ("point", {"tasks": "tea"}, "tasks"), ("point", {"episode_steps": -5}, "episode_steps"),
    ("kitchen", {"tasks": "kettle+tea"}, "slide cabinet"),
    ("kitchen", {"robot_noise_ratio": -1.0}, "robot_noise_ratio")])
def test_bad_environments_get_one_line(name, options, named):
    one_line(named, envs.make_env, name, **options)

@pytest.mark.parametrize("n", [1, 2])
def test_vector_environments(n):
    """Lockstep, own seeds; a worker's error is raised here; Ctrl-C is for the learner alone."""
    vec = envs.make_vec("point", n)
    assert envs.env_info(vec) == {"episode_steps": 50, "action_dim": 2, "gl_renderer": "",
                                  "action_low": [-1, -1], "action_high": [1, 1]}
    image, _ = vec.reset(seed=list(range(n)))
    single = envs.make_env("point")
    for i in range(n):
        assert np.array_equal(image[i], single.reset(seed=i)[0])
    workers = getattr(vec, "processes", [])
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(50):
        vec.step_async(np.zeros((n, 2), np.float32))
        image, _, terminated, truncated, info = vec.step_wait(timeout=60)
    assert truncated.all() and not terminated.any() and image.shape == (n, 64, 64, 3)
    assert info["success"].shape == info["padded"].shape == (n,)
    assert all(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    vec.reset(seed=0)
    with pytest.raises(ValueError, match="finite"):
        vec.step(np.full((n, 2), np.nan, np.float32))
    envs.close(vec)

def test_stopped_and_killed_workers_are_closed_quickly():
    """In the middle of a step one worker hangs, one is gone, one is well."""
    vec = envs.make_vec("point", 3)
    vec.reset(seed=0)
    os.kill(vec.processes[0].pid, signal.SIGSTOP)
    vec.step_async(np.zeros((3, 2), np.float32))
    os.kill(vec.processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    envs.close(vec)
    assert time.monotonic() - began < 10
    assert not any(process.is_alive() for process in vec.processes)

# === OpenGL and drawing ===========================================================================

@pytest.fixture
def no_gl(monkeypatch):
    """A process in which no OpenGL has been chosen yet."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    envs.choose_gl.cache_clear()
    yield monkeypatch
    envs.choose_gl.cache_clear()

@pytest.mark.parametrize("setting, cause", [
    ({"MUJOCO_GL": "nonsense"}, "MUJOCO_GL=nonsense; RuntimeError: invalid value"),
    ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, "PYOPENGL_PLATFORM=osmesa; ImportError"),
    ({"PYOPENGL_PLATFORM": "left over"}, "timed out after 3 seconds; OSError: None")])
def test_without_gl(setting, cause, no_gl, tmp_path):
    """One line with what is set, the trials' own errors (egl may hang) and what to install."""
    for name, value in setting.items():
        no_gl.setenv(name, value)
    if "MUJOCO_GL" not in setting:
        (tmp_path / "mujoco.py").write_text("""
import os, time
time.sleep(60 * (os.environ["MUJOCO_GL"] == "egl"))
raise OSError(os.environ.get("PYOPENGL_PLATFORM"))
""")
        no_gl.setenv("PYTHONPATH", str(tmp_path))
        no_gl.setattr(envs, "GL_TIMEOUT", 3)
    assert cause in one_line("apt install libegl1", envs.choose_gl)
    assert os.environ.get("MUJOCO_GL") == setting.get("MUJOCO_GL")

def test_corners_of_a_mesh_are_merged(monkeypatch):
    """A hand-made strip: corners of one cube, faces without area and copies of a face go."""
    vert = np.array([[0, 0, 0], [1, 0, 0], [0.01, 0.01, 0], [0, 1, 0], [5, 5, 5.0]])
    face = np.array([[0, 1, 3], [0, 2, 3], [2, 1, 3], [1, 3, 4], [9, 9, 9]])
    model = types.SimpleNamespace(
        mesh_facenum=np.array([4, 1]), mesh_faceadr=np.array([0, 4]), mesh_vertadr=np.array([0, 5]),
        mesh_vertnum=np.array([5, 0]), mesh_vert=vert, mesh_face=face.copy(),
        mesh_facenormal=10 * face, mesh_texcoordadr=np.array([-1, -1]))
    monkeypatch.setattr(envs, "FINE_MESH", 3)
    envs.simplify_meshes(model, 0.1)
    assert model.mesh_facenum.tolist() == [2, 1]
    assert model.mesh_face[:2].tolist() == [[0, 1, 3], [1, 3, 4]]
    assert model.mesh_facenormal[:2].tolist() == [[0, 10, 30], [10, 30, 40]]
    assert model.mesh_face[4].tolist() == [9, 9, 9]  # of another mesh

def test_resizing_is_the_mean_over_areas():
    for height, width in ((40, 100), (128, 192)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        rows = image.repeat(64, 0).reshape(64, height, width, 3).mean(1)
        expected = rows.repeat(64, 1).reshape(64, 64, width, 3).mean(2)
        assert np.abs(envs.resize(image) - expected).max() < 0.501

# === Shipped demonstrations =======================================================================

def stored(name):
    with np.load(HERE / "demos" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)

def same_demos(first, second):
    """Whether two lists of loaded episodes are equal."""
    return len(first) == len(second) and all(
        np.array_equal(a["image"], b["image"]) and np.allclose(a["action"], b["action"], atol=1e-6)
        for a, b in zip(first, second))

def test_demos_replay_to_their_states(world_name, world, dark):
    """From their seeds alone (of the kitchen's, every fourth); tasks are done, success stays."""
    from recording import full_state
    demos = stored(world_name)
    count, every = {"point": (10, 1), "kitchen": (20, 4), "baoding": (20, 1)}[world_name]
    assert (HERE / "demos" / f"{world_name}.npz").stat().st_size <= 1e6
    assert len(set(demos["seed"].tolist())) == len(demos["seed"]) == count
    assert demos["action"].shape == (count, world.episode_steps, world.action_dim)
    assert demos["action"].std(0).mean() > 0.03  # over the demonstrations
    for i in range(0, count, every):
        world.reset(seed=int(demos["seed"][i]))
        assert world.completed == []  # nothing is left of an episode before
        np.testing.assert_allclose(full_state(world), demos["start"][i], atol=1e-9)
        qpos, success = [world.qpos], []
        for action in demos["action"][i]:
            success.append(world.step(action)[4]["success"])
            qpos.append(world.qpos)
        assert np.abs(np.array(qpos) - demos["qpos"][i]).max() < 1e-3, f"demo {i}"
        assert success[-1] and success == sorted(success)
        assert set(world.completed) == set(world.tasks) == set(world.tasks_in(demos["qpos"][i]))

def test_demo_images_are_the_environments(world_name, world):
    """action[t] led to image[t]: a demo's pictures are the frames of its actions repeated."""
    demos = stored(world_name)
    loaded, = demonstrations.load_demos("", world_name, 1, episode_steps=12)
    actions = demos["action"][0, :12]
    assert np.array_equal(loaded["action"], np.insert(actions, 0, 0, axis=0))
    assert loaded["action"].dtype == np.float32 and loaded["image"].dtype == np.uint8
    images, _, _ = played(world, int(demos["seed"][0]), lambda t: actions[t], 12)
    difference = np.abs(images.astype(int) - loaded["image"])  # (13, 64, 64, 3)
    # Another CPU's rounding may move an edge to the next pixel, by a little.
    assert difference.mean((1, 2, 3)).max() < 0.05
    assert (difference > 8).mean((1, 2, 3)).max() < 0.001
    for image, qpos in zip(loaded["image"], demos["qpos"][0]):
        assert np.array_equal(image, world.draw(qpos))

def test_how_many_demonstrations(capsys):
    """The first n; one line where there are fewer, or one is too short."""
    ten = demonstrations.load_demos("", "point")
    assert len(ten) == 10 and same_demos(demonstrations.load_demos("", "point", 3), ten[:3])
    load = demonstrations.load_demos
    assert "holds 10 demonstrations" in one_line("point.npz", load, "", "point", 11)
    assert "50 steps" in one_line("point.npz", demonstrations.load_demos, "", "point", min_steps=51)
    assert not capsys.readouterr().err

@pytest.mark.parametrize("kind, key, change, says", [  # change None: the array goes
    ("pixels", "image", lambda image: image / 255, "expected uint8 pictures"),
    ("pixels", "image", lambda image: np.moveaxis(image, -1, 1), "(51, 3, 64, 64)"),
    ("pixels", "action", lambda action: action[2:], "51 images and 48 actions"),
    ("pixels", "action", lambda action: np.concatenate([action, action[:1]]), "row 0 of action"),
    ("pixels", "action", lambda action: action.astype(object), "pickle"),
    ("pixels", "action", lambda action: np.insert(action[1:], 4, np.nan, 0), "action has NaN"),
    ("pixels", "episode_ends", lambda ends: ends - 1, "51 at the last"),
    ("states", "qpos", lambda qpos: np.insert(qpos[1:], 4, np.nan, 0), "qpos has NaN"),
    ("states", "action", lambda action: action[:, 1:], "(10, 49, 2)"),
    ("states", "env", lambda name: np.array("baoding"), "made for baoding, not point"),
    ("states", "start", None, "has no start"),
    ("states", "a bit", lambda data: data[:9000] + b"?" + data[9001:], "not a readable")])
def test_damaged_demonstrations_get_one_line(kind, key, change, says, tmp_path):
    file = tmp_path / "bad.npz"
    one_line(file, demonstrations.load_demos, file, "point")  # there is none yet
    arrays = stored("point") if kind == "states" else recorded(envs.make_env("point"), file)
    if change is None:
        del arrays[key]
    elif key in arrays:
        arrays[key] = change(arrays[key])
    np.savez(file, **arrays)
    if key == "a bit":
        file.write_bytes(change(file.read_bytes()))
    assert says in one_line(file, demonstrations.load_demos, file, "point")

# === What a recording means =======================================================================

class WorldToy(gym.Env):
    """A bar to grow. ends: success ends the episode; sees: it observes pictures, not a number."""
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, low=-1.0, high=1.0, ends=False, size=(64, 64), sees=True, render_mode=None):
        pictures = gym.spaces.Box(0, 255, (*size, 3), np.uint8)
        self.observation_space = pictures if sees else gym.spaces.Box(-1, 1, (1,))
        self.action_space = gym.spaces.Box(low, high, (1,))
        self.ends = ends
        self.size = size
        self.sees = sees
        self.render_mode = render_mode

    def render(self):
        image = np.full((*self.size, 3), 30, np.uint8)
        image[20:30, :int((self.x + 1) / 2 * self.size[1])] = 255, 150, 30
        return image

    def look(self):
        return self.render() if self.sees else np.array([self.x], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.9, -0.3)
        self.actions = []
        return self.look(), {}

    def step(self, action):
        self.actions.append(action[0])
        self.x = float(np.clip(self.x + 0.1 * action[0], -1, 1))
        there = self.x > 0.8
        return self.look(), float(there), there and self.ends, False, {"success": there}

TOYS = {"WorldToy-v0": {}, "WorldPedal-v0": {"low": 0.0}, "WorldEnds-v0": {"ends": True},
        "WorldSmall-v0": {"low": -0.4, "high": 0.4},
        "WorldWide-v0": {"low": -2, "high": 6, "ends": True, "size": (100, 80), "sees": False}}
for toy_name, toy_options in (*TOYS.items(), ("WorldUnbounded-v0", {"low": -np.inf})):
    gym.register(toy_name, f"{__name__}:WorldToy", max_episode_steps=50, kwargs=toy_options)
gym.register("WorldEndless-v0", f"{__name__}:WorldToy")

def recorded(env, file, episodes=1):
    """What record() writes of a policy that pushes, sometimes beyond the bounds -> arrays."""
    rng = np.random.default_rng(0)
    low, high = env.action_space.low, env.action_space.high
    def policy(observation, info):
        assert observation in env.observation_space
        return low + rng.uniform(0.7, 1.05, low.shape) * (high - low)
    envs.record(env, policy, file, episodes, seed=7)
    with np.load(file) as arrays:
        return dict(arrays)

def test_generic_environment_is_padded():
    """Any Gymnasium id: actions rescaled, frames 64 x 64, an early end padded to T and marked."""
    env = envs.make_env("WorldWide-v0", episode_steps=12)
    assert env.inner.unwrapped.actions == [2]  # it was stepped once: a fault shows at once
    images, infos, outcomes = played(env, 0, lambda t: np.array([t % 3 - 1]))
    assert images.shape == (13, 64, 64, 3) and list(outcomes[:, 2]) == [0] * 11 + [1]
    assert env.inner.unwrapped.actions == [-2, 2, 6] * 3  # -1, 0, 1 on -2 .. 6; then it ended
    assert (images[9:] == images[9]).all() and (images[8] != images[9]).any()
    assert [info["padded"] for info in infos] == [False] * 10 + [True] * 3
    assert [info["success"] for info in infos] == [False] * 9 + [True] * 4
    assert (env.action_low, env.action_high) == ([-2], [6])

def assert_replays(demos, name):
    """Loaded episodes are what make_env shows for their actions: T+1 frames, each bit."""
    env = envs.make_env(name)
    for seed, demo in zip((7, 8), demos, strict=True):
        frames, _, _ = played(env, seed, lambda t, demo=demo: demo["action"][t + 1])
        assert np.array_equal(demo["image"], frames) and demo["success"] is None
        assert demo["action"].shape == (env.episode_steps + 1, env.action_dim)
        assert demo["action"].dtype == np.float32 and not demo["action"][0].any()

@pytest.mark.parametrize("maker, name", [
    (envs.make_env, "point"), *itertools.product((gym.make, envs.make_env), TOYS)])
def test_recordings_replay(maker, name, tmp_path, capsys):
    """record() writes what load_demos() reads; in Dreamer's order it means the same."""
    options = {"render_mode": "rgb_array"} if maker is gym.make else {}
    file = tmp_path / "a.npz"
    arrays = recorded(maker(name, **options), file, 2)
    assert "2 episodes" in capsys.readouterr().err
    ends = arrays["episode_ends"]
    assert len(arrays["image"]) == len(arrays["action"]) + 2 == ends[-1]
    assert arrays["terminated"].tolist() == [name in ("WorldEnds-v0", "WorldWide-v0")] * 2
    demos = demonstrations.load_demos(file, name)
    assert not capsys.readouterr().err
    assert_replays(demos, name)
    low, high = TOYS.get(name, {}).get("low", -1), TOYS.get(name, {}).get("high", 1)
    shares = 2 * (arrays["action"] - low) / (high - low) - 1
    expected = np.zeros_like(demos[0]["action"])
    expected[1:ends[0]] = shares[:ends[0] - 1]
    assert np.allclose(demos[0]["action"], expected, atol=1e-6) and np.abs(shares).max() > 0.9
    # Dreamer's: a row of zeros before each episode, then shares of the bounds.
    arrays["action"] = np.insert(shares, [0, ends[0] - 1], 0, axis=0)
    np.savez(file, **arrays)
    assert same_demos(demonstrations.load_demos(file, name), demos)
    said = capsys.readouterr().err
    assert said.count("in Dreamer's order") == said.count("\n") == ((low, high) != (-1, 1))

@pytest.mark.parametrize("name, changes, steps, rows, says", [
    ("point", None, 60, 51, "stop before step 60"),  # None: the shipped states
    ("point", None, 10, 11, "do not complete the task within 10 steps"),
    ("point", {"terminated": True}, 60, 51, "stop before step 60"),  # it never ends
    ("WorldEnds-v0", {"terminated": None}, 50, 51, "taken as ended by the environment"),
    ("WorldEnds-v0", {"terminated": False}, 50, 19, "stop before step 50"),
    ("WorldEnds-v0", {}, 10, 11, "are cut to 10 steps"),
    ("baoding", {}, 75, 76, "hold another renderer's pixels")])
def test_lengths_that_do_not_fit(name, changes, steps, rows, says, dark, tmp_path, capsys):
    """What is assumed, never seen or lost is one line."""
    path = ""
    if changes is not None:
        path = tmp_path / "a.npz"
        arrays = {**recorded(envs.make_env(name), path), **changes}
        np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    capsys.readouterr()
    demo, = demonstrations.load_demos(path, name, 1, episode_steps=steps)
    said = capsys.readouterr().err
    assert said.count("1 of 1 demonstrations") == said.count("\n") == 1 and says in said
    assert len(demo["image"]) == len(demo["action"]) == rows
    assert demo["success"] is (steps > 10 if changes is None else None)

@pytest.mark.parametrize("name, inside, beyond", [
    ("WorldSmall-v0", -0.4005, "-0.401"), ("WorldPedal-v0", -0.0009, "-0.0011")])
def test_actions_beyond_their_bounds(name, inside, beyond, tmp_path):
    """By rounding (a thousandth of the range) they are clipped; by more, refused with a remedy."""
    file = tmp_path / "a.npz"
    arrays = recorded(envs.make_env(name), file)
    arrays["action"][7] = inside
    np.savez(file, **arrays)
    assert abs(demonstrations.load_demos(file, name)[0]["action"][8, 0]) == 1
    arrays["action"][7] = float(beyond)
    np.savez(file, **arrays)
    line = one_line(file, demonstrations.load_demos, file, name)
    assert f"is {beyond}, outside its bounds" in line and "clip it" in line

def test_many_episodes_in_one_file(tmp_path):
    """Row after row, in a file each, with a flag for each action, or with an axis of their own."""
    name, file = "WorldEnds-v0", tmp_path / "all.npz"
    blind = gym.make("WorldWide-v0")  # without a render_mode
    one_line('make it with render_mode="rgb_array"', envs.record, blind, None, file, 1)
    arrays = recorded(envs.make_env(name), file, 3)
    ends = arrays["episode_ends"]
    expected = demonstrations.load_demos(file, name)
    images = np.split(arrays["image"], ends[:-1])
    actions = np.split(arrays["action"], ends[:-1] - [1, 2])
    assert len({len(image) for image in images}) > 1
    each = tmp_path / "each"
    each.mkdir()
    for i in range(3):
        np.savez(each / f"{i}.npz", image=images[i], action=actions[i], terminated=True)
    for path, n in ((file, 2), (each, 2), (each, 3)):
        assert same_demos(demonstrations.load_demos(path, name, n), expected[:n])
    flags = np.isin(np.arange(ends[-1] - 3), ends - [2, 3, 4])
    np.savez(file, **{**arrays, "terminated": flags})
    assert same_demos(demonstrations.load_demos(file, name), expected)
    np.savez(file, image=np.stack([image[:11] for image in images]),
             action=np.stack([action[:10] for action in actions]), terminated=np.zeros(3, bool))
    cut = [{key: demo[key][:11] for key in ("image", "action")} for demo in expected]
    assert same_demos(demonstrations.load_demos(file, name), cut)

def test_minari_datasets(tmp_path, monkeypatch):
    """Own units, an early end; one line for no pictures and for a wrong name."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name in ("WorldPedal-v0", "WorldEnds-v0", "WorldWide-v0"):
        dataset = f"minari:toy/{name.lower()}"
        env = minari.DataCollector(gym.make(name), jpeg_encoding=False)
        for seed in (7, 8):
            env.reset(seed=seed)
            while not any(env.step(np.array([0.9], np.float32))[2:4]):  # ended or cut
                pass
        env.create_dataset(dataset_id=dataset.removeprefix("minari:"))
        if name == "WorldWide-v0":
            assert "0 pictures" in one_line(dataset, demonstrations.load_demos, dataset, name)
        else:
            assert_replays(demonstrations.load_demos(dataset, name), name)
    one_line("minari:toy/no-v0", demonstrations.load_demos, "minari:toy/no-v0", "WorldToy-v0")

# === Point and Baoding ============================================================================

def test_the_point_expert_nearly_always_arrives_and_chance_never(dark):
    """At least 297 of 300 seeds, at random speeds of its range; success is final."""
    import make_point
    env = envs.make_env("point")
    rng = np.random.default_rng(5)
    arrived = 0
    for seed in range(300):
        speed = rng.uniform(*make_point.SPEED) * envs.GAIN / (1 - envs.INERTIA)
        _, infos, _ = played(env, seed, lambda t, speed=speed: make_point.expert(env, speed))
        success = [info["success"] for info in infos]
        assert success == sorted(success)
        arrived += success[-1]
    assert arrived >= 297
    for policy in (randomly(env), lambda t: np.zeros(2)):
        assert not any(played(env, seed, policy)[1][-1]["success"] for seed in range(50))
    played(env, 3, lambda t: np.ones(2))
    assert env.touched and env.qpos[2] == 1
    for touched, tasks in ((0, ("goal",)), (1, ())):  # a touch is final
        assert env.tasks_in(np.array([[9, 9, touched], [*envs.GOAL, touched]])) == tasks

def test_holding_still_and_flailing_fail(hand, dark):
    """Actions of zero keep the balls and turn nothing, random ones drop them; starts are wide."""
    assert hand.SUBSTEPS * hand.model.opt.timestep == pytest.approx(0.1)
    starts = []
    for seed in range(3):
        hand.reset(seed=seed)
        starts.append(hand.qpos)
        away = np.linalg.norm(hand.balls_in(hand.qpos)[:, :2] - hand.targets(0), axis=1)
        assert away.min() > 0.018 and away.max() < 0.03
        _, infos, outcomes = played(hand, seed, lambda t: np.zeros(20))
        assert infos[0]["log/rotation"] == infos[0]["log/error"] == infos[-1]["log/dropped"] == 0
        assert abs(infos[-1]["log/rotation"]) < 0.1 and outcomes[:, 0].sum() <= 20
        _, flailing, _ = played(hand, seed, randomly(hand, seed))
        dropped = [info["log/dropped"] for info in flailing]
        assert dropped.index(1) < 30 and dropped[-1] == 1
        assert not any(info["success"] for info in infos + flailing)
    change = starts[1] - starts[0]
    assert change[hand._hand].std() > 0.005 and np.abs(hand.balls_in(change)).max() > 5e-4

def rolled(env, turns, radius=1.0, lowest=0.16, phase=0.0, aside=0.0):
    """Positions (76, nq) of balls that go round the targets' ellipse, scaled by `radius`, clockwise
    from `phase` on; the second is as low as `lowest` in row 40, the first is moved `aside`."""
    qpos = np.tile(env.model.qpos0, (76, 1))
    angle = phase - 2 * np.pi * turns * np.arange(76) / 75
    for i, half in zip(env._balls, (0, np.pi)):
        qpos[:, i] = env.CENTRE[0] + radius * env.AXES[0] * np.cos(angle + half)
        qpos[:, i + 1] = env.CENTRE[1] + radius * env.AXES[1] * np.sin(angle + half)
        qpos[:, i + 2] = 0.16
    qpos[40, env._balls[1] + 2] = lowest
    qpos[1:, env._balls[0]] += aside
    return qpos

def turned(turns, phase=0.0):
    """Turns, seen from its centre, of a point on the ellipse whose parameter makes `turns`."""
    angle = phase - 2 * np.pi * np.linspace(0, turns, 9999)
    angle = np.unwrap(np.arctan2(0.036 * np.sin(angle), 0.02 * np.cos(angle)))
    return (angle[0] - angle[-1]) / (2 * np.pi)

@pytest.mark.parametrize("case, turns, error, dropped, success", [
    (dict(turns=1.25), 1.25, 0, False, True),  # on the targets all the time
    (dict(turns=1.25, phase=0.7), turned(1.25, 0.7), 0, False, True),  # from where the balls are
    (dict(turns=1.25, aside=0.01), None, 0.005, False, True),  # the mean over both balls
    (dict(turns=1.25, aside=1.0), None, 0.05, False, False),  # at most 0.1 m each
    (dict(turns=1.25, lowest=0.099), turned(0.65), 0, True, False),  # out of the hand in row 40
    (dict(turns=-1.25), -1.25, None, False, False),  # the other way round
    (dict(turns=1.05), turned(1.05), None, False, False),  # 1.084: too few, though near
    (dict(turns=1.25, radius=1.6), 1.25, 0.0174, False, True),
    (dict(turns=1.25, radius=1.75), 1.25, 0.0217, False, False)])  # too far from the targets
def test_what_counts_as_turning_the_balls(hand, case, turns, error, dropped, success):
    """Made-up trajectories, their measures known in advance: the mean error on an ellipse r times
    as large is r - 1 times the mean distance of the ellipse from its centre."""
    qpos = rolled(hand, **case)
    hand._begin(qpos[0])
    for row in qpos[1:]:
        hand._follow(row)
    info = hand._info()
    assert hand.tasks_in(rolled(hand, 1.25)[:40]) == ()
    done = hand.tasks_in(qpos)
    assert hand._info() == info and len(hand._errors) == 75  # an episode goes on
    assert turns is None or info["log/rotation"] == pytest.approx(turns, abs=1e-6)
    assert error is None or info["log/error"] == pytest.approx(error, abs=2e-4)
    assert info["log/dropped"] == dropped
    assert done == hand._result() == (("turn",) if success else ())

def test_the_reward_of_baoding(hand, dark, monkeypatch):
    """1 for a step with both balls within 25 mm of their targets and none dropped."""
    hand.reset(seed=0)
    for aside, height, reward in ((0.024, 0.16, 1), (0.026, 0.16, 0), (0, 0.099, 0), (0, 0.101, 1)):
        start, row = rolled(hand, 1.25, aside=aside)[:2]
        row[hand._balls[1] + 2] = height
        hand._begin(start)
        monkeypatch.setattr(hand, "_simulate", lambda _, row=row: np.copyto(hand.data.qpos, row))
        assert hand._step(np.zeros(20)) == reward

def test_a_demonstration_cannot_be_repeated_blindly(hand, dark):
    """Other starts, and other noise on the actions, need other actions."""
    solved = 0
    for seed, actions in enumerate(stored("baoding")["action"][:6], 90_000):
        solved += played(hand, seed, lambda t, a=actions: a[t])[1][-1]["success"]
    assert solved <= 3

def test_baoding_adds_noise_to_actions(hand, dark, monkeypatch):
    """Of std 0.05, clipped to [-1, 1], anew at each step and for each seed."""
    action = np.array([1] + [0.3] * 19)
    told, noises = [], []
    monkeypatch.setattr(hand, "_simulate", told.append)
    for seed in (0, 1):
        hand.reset(seed=seed)
        for _ in range(200):
            hand._step(action)
        noises.append(np.array(told[-200:]) - action)  # (200, 20)
    noise, other = noises
    assert abs(noise[:, 1:].std() - 0.05) < 0.003 and abs(noise[:, 1:].mean()) < 0.004
    assert noise[:, 0].max() == 0 > noise[:, 0].min()  # never above 1
    assert not np.allclose(noise[0], noise[1]) and not np.allclose(noise[0], other[0])

def test_baoding_targets_and_joint_targets(hand):
    """Targets start along the balls' line and come back; actions span 0.9 of the joints' limits."""
    balls = rolled(hand, 1.25)[0]
    hand._begin(balls)
    first = hand.targets(0)
    assert np.allclose(first, hand.balls_in(balls)[:, :2])
    assert np.allclose(first.mean(0), hand.CENTRE) and np.allclose(hand.targets(60), first)
    quarter = (hand.targets(np.array([0, 15]))[:, 0] - hand.CENTRE) / hand.AXES  # (2, 2)
    assert np.allclose(quarter[1], [[0, 1], [-1, 0]] @ quarter[0])
    names = [hand.model.actuator(i).name.replace("robot0:A_", "") for i in range(20)]
    zero = hand.control(np.zeros(20))
    assert np.allclose(zero, [envs.HAND_POSE[name] for name in names])
    low, high = hand.model.actuator_ctrlrange.T
    for sign, end in ((1, high), (-1, low)):
        assert np.allclose(hand.control(np.full((3, 20), sign)) - zero, 0.9 * (end - zero))

def test_the_baoding_experts_cost_and_smoothing(hand, dark):
    """The cost's terms written out for one step; a peak is smoothed by a kernel of sum 1."""
    import make_baoding as make
    hand.reset(seed=0)
    search = make.Search(samples=1, horizon=1, near=0.5, smooth=2.0)
    expert = make.Expert(hand, search, np.random.default_rng(0), None, np.full((5, 20), 0.1))
    expert.last = np.full(20, 0.3)
    target = hand.targets(4)  # after step 3
    balls = np.full((1, 1, 2, 3), 0.15)
    balls[0, 0, :, :2] = target[::-1]  # swapped: half a turn off
    balls[0, 0, 0, 2] = 0.07  # and one has fallen
    apart = np.linalg.norm(target[0] - target[1])
    expected = 2 * apart / 0.02 + 1.5 * np.pi + 0.04 / 0.005 + 20 + 2 * 0.2**2 + 0.5 * 0.4**2
    assert np.allclose(expert.cost(3, np.full((1, 1, 20), 0.5), balls), expected)
    assert np.allclose(make.smoothed(np.array([0, 1])[:, None, None] * np.ones((9, 1))), 0.5)
    spread = make.smoothed(np.eye(9)[4].reshape(1, 9, 1))[:, 0]
    assert spread.sum() == pytest.approx(1) and spread[4] == spread.max() < 0.8
    assert spread[3] / spread[4] == pytest.approx(np.exp(-0.5 / 0.7**2))

@pytest.mark.parametrize("env, measure", [("kitchen", "tasks"), ("baoding", "rotation")])
def test_simulators_train(env, measure, tmp_path):
    """The whole program with drawn demonstrations: pretraining, two rounds, two evaluations."""
    c = config(env=env, logdir=str(tmp_path), episode_steps=12, steps=24, seed_steps=12, pretrain=2,
               length=6, num_demos=1, eval_every=1000, eval_episodes=1, train_ratio=0.2)
    assert cmil.Trainer(c).run()
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [line["step"] for line in lines if f"eval/{measure}" in line] == [0, 24]
    assert lines[-1]["update"] == 4
