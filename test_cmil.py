"""Tests of cmil.py and envs.py, in the order of cmil.py; the environments and whole runs follow.

    pytest -q                 everything but the slow ones: 7 to 14 minutes
    pytest -q -n 2            two at a time, with pytest-xdist: half of that
    pytest -q -m stress       the slow ones: learning must improve, all demos re-simulated
    pytest -q -k "not kitchen"

Numbers are compared with something INDEPENDENT of the code: sums written out in float64, integrals
on a grid, or examples worked by hand. A method of the code that needs networks is given simple
functions in their place where that makes the right answer obvious.
"""
import ast
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from torch import nn

import cmil
import envs

HERE = Path(cmil.__file__).resolve().parent
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
torch.set_num_threads(1)


# ------------------------------------------------------------------------------------ tools


@pytest.fixture(autouse=True)
def fixed_start():
    """Every test begins with the same random numbers, and cannot leave signal handlers behind."""
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def config(**changes):
    """The debug preset on point, in one process, with changes."""
    return cmil.Config(**{**cmil.PRESETS["debug"], "preset": "debug", "env": "point",
                          "device": "cpu", "threads": 1, "num_envs": 1, **changes})


def agent_and_replay(algo="cmil", **changes):
    """A small agent with A = 2 and a replay of random episodes: 2 demos, 2 others, of 20 steps."""
    c = config(algo=algo, **{**cmil.ALGOS[algo], **changes})
    device = cmil.setup_torch(c)
    agent = cmil.AGENTS.get(algo, cmil.Agent)(c, 2, device)
    replay = cmil.Replay(126, c.length, 2, device)
    rng = np.random.default_rng(0)
    for i in range(4):
        action = rng.uniform(-1, 1, (21, 2)).astype(np.float32)
        action[0] = 0
        replay.add(rng.integers(0, 256, (21, 64, 64, 3), np.uint8), action, demo=i < 2)
    return agent, replay


def same(a, b):
    """Whether two nested structures of tensors and plain values are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


class Function(nn.Module):
    """A plain function in place of a network's layers."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numbers(tensor):
    return tensor.detach().numpy().astype(np.float64)


def integral(y, x):
    """By the trapezoidal rule."""
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()


def linear(layer, x):
    return x @ numbers(layer.weight).T + numbers(layer.bias)


def randomize(module):
    """Give every parameter (the biases, which begin at zero, too) a random value."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def calls_of(monkeypatch, owner, name, replacement):
    """Replace owner.name by replacement(original, *args) -> list of the arguments of each call."""
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(args)
        return replacement(original, *args, **kwargs)
    monkeypatch.setattr(owner, name, method)
    return calls


# ------------------------------------------------------------------------------------ configuration


def test_every_field_of_the_config_is_read():
    """No option that does nothing: each is read as c.x, self.c.x or agent.c.x (oracle: the AST)."""
    read = set()
    for node in ast.walk(ast.parse((HERE / "cmil.py").read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            if owner in ("c", "config"):
                read.add(node.attr)
    unread = {field.name for field in dataclasses.fields(cmil.Config)} - read
    assert not unread, f"nothing reads {sorted(unread)}"


def test_every_field_of_the_config_is_a_flag():
    """Each field parses from the command line into its own type, with a value not its default."""
    for field in dataclasses.fields(cmil.Config):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            value, words = not field.default, [flag if not field.default else "--no-" + flag[2:]]
        else:
            choices = [v for v in field.metadata["choices"] or [] if v != field.default]
            value = choices[0] if choices else type(field.default)(7)
            words = [flag, str(value)]
        explicit, _ = cmil.parse(words)
        assert explicit == {field.name: value}
        assert type(explicit[field.name]) is type(field.default)


def test_tables_of_the_config_name_real_fields():
    """PRESETS, ENV_PRESETS, ALGOS and RESUME_MAY_CHANGE hold fields of the right types only."""
    types_of = {field.name: type(field.default) for field in dataclasses.fields(cmil.Config)}
    tables = [*cmil.PRESETS.values(), *cmil.ENV_PRESETS.values(), *cmil.ALGOS.values()]
    for name, value in itertools.chain(*(table.items() for table in tables)):
        assert isinstance(value, types_of[name]) or types_of[name] is float, (name, value)
    assert set(cmil.RESUME_MAY_CHANGE) <= set(types_of)
    assert cmil.PRESETS["paper"] == {}  # the defaults ARE the paper's run
    assert all(preset in cmil.PRESETS for _, preset in cmil.ENV_PRESETS)


def test_paper_preset_has_the_papers_values():
    """The defaults are the run of section 2.4 of the design (oracle: that list)."""
    expected = dict(alpha=10, beta=10, gamma=.99, lam=.95, entropy=1e-4, horizon=15, batch=32,
                    length=50, members=10, critics=2, stoch=360, deter=400, hidden=400, units=400,
                    layers=4, disc_units=200, disc_layers=2, conv_depth=48, lr=3e-4, disc_lr=3e-4,
                    adam_eps=1e-5, clip=100, weight_decay=1e-6, target_every=100, train_ratio=.4,
                    num_envs=5, pretrain=1000, seed_steps=5000, steps=250_000, free_nats=1,
                    kl_balance=.8, reward="logit", target="min", reward_noise=False,
                    data_critic=True, actor_discount=True, critic_discount=True, offline=False)
    assert {key: getattr(cmil.Config(), key) for key in expected} == expected
    assert cmil.Config().sigma ** 2 == pytest.approx(2.5)


def test_precedence_of_the_config(tmp_path):
    """Defaults < preset < environment < algorithm < flags (oracle: the tables, one of each)."""
    logdir = str(tmp_path / "run")
    c = cmil.make_config({"env": "kitchen", "preset": "small", "algo": "dbc", "units": 99,
                          "logdir": logdir})
    assert c.members == cmil.PRESETS["small"]["members"] and c.units == 99 and c.lam == 0.95
    assert c.episode_steps == cmil.ENV_PRESETS["kitchen", "small"]["episode_steps"]
    assert c.offline and c.reward == "none" and c.algo == "dbc"
    c = cmil.make_config({"algo": "vmail", "preset": "debug", "members": 4, "logdir": logdir})
    assert c.members == 4 and c.alpha == 0 and c.episode_steps == 0
    c = cmil.make_config({"tasks": "kettle", "preset": "small", "logdir": logdir})
    assert c.episode_steps == 0 and c.steps == cmil.ENV_PRESETS["kitchen", "small"]["steps"]


# ------------------------------------------------------------------------------------ helpers


def test_state_action_pairs_by_hand():
    """action[t] led to feat[t], so s_t goes with action[t+1] (an episode of 3 steps, by hand)."""
    feat = torch.tensor([[10.], [11.], [12.], [13.]])    # s0 s1 s2 s3
    action = torch.tensor([[0.], [.5], [.6], [.7]])      # -  a0 a1 a2: a0 = .5 was taken in s0
    s, a = cmil.state_action_pairs(feat, action)
    assert s.flatten().tolist() == [10, 11, 12]
    assert a.flatten().tolist() == pytest.approx([.5, .6, .7])


def test_images_to_floats_and_back():
    """uint8 / 255 - 0.5, channels first; the inverse restores every one of the 256 values."""
    image = torch.arange(256, dtype=torch.uint8).repeat(48).view(1, 64, 64, 3)
    x = cmil.to_float(image)
    assert x.shape == (1, 3, 64, 64)
    for y, z, channel in [(0, 0, 0), (5, 9, 2), (63, 63, 1)]:
        assert x[0, channel, y, z].item() == pytest.approx(image[0, y, z, channel] / 255 - .5)
    assert torch.equal(cmil.to_uint8(x), image)
    assert cmil.to_uint8(torch.full((3, 64, 64), 9.)).unique().tolist() == [255]


def test_bootstrap_ci():
    """The interval of a coin's mean is near the normal approximation; constants have width zero."""
    values = np.arange(400) % 2
    low, high = cmil.bootstrap_ci(values)
    assert low == pytest.approx(.5 - 1.96 * .5 / 20, abs=.01)
    assert high == pytest.approx(.5 + 1.96 * .5 / 20, abs=.01)
    assert cmil.bootstrap_ci([.25] * 5) == (.25, .25)


# ------------------------------------------------------------------------------------ distributions


def test_kl_normal_against_an_integral():
    """KL(p || q) = integral of p log(p / q), on a grid in float64, summed over dimensions."""
    x = np.linspace(-30, 30, 200_001)

    def log_density(mean, std):
        return -.5 * ((x - mean) / std) ** 2 - np.log(std) - .5 * np.log(2 * np.pi)
    p, q = [(0., 1.), (1.5, .3)], [(.5, 2.), (1., .1 + 1.)]
    expected = sum(integral(np.exp(log_density(*i)) * (log_density(*i) - log_density(*j)), x)
                   for i, j in zip(p, q))
    (mean_p, std_p), (mean_q, std_q) = torch.tensor(p).T, torch.tensor(q).T
    assert cmil.kl_normal(mean_p, std_p, mean_q, std_q).item() == pytest.approx(expected, rel=1e-5)
    assert cmil.kl_normal(mean_p, std_p, mean_p, std_p).item() == pytest.approx(0, abs=1e-6)


POLICIES = [(0., .1), (0.3, .5), (-.999, .3), (.9, .1), (.3, 2.1), (1., 2.1), (-1., .1)]


def density(loc, scale, points=400_001):
    """The truncated normal on a grid over [-1, 1] in float64, normalised by its own integral."""
    x = np.linspace(-1, 1, points)
    p = np.exp(-.5 * ((x - loc) / scale) ** 2)
    return x, p / integral(p, x)


@pytest.mark.parametrize("loc, scale", POLICIES)
def test_truncated_normal_log_prob_and_entropy(loc, scale):
    """log_prob, its ends at +-1, entropy and mode against integrals on a grid."""
    x, p = density(loc, scale)
    policy = cmil.TruncatedNormal(torch.tensor([loc]), torch.tensor([scale]))
    pick = np.linspace(0, len(x) - 1, 41).astype(int)    # both ends are among them
    pick = pick[p[pick] > 1e-30]
    log_prob = policy.log_prob(torch.tensor(x[pick], dtype=torch.float32)[:, None])
    assert torch.isfinite(log_prob).all() and log_prob.shape == (len(pick),)
    np.testing.assert_allclose(log_prob.numpy(), np.log(p[pick]), rtol=1e-4, atol=2e-3)
    plogp = np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0)
    assert policy.entropy().item() == pytest.approx(-integral(plogp, x), abs=1e-4)
    assert policy.mode.item() == pytest.approx(x[p.argmax()], abs=1e-5)


def test_truncated_normal_sums_over_actions():
    """With A = 2, log_prob and entropy are the sums of those of A = 1; mode and samples are not."""
    loc, scale = torch.tensor([[.3, -.5]]), torch.tensor([[.5, .2]])
    both = cmil.TruncatedNormal(loc, scale)
    one = [cmil.TruncatedNormal(loc[:, i:i + 1], scale[:, i:i + 1]) for i in range(2)]
    x = torch.tensor([[.1, -.9]])
    torch.testing.assert_close(both.entropy(), one[0].entropy() + one[1].entropy())
    torch.testing.assert_close(both.log_prob(x),
                               one[0].log_prob(x[:, :1]) + one[1].log_prob(x[:, 1:]))
    assert both.rsample().shape == both.mode.shape == (1, 2)


@pytest.mark.parametrize("loc, scale", POLICIES)
def test_truncated_normal_samples(loc, scale):
    """200,000 samples against the integrated density: Kolmogorov-Smirnov, at one in a million."""
    n = 200_000
    policy = cmil.TruncatedNormal(torch.full((n, 1), loc), torch.full((n, 1), scale))
    sample = np.sort(policy.rsample().numpy()[:, 0])
    assert sample[0] > -1 and sample[-1] < 1
    x, p = density(loc, scale)
    cdf = np.concatenate([[0], np.cumsum((p[1:] + p[:-1]) / 2 * np.diff(x))])
    distance = np.abs(np.interp(sample, x, cdf) - (np.arange(n) + .5) / n).max()
    assert distance < 2.7 / math.sqrt(n)


def test_truncated_normal_sample_gradients():
    """d sample / d loc and / d scale equal finite differences with the same random numbers."""
    loc = torch.tensor([[.2, -.7, .95]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[.5, .1, 1.7]], dtype=torch.float64, requires_grad=True)

    def sample(loc, scale):
        torch.manual_seed(1)
        return cmil.TruncatedNormal(loc, scale).rsample().sum()
    got, h = torch.autograd.grad(sample(loc, scale), (loc, scale)), 1e-6
    for i in range(3):
        step = torch.zeros(1, 3, dtype=torch.float64)
        step[0, i] = h
        with torch.no_grad():
            for k, move in enumerate([(step, 0 * step), (0 * step, step)]):
                ahead = sample(loc + move[0], scale + move[1])
                behind = sample(loc - move[0], scale - move[1])
                slope = (ahead - behind).item() / 2 / h
                assert got[k][0, i].item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("loc", [-1., -.99999, 0., 1.])
@pytest.mark.parametrize("scale", [.1, 2.1])
def test_truncated_normal_gradients_are_finite(loc, scale):
    """At the ends of what the actor can output, nothing that is trained through becomes NaN."""
    loc = torch.full((100_000, 1), loc, requires_grad=True)
    scale = torch.full((100_000, 1), scale, requires_grad=True)
    policy = cmil.TruncatedNormal(loc, scale)
    ends = torch.ones(1).expand(100_000, 1)
    sample = policy.rsample()
    for value in (sample, policy.log_prob(ends), policy.log_prob(-ends), policy.entropy()):
        assert torch.isfinite(value).all()
        for gradient in torch.autograd.grad(value.sum(), (loc, scale), retain_graph=True):
            assert torch.isfinite(gradient).all()


# ------------------------------------------------------------------------------------ networks


def test_glorot_weights_and_zero_biases():
    """Linear and convolution: |w| <= sqrt(6 / (fan_in + fan_out)), nearly reached; biases zero."""
    net = nn.Sequential(nn.Linear(200, 100), nn.Conv2d(8, 16, 4), nn.ConvTranspose2d(8, 16, 5))
    for layer, fans in zip(cmil.initialize(net), (300, 16 * 24, 25 * 24)):
        bound = math.sqrt(6 / fans)
        assert .98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=.05)
        assert not layer.bias.any()


def test_glorot_weights_of_each_head():
    """Each head of an ensemble is initialised as if it were alone, and differs from the others."""
    net = cmil.EnsembleMLP(5, 120, 80, 2, 60)
    for weight, fans in zip(net.weights, (200, 160, 140)):
        bound = math.sqrt(6 / fans)
        for head in weight:
            assert .98 * bound < head.abs().max() <= bound
            assert head.std().item() == pytest.approx(bound / math.sqrt(3), rel=.05)
        assert not any(torch.equal(weight[i], weight[j]) for i in range(5) for j in range(i))
    assert not any(bias.any() for bias in net.biases)


def heads_by_loop(net, x, k):
    """Head k of an EnsembleMLP on x (N, in), layer by layer in float64."""
    x = numbers(x)
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases)):
        x = (elu(x) if i else x) @ numbers(weight[k]) + numbers(bias[k])
    return x


def test_ensemble_against_a_loop_over_heads():
    """All heads on one input, and a drawn head for each time step, equal plain MLPs one by one."""
    net, x = randomize(cmil.EnsembleMLP(4, 5, 7, 2, 3)), torch.randn(6, 8, 5)
    member = [3, 0, 3, 1, 2, 1]
    out = net(x[0])
    assert out.shape == (4, 8, 3)
    for k in range(4):
        np.testing.assert_allclose(out[k].detach(), heads_by_loop(net, x[0], k), **FLOAT32)
    out = net(x, torch.tensor(member))
    assert out.shape == (6, 8, 3)
    for t, k in enumerate(member):
        np.testing.assert_allclose(out[t].detach(), heads_by_loop(net, x[t], k), **FLOAT32)


def test_critics_are_separate_mlps_on_feat_and_action():
    """Q_i(s, a) is head i on the joined input, for any leading shape."""
    critics = randomize(cmil.Critics(3, 4, 2, 6, 1))
    s, a = torch.randn(5, 7, 4), torch.randn(5, 7, 2)
    q = critics(s, a)
    assert q.shape == (3, 5, 7)
    joined = torch.cat([s, a], -1)
    for i in range(3):
        expected = heads_by_loop(critics, joined.view(35, 6), i).reshape(5, 7)
        np.testing.assert_allclose(q[i].detach(), expected, **FLOAT32)


def test_the_last_layer_of_an_ensemble_is_float32_under_autocast():
    """bfloat16 has 8 bits: two means that differ by 1/1000 would often become one ([P9])."""
    heads = cmil.EnsembleMLP(2, 1, 4, 1, 3)
    for weight in heads.weights:
        nn.init.constant_(weight, 1.)
    nn.init.zeros_(heads.biases[-1])
    heads.biases[-1].data[1] += .001
    with torch.autocast("cpu", torch.bfloat16):
        out = heads(torch.ones(5, 1))                    # (2, 5, 3): 4 elu(1) = 4
    assert out.dtype == torch.float32 and (out[0] == 4).all()
    torch.testing.assert_close(out[1], torch.full((5, 3), 4.001), rtol=0, atol=1e-6)


@pytest.mark.parametrize("depth", [2, 4])
def test_encoder_and_decoder_shapes(depth):
    """Images to E = 32 depth numbers and feats to images, with any leading shape, one by one."""
    encoder, decoder = cmil.Encoder(depth), cmil.Decoder(depth, 10)
    image = cmil.to_float(torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8))
    embed = encoder(image)
    assert embed.shape == (2, 3, 32 * depth) and encoder.size == 32 * depth
    torch.testing.assert_close(embed[1, 2], encoder(image[1:, 2:])[0, 0])
    feat = torch.randn(2, 3, 10)
    assert decoder(feat).shape == (2, 3, 3, 64, 64)
    torch.testing.assert_close(decoder(feat)[1, 2], decoder(feat[1:, 2:])[0, 0])


def test_the_decoder_is_four_transposed_convolutions():
    """Its matrix product is nn.ConvTranspose2d with kernel 5 on a 1x1 map; its last convolution,
    one with kernel 6 and stride 2. Oracle: those two, with the same weights put in their places."""
    torch.manual_seed(0)
    decoder, feat = cmil.initialize(cmil.Decoder(2, 10)), torch.randn(7, 10)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)                   # biases too
    product, last = decoder.input[1], decoder.layers[-1]
    first = nn.ConvTranspose2d(64, 8, 5, 2, bias=False)
    first.weight.data = product.weight.view(5, 5, 8, 64).permute(3, 2, 0, 1)
    x = first(decoder.input[0](feat)[..., None, None]) + product.bias.view(5, 5, 8).movedim(-1, 0)
    x = decoder.layers[:-1](nn.functional.elu(x))        # (7, 2, 30, 30)
    # Pixel (2i + p, 2j + q) of the picture sees input (i - 2 + y, j - 2 + x) through weight[p, q]
    # of the convolution, at (y, x), and through tap (p + 4 - 2y, q + 4 - 2x) of the transposed one.
    pixels = nn.ConvTranspose2d(2, 3, 6, 2, bias=False)
    for p, q, y, x_ in itertools.product(range(2), range(2), range(3), range(3)):
        pixels.weight.data[:, :, p + 4 - 2 * y, q + 4 - 2 * x_] = last.weight.view(
            2, 2, 3, 2, 3, 3)[p, q, :, :, y, x_].T
    bias = last.bias.view(2, 2, 3).movedim(-1, 0).repeat(1, 32, 32)      # (3, 64, 64)
    torch.testing.assert_close(decoder(feat), pixels(x) + bias, rtol=1e-4, atol=1e-5)


def test_actor_distribution():
    """loc = tanh, scale = 2 sigmoid(x / 2) + min_std, from the two halves of the last layer."""
    actor = randomize(cmil.Actor(4, 2, 8, 2, 0.03))
    feat = torch.randn(6, 4)
    x = numbers(feat)
    for layer in (actor.layers[0], actor.layers[2]):
        x = elu(linear(layer, x))
    out = linear(actor.layers[4], x)
    policy = actor(feat)
    np.testing.assert_allclose(policy.loc.detach(), np.tanh(out[:, :2]), **FLOAT32)
    np.testing.assert_allclose(policy.scale.detach(), 2 * sigmoid(out[:, 2:] / 2) + .03, **FLOAT32)


def test_discriminator_noise_acts_on_the_whole_input():
    """sigma is the std of independent noise on every dimension of [feat, action]; 0 means none."""
    disc, seen = cmil.Discriminator(3, 2, 4, 1), []
    disc.layers = Function(lambda x: seen.append(x) or x[..., :1])
    s, a = torch.full((50_000, 3), 5.), torch.full((50_000, 2), -1.)
    disc(s, a, 1.5), disc(s, a)
    noise = numbers(seen[0]) - [5, 5, 5, -1, -1]
    np.testing.assert_allclose(np.cov(noise.T), 2.25 * np.eye(5), atol=.06)
    np.testing.assert_allclose(noise.mean(0), 0, atol=.03)
    assert torch.equal(seen[1], torch.cat([s, a], -1))


# ------------------------------------------------------------------------------------ world model


def small_rssm(members=3, seed=0):
    torch.manual_seed(seed)
    c = config(stoch=4, deter=6, hidden=5, members=members)
    return randomize(cmil.RSSM(c, 2, 7))


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


def test_gru_step_by_hand():
    """step_deter equals the released code's GRU written out in float64."""
    rssm, stoch, deter, action = small_rssm(), *(torch.randn(8, n) for n in (4, 6, 2))
    expected = gru_by_hand(rssm, *map(numbers, (stoch, deter, action)))
    np.testing.assert_allclose(rssm.step_deter(stoch, deter, action).detach(), expected, **FLOAT32)


def test_posterior_step_by_hand():
    """step_post: an ELU layer on [deter, embed], mean and 2 sigmoid(x/2) + .1, mean + std noise."""
    rssm, embed, action, noise = small_rssm(), *(torch.randn(8, n) for n in (7, 2, 4))
    before = cmil.State(torch.randn(8, 4), torch.randn(8, 6), torch.zeros(8, 4), torch.ones(8, 4))
    deter = gru_by_hand(rssm, *map(numbers, (before.stoch, before.deter, action)))
    x = elu(linear(rssm.post_hidden, np.concatenate([deter, numbers(embed)], -1)))
    mean, std = np.split(linear(rssm.post_output, x), 2, -1)
    std = 2 * sigmoid(std / 2) + .1
    after = rssm.step_post(before, action, *rssm.post_first(embed), noise)
    for got, expected in [(after.deter, deter), (after.mean, mean), (after.std, std),
                          (after.stoch, mean + std * numbers(noise))]:
        np.testing.assert_allclose(got.detach(), expected, **FLOAT32)
    assert torch.equal(after.feat, torch.cat([after.stoch, after.deter], -1))


def fix_noise(monkeypatch, table):
    """torch.randn returns successive slices of `table` along its batch dimension."""
    begin = 0

    def randn(length, batch, size, device=None):
        nonlocal begin
        rows, begin = slice(begin, begin + batch), (begin + batch) % table.shape[1]
        return table[:length, rows, :size]
    monkeypatch.setattr(torch, "randn", randn)


def test_observe_is_a_chain_of_posterior_steps(monkeypatch):
    """observe starts from zeros with a zero action, whatever action led to a window's first row."""
    rssm, embed, action = small_rssm(), torch.randn(5, 3, 7), torch.randn(5, 3, 2)
    noise = torch.randn(5, 3, 4)
    fix_noise(monkeypatch, noise)
    states = rssm.observe(embed, action)
    stoch, deter = np.zeros((3, 4)), np.zeros((3, 6))
    for t in range(5):
        a = numbers(action[t]) * (t > 0)
        deter = gru_by_hand(rssm, stoch, deter, a)
        x = elu(linear(rssm.post_hidden, np.concatenate([deter, numbers(embed[t])], -1)))
        mean, std = np.split(linear(rssm.post_output, x), 2, -1)
        stoch = mean + (2 * sigmoid(std / 2) + .1) * numbers(noise[t])
        np.testing.assert_allclose(states.feat[t].detach(), np.concatenate([stoch, deter], -1),
                                   rtol=1e-4, atol=1e-4)


def test_one_scan_over_two_halves_equals_two_scans(monkeypatch):
    """Replay and demos in one batch of 2B: no row depends on others (oracle: each half alone)."""
    rssm, embed, action = small_rssm(), torch.randn(6, 8, 7), torch.randn(6, 8, 2)
    fix_noise(monkeypatch, torch.randn(6, 8, 4))
    both = rssm.observe(embed, action)
    halves = [rssm.observe(embed[:, i], action[:, i]) for i in (slice(0, 4), slice(4, 8))]
    for x, first, second in zip(both, *halves):
        torch.testing.assert_close(x, torch.cat([first, second], 1))


def test_drawn_prior_trains_one_head_at_each_time_step():
    """[P1] the prior of step t is exactly one member's, shared by the batch; all are drawn."""
    rssm, deter, seen = small_rssm(), torch.randn(40, 5, 6), []
    mean, std = rssm.drawn_prior(deter)
    assert mean.shape == std.shape == (40, 5, 4)
    for t in range(40):
        parameters = list(rssm.priors.parameters())
        gradients = torch.autograd.grad(mean[t].sum() + std[t].sum(), parameters, retain_graph=True)
        trained = {k for g in gradients for k in range(3) if g[k].any()}
        assert len(trained) == 1, f"step {t} trains heads {trained}"
        seen += trained
        out = heads_by_loop(rssm.priors, deter[t], seen[t])
        np.testing.assert_allclose(mean[t].detach(), out[:, :4], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(std[t].detach(), 2 * sigmoid(out[:, 4:] / 2) + .1, rtol=1e-4)
    assert set(seen) == {0, 1, 2}


def constant_priors(rssm, means):
    """Make head k predict the mean means[k] with std 0.1 everywhere."""
    with torch.no_grad():
        for weight in rssm.priors.weights:
            weight.zero_()
        for k, mean in enumerate(means):
            rssm.priors.biases[-1][k, 0, :4], rssm.priors.biases[-1][k, 0, 4:] = mean, -100


def test_imagination_draws_a_member_at_every_step():
    """The imagined states jump between the members' means, all rows of a step together."""
    rssm, actor = small_rssm(), cmil.Actor(10, 2, 8, 1, 0.1)
    constant_priors(rssm, [0., 10., 20.])
    dream = cmil.imagine(rssm, actor, rssm.initial(6), torch.zeros(6, 2), 40)
    member = (dream.feat[1:, :, :4] / 10).round()        # (H, N, S)
    assert (member == member[:, :1, :1]).all()
    assert set(member[:, 0, 0].tolist()) == {0, 1, 2}
    spread = math.sqrt(200 / 3)                          # population std of 0, 10, 20
    np.testing.assert_allclose(dream.disagreement.detach(), spread, rtol=1e-5)
    noise = dream.feat[1:, :, :4] - 10 * member          # and each row has its own sample
    assert noise.std().item() == pytest.approx(.1, rel=.1)


def test_disagreement_by_hand():
    """[P9] population std (ddof 0) over the members, then the mean over the latent dimensions."""
    means = torch.tensor([[[1., 0.]], [[3., 0.]], [[5., 6.]]])           # (K, N, S) = (3, 1, 2)
    # dim 0: 1 3 5, variance (4 + 0 + 4) / 3;   dim 1: 0 0 6, variance (4 + 4 + 16) / 3
    expected = (math.sqrt(8 / 3) + math.sqrt(24 / 3)) / 2
    assert cmil.disagreement(means).tolist() == pytest.approx([expected])


def test_one_member_never_disagrees():
    """K = 1: disagreement is exactly zero, and its gradient is not NaN."""
    means = torch.randn(1, 5, 4, requires_grad=True)
    spread = cmil.disagreement(means)
    assert spread.shape == (5,) and not spread.any()
    agent, replay = agent_and_replay(members=1)
    info = agent.update(replay)
    assert all(torch.isfinite(value) for value in info.values())
    assert info["uncertainty"] == 0 and not any(opt.skipped for opt in agent.opts.values())


def test_members_that_agree_have_a_finite_gradient():
    """Where all K means are equal, the std's gradient would be 0 / 0; a NaN would end the run."""
    means = torch.ones(3, 5, 4, requires_grad=True)
    spread = cmil.disagreement(means)
    gradient, = torch.autograd.grad(spread.sum(), means)
    assert (spread.abs() < 1e-5).all() and torch.isfinite(gradient).all()


def fake_world(mean, std, picture):
    """A world model with this prior and this reconstruction, whatever it is asked."""
    rssm = types.SimpleNamespace(drawn_prior=lambda deter: (mean, std))
    return types.SimpleNamespace(decoder=lambda feat: picture, rssm=rssm)


def world_loss_case(post_mean, picture=0., free_nats=1., kl_balance=.8, image_std=1.):
    """world_model_loss for std 1, a prior of mean 0 and white images -> loss, info, prior."""
    L, B, S = post_mean.shape
    image = torch.full((L, B, 3, 64, 64), .5, dtype=torch.float64)
    prior = torch.zeros(L, B, S, requires_grad=True)
    ones = torch.ones(L, B, S)
    post = cmil.State(post_mean, torch.zeros(L, B, 1), post_mean, ones)
    world = fake_world(prior, ones, torch.full((L, B, 3, 64, 64), picture))
    c = config(free_nats=free_nats, kl_balance=kl_balance, image_std=image_std)
    return *cmil.world_model_loss(world, image, post, c), prior


def test_reconstruction_is_summed_over_pixels():
    """-log p(x|s) of a unit-variance normal: half the squared error, summed over 3 x 64 x 64."""
    _, info, _ = world_loss_case(torch.zeros(2, 3, 4), picture=.1)
    assert info["recon"].item() == pytest.approx(.5 * .4 ** 2 * 3 * 64 * 64, rel=1e-5)


def test_image_std_is_that_of_the_pictures_distribution():
    """-log p of a normal of std .3 is squared error / (2 .3^2); recon stays comparable."""
    loss, info, _ = world_loss_case(torch.zeros(2, 3, 4), picture=.1, image_std=.3)
    assert info["recon"].item() == pytest.approx(.5 * .4 ** 2 * 3 * 64 * 64, rel=1e-5)
    assert loss.item() == pytest.approx(.5 * (.4 / .3) ** 2 * 3 * 64 * 64 + 1, rel=1e-5)


def test_free_nats_apply_to_the_mean():
    """KLs of 0 and 1.8 nats average to 0.9 < 1: the loss is 1, and no gradient flows [D2]."""
    post_mean = torch.zeros(2, 1, 2)
    post_mean[0, 0] = torch.tensor([math.sqrt(2 * 1.8), 0])              # KL = mean^2 / 2
    post_mean.requires_grad_()
    loss, info, prior = world_loss_case(post_mean, picture=.5)
    assert info["kl"].item() == pytest.approx(.9)
    assert loss.item() == pytest.approx(1)
    for gradient in torch.autograd.grad(loss, (post_mean, prior)):
        assert not gradient.any()
    # Clamping each KL before the mean would give (1 + 1.8) / 2 = 1.4 and train row 0.


def test_kl_balance():
    """d KL / d post mean = m, / d prior mean = -m: the posterior gets .2 of it, the prior .8."""
    post_mean = torch.full((2, 3, 4), 2., requires_grad=True)
    loss, info, prior = world_loss_case(post_mean, picture=.5)
    assert info["kl"].item() == pytest.approx(4 * 2 ** 2 / 2)    # sum over S, mean over L, B
    assert loss.item() == pytest.approx(8)
    to_post, to_prior = torch.autograd.grad(loss, (post_mean, prior))
    np.testing.assert_allclose(to_post, .2 * 2 / 6, rtol=1e-5)
    np.testing.assert_allclose(to_prior, -.8 * 2 / 6, rtol=1e-5)


# ------------------------------------------------------------------------------------ D and reward


def test_discriminator_loss_by_hand():
    """[P8] -mean log D(expert) - mean log(1 - D(policy)), each over its own number of pairs."""
    def disc(s, a, sigma=0.):
        return s[..., 0] + 2 * a[..., 0]
    expert = torch.tensor([[1.], [.5]]), torch.tensor([[1.], [0.]])              # logits 3, .5
    policy = torch.tensor([[-1.], [0.], [2.]]), torch.tensor([[0.], [0.], [-1.5]])   # -1, 0, -1
    d_expert, d_policy = sigmoid(np.array([3, .5])), sigmoid(np.array([-1, 0, -1]))
    loss, info = cmil.discriminator_loss(disc, expert, policy, 1.)
    expected = -np.log(d_expert).mean() - np.log(1 - d_policy).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert info["disc/expert"].item() == pytest.approx(d_expert.mean(), rel=1e-5)
    assert info["disc/policy"].item() == pytest.approx(d_policy.mean(), rel=1e-5)
    assert info["disc/gap"].item() == pytest.approx(d_expert.mean() - d_policy.mean(), rel=1e-4)


def test_discriminator_loss_noises_both_sides_and_reports_clean_ones():
    """The loss sees the same sigma on expert and policy; disc/* are measured without noise."""
    sigmas = []

    def disc(s, a, sigma=0.):
        sigmas.append(sigma)
        return s.sum(-1)
    pair = torch.zeros(4, 1), torch.zeros(4, 1)
    cmil.discriminator_loss(disc, pair, pair, 1.5)
    assert sigmas == [1.5, 1.5, 0., 0.]


def random_dream(H=4, N=6, S=3, A=2, dtype=torch.float64, grad=False):
    """A Dream of random numbers."""
    def tensor(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)
    return cmil.Dream(tensor(H + 1, N, S), tensor(H + 1, N, A), tensor(N, A),
                      tensor(H, N).abs(), tensor(H, N))


# Functions in place of networks: cheap, float64, and different in every argument.


def toy_disc(s, a, sigma=0.):
    return torch.sin(s.sum(-1)) + .7 * a[..., 0] - .2 * a[..., -1] * s[..., 0]


def toy_critics(s, a):
    return torch.stack([s[..., 0] + .5 * a.sum(-1), .8 - s[..., 1] * a[..., 0],
                        s.sum(-1) - a[..., 1]])


def toy_targets(s, a):
    return .9 * toy_critics(s, a) + .1


def literal_reward(s, a, u, alpha):
    """[P10] log D - log(1 - D) - alpha u for single vectors, through D itself."""
    logit = np.sin(s.sum()) + .7 * a[0] - .2 * a[-1] * s[0]
    D = 1 / (1 + np.exp(-logit))
    return np.log(D) - np.log(1 - D) - alpha * u


def literal_q(s, a):
    return np.array([s[0] + .5 * a.sum(), .8 - s[1] * a[0], s.sum() - a[1]])


def test_conservative_reward_is_literally_P10():
    """r_t = log D(s_t, a_t) - log(1 - D(s_t, a_t)) - alpha u_t, number by number in float64."""
    dream = random_dream()
    got = cmil.conservative_reward(toy_disc, dream, config(alpha=3.))
    assert got.shape == (4, 6)
    feat, action, u = map(numbers, (dream.feat, dream.action, dream.disagreement))
    for t, n in itertools.product(range(4), range(6)):
        expected = literal_reward(feat[t, n], action[t + 1, n], u[t, n], 3.)
        assert got[t, n].item() == pytest.approx(expected, abs=1e-9)


def test_sigmoid_reward():
    """[C]'s reward, D itself instead of its logit, with the same penalty."""
    dream = random_dream()
    got = cmil.conservative_reward(toy_disc, dream, config(alpha=3., reward="sigmoid"))
    D = sigmoid(numbers(toy_disc(dream.feat[:-1], dream.action[1:])))
    np.testing.assert_allclose(got, D - 3 * numbers(dream.disagreement), atol=1e-12)


def test_reward_noise_switch():
    """[C] reward_noise: std sigma on each of the F + A inputs; off (the default): none at all."""
    disc = cmil.Discriminator(3, 2, 4, 1)
    disc.layers = Function(lambda x: x.sum(-1, keepdim=True))    # its noise: variance 5 sigma^2
    dream = random_dream(H=40, N=500, dtype=torch.float32)
    clean = dream.feat[:-1].sum(-1) + dream.action[1:].sum(-1)
    got = cmil.conservative_reward(disc, dream, config(alpha=0., sigma=1.5))
    torch.testing.assert_close(got, clean)
    noisy = cmil.conservative_reward(disc, dream, config(alpha=0., sigma=1.5, reward_noise=True))
    assert (noisy - clean).std().item() == pytest.approx(1.5 * math.sqrt(5), rel=.03)


def test_dream_rows():
    """Rows of a Dream: s_0 and what led to it first; u_t is the spread of the priors of s_{t+1}."""
    rssm, actor = small_rssm(), randomize(cmil.Actor(10, 2, 8, 1, 0.1))
    start = cmil.State(torch.randn(5, 4), torch.randn(5, 6), torch.zeros(5, 4), torch.ones(5, 4))
    led_here = torch.randn(5, 2)
    dream = cmil.imagine(rssm, actor, start, led_here, 3)
    assert dream.feat.shape == (4, 5, 10) and dream.action.shape == (4, 5, 2)
    assert torch.equal(dream.feat[0], start.feat) and torch.equal(dream.action[0], led_here)
    feat, action = numbers(dream.feat), numbers(dream.action)
    for t in range(3):
        deter = gru_by_hand(rssm, feat[t, :, :4], feat[t, :, 4:], action[t + 1])
        np.testing.assert_allclose(feat[t + 1, :, 4:], deter, rtol=1e-4, atol=1e-4)
        means = np.stack([heads_by_loop(rssm.priors, dream.feat[t + 1, :, 4:], k)[:, :4]
                          for k in range(3)])
        spread = np.sqrt(((means - means.mean(0)) ** 2).mean(0)).mean(-1)
        np.testing.assert_allclose(dream.disagreement[t].detach(), spread, rtol=1e-3)
        np.testing.assert_allclose(dream.entropy[t].detach(),
                                   actor(dream.feat[t]).entropy().detach(), rtol=1e-5)
    assert dream.last_action.shape == (5, 2) and dream.last_action.abs().max() < 1


# ------------------------------------------------------------------------------------ values


def literal_lambda_return(r, v, gamma, lam):
    """[W5] as printed, with V_k of [W-]: r (H,), v (H+1,) -> list of H numbers.

    V_k(s_t) = sum_{i<k} g^i r_{t+i} + g^k v_{t+k}
    V(s_t)   = (1-l) sum_{k=1}^{H-t-1} l^{k-1} V_k(s_t) + l^{H-t-1} V_{H-t}(s_t)
    """
    H, returns = len(r), []
    for t in range(H):
        def V(k):
            return sum(gamma ** i * r[t + i] for i in range(k)) + gamma ** k * v[t + k]
        total = (1 - lam) * sum(lam ** (k - 1) * V(k) for k in range(1, H - t))
        returns.append(total + lam ** (H - t - 1) * V(H - t))
    return returns


@pytest.mark.parametrize("gamma, lam", [(.99, .95), (.9, .5), (1., 1.), (.9, 0.)])
def test_lambda_return_against_the_double_sum(gamma, lam):
    """The recursion equals the double sum of [W5] in float64."""
    reward, value = torch.randn(7, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    got = cmil.lambda_return(reward, value, gamma, lam)
    for n in range(4):
        expected = literal_lambda_return(numbers(reward[:, n]), numbers(value[:, n]), gamma, lam)
        np.testing.assert_allclose(got[:, n], expected, rtol=1e-12)


def test_lambda_return_by_hand():
    """Two steps, g = l = 1/2: V_1 = 3 + 8/2 = 7 and V_0 = 1 + (4/2 + 7/2)/2 = 3.75."""
    got = cmil.lambda_return(torch.tensor([[1.], [3.]]), torch.tensor([[99.], [4.], [8.]]), .5, .5)
    assert got.flatten().tolist() == [3.75, 7.]


def test_state_values():
    """V_0(s_t) = min_i Q_i(s_t, a_t) for t = 0..H, where a_H is last_action."""
    dream = random_dream()
    got = cmil.state_values(toy_critics, dream)
    feat, action, last = map(numbers, (dream.feat, dream.action, dream.last_action))
    assert got.shape == (5, 6)
    for t, n in itertools.product(range(5), range(6)):
        a = action[t + 1, n] if t < 4 else last[n]
        assert got[t, n].item() == pytest.approx(literal_q(feat[t, n], a).min(), abs=1e-12)


def test_random_target_is_one_of_the_critics():
    """target=random: one critic for a whole update [C], each of them in turn."""
    dream, seen = random_dream(), set()
    q = toy_critics(dream.feat, torch.cat([dream.action[1:], dream.last_action[None]]))
    for _ in range(40):
        value = cmil.state_values(toy_critics, dream, "random")
        match = [i for i in range(3) if torch.equal(q[i], value)]
        assert len(match) == 1
        seen.add(match[0])
    assert seen == {0, 1, 2}


def test_discounts():
    """g^0, g^1, g^2 along time."""
    assert cmil.discounts(.5, torch.zeros(3, 2)).flatten().tolist() == [1, .5, .25]


@pytest.mark.parametrize("discount", [True, False])
def test_actor_loss_is_literally_W6(discount):
    """-mean_{t,n} g^t [ l V + (1-l) V_0 + entropy H ] from [W5], [W-], [P10] in float64 loops."""
    dream = random_dream()
    c = config(alpha=3., gamma=.9, lam=.8, entropy=.05, actor_discount=discount)
    reward = cmil.conservative_reward(toy_disc, dream, c)
    got, info = cmil.actor_loss(toy_critics, dream, reward, c)
    feat, action, last = map(numbers, (dream.feat, dream.action, dream.last_action))
    u, entropy, total = numbers(dream.disagreement), numbers(dream.entropy), 0
    for n in range(6):
        r = [literal_reward(feat[t, n], action[t + 1, n], u[t, n], 3.) for t in range(4)]
        a = [*action[1:, n], last[n]]
        v = [literal_q(feat[t, n], a[t]).min() for t in range(5)]
        V = literal_lambda_return(r, v, .9, .8)
        for t in range(4):
            objective = .8 * V[t] + .2 * v[t] + .05 * entropy[t, n]
            total -= (.9 ** t if discount else 1) * objective / (4 * 6)
    assert got.item() == pytest.approx(total, rel=1e-9)
    assert info["uncertainty"].item() == pytest.approx(u.mean())


def test_clone_loss_pairs_by_hand():
    """BC: -mean log pi(a_t|s_t) with a_t = action[t+1]; a stub policy with log pi = -(a - s)^2."""
    def actor(s):
        assert not s.requires_grad
        return types.SimpleNamespace(log_prob=lambda a: -((a - s) ** 2).sum(-1))
    feat = torch.tensor([[[1.]], [[2.]], [[3.]]], requires_grad=True)    # (L, B, F)
    action = torch.tensor([[[99.]], [[.5]], [[.25]]])                    # s0 -> .5, s1 -> .25
    expected = ((.5 - 1) ** 2 + (.25 - 2) ** 2) / 2
    assert cmil.clone_loss(actor, feat, action).item() == pytest.approx(expected)


def test_critic_targets_by_hand():
    """Both targets on an episode of three rows, all numbers in the comments.

    L = 3, B = 1, H = 1, g = l = 1/2, alpha = 1. States and actions are numbers; Q_1 = s + a,
    Q_2 = 2 s, the logit of D is s - a.
    """
    def critics(s, a):
        return torch.stack([(s + a)[..., 0], 2 * s[..., 0]])

    def disc(s, a, sigma=0.):
        assert sigma == 0
        return (s - a)[..., 0]
    # Rollout n starts at the replayed state s_n; one imagined step each.
    #              n:   0   1   2
    feat = torch.tensor([[1., 2., 3.],        # s_0
                         [4., -1., 6.]])      # s_1 (imagined)
    action = torch.tensor([[9., 9., 9.],      # what led to s_0: in no pair
                           [3., 1., 0.]])     # a_0
    dream = cmil.Dream(feat[..., None], action[..., None], torch.tensor([[0.], [2.], [1.]]),
                       torch.tensor([[.5, 0., 1.]]), torch.zeros(1, 3))
    # v_0 = min(s + a, 2 s):  min(4, 2) = 2   min(3, 4) = 3     min(3, 6) = 3
    # v_1 with a_H:           min(4, 8) = 4   min(1, -2) = -2   min(7, 12) = 7
    # r_0 = s - a - u:        1 - 3 - .5 = -2.5   2 - 1 - 0 = 1     3 - 0 - 1 = 2
    # Vbar = r_0 + v_1 / 2:   -2.5 + 2 = -.5      1 - 1 = 0         2 + 3.5 = 5.5
    replay_feat = torch.tensor([1., 2., 3.]).view(3, 1, 1)
    replay_action = torch.tensor([9., .5, -1.]).view(3, 1, 1)            # s0 -> .5, s1 -> -1
    # r_j = s_j - a_j, no penalty:          1 - .5 = .5              2 + 1 = 3
    # + (Vbar_0 / 2 + Vbar / 2) / 2 there:  (3/2 + 0/2) / 2 = .75    (3/2 + 5.5/2) / 2 = 2.125
    c = config(gamma=.5, lam=.5, alpha=1.)
    reward = cmil.conservative_reward(disc, dream, c)
    value, model = cmil.target_values(critics, dream, reward, c)
    data = cmil.data_target(disc, value[0], model[0], replay_feat, replay_action, c)
    assert model.flatten().tolist() == pytest.approx([-.5, 0, 5.5])
    assert data.flatten().tolist() == pytest.approx([.5 + .75, 3 + 2.125])


@pytest.mark.parametrize("target", ["min", "random"])
def test_critic_targets_are_literally_W7_and_W8(target):
    """Vbar, and r_j + g((1-l) Vbar_0 + l Vbar) of the rollout from s_{j+1}, in float64 loops."""
    dream, L, B = random_dream(), 3, 2                                   # N = 6 = L B
    replay_feat, replay_action = dream.feat[0].view(L, B, 3), dream.action[0].view(L, B, 2)
    c = config(alpha=3., gamma=.9, lam=.8, target=target)
    reward = cmil.conservative_reward(toy_disc, dream, c)
    value, model = cmil.target_values(toy_targets, dream, reward, c)
    data = cmil.data_target(toy_disc, value[0], model[0], replay_feat, replay_action, c)
    assert model.shape == (4, 6) and data.shape == (2, 2)
    feat, action, last = map(numbers, (dream.feat, dream.action, dream.last_action))
    u = numbers(dream.disagreement)

    def expected(choose):
        V, v0 = [], []
        for n in range(6):
            r = [literal_reward(feat[t, n], action[t + 1, n], u[t, n], 3.) for t in range(4)]
            a = [*action[1:, n], last[n]]
            v = [choose(.9 * literal_q(feat[t, n], a[t]) + .1) for t in range(5)]
            V.append(literal_lambda_return(r, v, .9, .8))
            v0.append(v[0])
        yield np.array(V).T                                              # (H, N)
        yield np.array([[literal_reward(feat[0, j * B + b], action[0, (j + 1) * B + b], 0, 0)
                         + .9 * (.2 * v0[(j + 1) * B + b] + .8 * V[(j + 1) * B + b][0])
                         for b in range(B)] for j in range(L - 1)])
    rules = [np.min] if target == "min" else [lambda q, i=i: q[i] for i in range(3)]
    fits = [all(np.allclose(got, want, atol=1e-9)
                for got, want in zip((model, data), expected(rule))) for rule in rules]
    assert sum(fits) == 1


@pytest.mark.parametrize("discount", [True, False])
def test_critic_losses_are_literally_W7_and_W8(discount):
    """sum_i mean g^{t+1} (Q_i - Vbar)^2 and sum_i mean_j (Q_i - y_j)^2 in float64 loops."""
    dream, L, B = random_dream(), 3, 2
    replay_feat = torch.randn(L, B, 3, dtype=torch.float64)
    replay_action = torch.randn(L, B, 2, dtype=torch.float64)
    model, data = torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    c = config(gamma=.9, critic_discount=discount)
    feat, action, total = numbers(dream.feat), numbers(dream.action), 0
    for t, n in itertools.product(range(4), range(6)):
        error = literal_q(feat[t, n], action[t + 1, n]) - model[t, n].item()
        total += (.9 ** (t + 1) if discount else 1) * (error ** 2).sum() / (4 * 6)
    got, info = cmil.model_critic_loss(toy_critics, model, dream, c)
    assert got.item() == info["critic/model"].item() == pytest.approx(total, rel=1e-9)
    total = 0
    for j, b in itertools.product(range(L - 1), range(B)):
        q = literal_q(numbers(replay_feat[j, b]), numbers(replay_action[j + 1, b]))
        total += ((q - data[j, b].item()) ** 2).sum() / ((L - 1) * B)
    got, info = cmil.data_critic_loss(toy_critics, data, replay_feat, replay_action)
    assert got.item() == info["critic/data"].item() == pytest.approx(total, rel=1e-9)


def test_the_critics_loss_is_W9():
    """The sum of both, or with --no-data-critic [W7] alone."""
    for data_critic in (True, False):
        agent, replay = agent_and_replay(data_critic=data_critic)
        torch.manual_seed(0)
        losses, info = capture_losses(agent, replay, what="info")
        parts = info["critic/model"] + (info["critic/data"] if data_critic else 0)
        assert torch.equal(losses["critics"], parts)
        assert ("critic/data" in info) == data_critic


# ------------------------------------------------------------------------------------ who learns


def capture_losses(agent, replay, clone=False, what="losses"):
    """Run agent.update up to its losses -> {network: loss}, and if asked for the info beside them;
    no step."""
    captured = []
    agent.apply = lambda *losses_and_info: captured.extend(losses_and_info)
    agent.update(replay, clone)
    del agent.apply
    return captured if what == "info" else captured[0]


def touched(loss, module):
    """Names of the parameters of `module` with a gradient of `loss` that is not zero."""
    names, parameters = zip(*module.named_parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, g in zip(names, gradients) if g is not None and g.any()}


DYNAMICS = {"rssm.input", "rssm.gru", "rssm.norm", "rssm.priors"}


def test_gradient_routing_table():
    """Who learns from what (the table above class Agent), by autograd over ALL parameters."""
    agent, replay = agent_and_replay(alpha=3., free_nats=0.)     # or the priors might have none
    losses = capture_losses(agent, replay)
    nets = {name: getattr(agent, name) for name in ("world", "actor", "disc", "critics", "targets")}
    agent.targets.requires_grad_(True)
    reach = {(loss, name): touched(losses[loss], net)
             for loss in losses for name, net in nets.items()}
    everything = {name: {n for n, _ in net.named_parameters()} for name, net in nets.items()}
    # Every parameter of its own network learns (of the priors: the drawn heads, at least one).
    for loss in ("world", "disc", "critics", "actor"):
        missed = everything[loss] - reach[loss, loss]
        assert not missed, f"the {loss} loss misses {missed}"
    # World model, discriminator and critics touch nothing else.
    for loss in ("world", "disc", "critics"):
        for name in set(nets) - {loss}:
            assert not reach[loss, name], f"the {loss} loss reaches {name}: {reach[loss, name]}"
    # The actor's loss runs through D, the critics and the dynamics, but not to encoder, posterior
    # or decoder: imagination starts at detached states. (What it runs through does not step.)
    assert reach["actor", "disc"] and reach["actor", "critics"] and not reach["actor", "targets"]
    parts = {".".join(name.split(".")[:2]) for name in reach["actor", "world"]}
    assert parts == DYNAMICS


def test_cloning_trains_only_the_actor():
    """The BC term reaches no network but the actor; in clone_step the world model has its own."""
    agent, replay = agent_and_replay()
    losses = capture_losses(agent, replay, clone=True)
    assert set(losses) == {"world", "actor"}
    assert touched(losses["actor"], agent.actor) and not touched(losses["actor"], agent.world)
    assert touched(losses["world"], agent.world) and not touched(losses["world"], agent.actor)


def test_the_policys_own_input_is_cut():
    """a_t ~ pi(.|stop_grad(s_t)): states carry gradient along a rollout, later actions do not."""
    rssm, actor = small_rssm(), randomize(cmil.Actor(10, 2, 8, 1, 0.1))
    stoch = torch.randn(5, 4, requires_grad=True)
    start = cmil.State(stoch, torch.randn(5, 6), torch.zeros(5, 4), torch.ones(5, 4))
    dream = cmil.imagine(rssm, actor, start, torch.zeros(5, 2), 3)

    def gradient(of, to):
        g, = torch.autograd.grad(of.sum(), to, allow_unused=True, retain_graph=True)
        return g is not None and bool(g.any())
    assert gradient(dream.feat[3], stoch) and gradient(dream.disagreement[2], stoch)
    for value in (dream.action[1:], dream.last_action, dream.entropy):
        assert value.requires_grad and not gradient(value, stoch)


def actor_gradient(**changes):
    """The actor's gradient of [W6] + BC in one update with fixed random numbers, as one vector."""
    torch.manual_seed(0)
    agent, replay = agent_and_replay(**changes)
    torch.manual_seed(1)
    losses = capture_losses(agent, replay)
    return torch.cat([g.flatten() for g in torch.autograd.grad(
        losses["actor"], agent.opts["actor"].params)])


def test_actor_feels_each_part_of_its_objective():
    """alpha, the reward's form, beta, entropy and the values all change the actor's gradient."""
    base = actor_gradient(alpha=1., beta=0.)
    for change in (dict(alpha=2.), dict(reward="sigmoid"), dict(beta=1.), dict(entropy=1.),
                   dict(lam=0.), dict(gamma=.5), dict(actor_discount=False)):
        other = actor_gradient(**{"alpha": 1., "beta": 0., **change})
        assert not torch.allclose(base, other, rtol=1e-3), change
    # Linear in alpha and beta: equal steps change the gradient equally.
    by_alpha = [actor_gradient(alpha=a, beta=0.) for a in (0., 1., 2.)]
    torch.testing.assert_close(by_alpha[2] - by_alpha[1], by_alpha[1] - by_alpha[0],
                               rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("clone", [False, True])
def test_update_steps_each_network_on_its_own_gradient(clone, monkeypatch):
    """Every optimizer gets d(own loss)/d(own parameters) at the parameters before the update.

    Oracle: autograd on the captured losses, before anything has stepped.
    """
    agent, replay = agent_and_replay()
    expected, got, real_apply = {}, {}, agent.apply

    def apply(losses, info):
        for name, loss in losses.items():
            parameters = agent.opts[name].params
            expected[name] = torch.autograd.grad(loss, parameters, retain_graph=True,
                                                 allow_unused=True)
        return real_apply(losses, info)
    agent.apply = apply
    calls = calls_of(monkeypatch, cmil.Optimizer, "step",
                     lambda real, self, grads: real(self, grads))
    agent.update(replay, clone)
    names = {id(opt): name for name, opt in agent.opts.items()}
    for opt, gradients in calls:
        got[names[id(opt)]] = gradients
    assert got.keys() == expected.keys()
    for name in got:
        for mine, other in zip(got[name], expected[name]):
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
    modules = [agent.world, agent.actor, agent.disc, agent.critics, agent.targets]
    assert all(p.grad is None for module in modules for p in module.parameters())
    owners = [p for opt in agent.opts.values() for p in opt.params]
    assert len(owners) == len({id(p) for p in owners})   # no parameter has two owners
    learning = {id(p) for module in modules[:4] for p in module.parameters()}
    assert {id(p) for p in owners} == learning


def test_update_uses_the_replay_half_and_the_demo_half(monkeypatch):
    """World model, imagination and [W8] see the replay half; discriminator and BC the demos' half.

    Replay pictures are black and its actions -0.5; those of the demos are white and +0.5.
    """
    c = config()
    agent = cmil.Agent(c, 2, cmil.setup_torch(c))
    replay = cmil.Replay(1000, c.length, 2, torch.device("cpu"))
    white, black = (np.full((21, 64, 64, 3), v, np.uint8) for v in (255, 0))
    half = np.full((21, 2), .5, np.float32)
    replay.add(white, half, demo=True)
    replay.add(black, -half)
    # Of each half, draw windows at nine tenths of the starts.
    monkeypatch.setattr(torch, "rand", lambda n, device=None: torch.full((n,), .9))
    seen = {name: calls_of(monkeypatch, cmil, name, lambda real, *args: real(*args))
            for name in ("world_model_loss", "imagine", "discriminator_loss", "target_values",
                         "data_target", "model_critic_loss", "data_critic_loss", "clone_loss")}
    agent_disc = copy.deepcopy(agent.disc)               # as it was for this update
    agent.update(replay)
    L, B = c.length, c.batch
    _, image, post, _ = seen["world_model_loss"][0]
    assert image.shape == (L, B, 3, 64, 64) and (image == -.5).all()
    assert post.stoch.shape[:2] == (L, B)
    _, _, start, led_here, horizon = seen["imagine"][0]
    assert start.stoch.shape[0] == L * B and horizon == c.horizon and (led_here == -.5).all()
    torch.testing.assert_close(start.feat, post.feat.flatten(0, 1))      # row t B + b
    assert not start.stoch.requires_grad and not start.deter.requires_grad
    _, (s, a), (policy_s, policy_a), sigma = seen["discriminator_loss"][0]
    assert s.shape[:2] == (L - 1, B) and (a == .5).all() and sigma == c.sigma
    assert policy_s.shape[:2] == policy_a.shape[:2] == (c.horizon, L * B)
    assert not policy_s.requires_grad and not policy_a.requires_grad and not s.requires_grad
    _, dream, reward, _ = seen["target_values"][0]
    assert torch.equal(reward, cmil.conservative_reward(agent_disc, dream, c))  # [P10], once
    _, value, returns, feat, action, _ = seen["data_target"][0]
    assert (action == -.5).all() and torch.equal(feat, post.feat.detach())
    torch.manual_seed(0)
    values, V = cmil.target_values(agent.targets, dream, reward, c)
    assert torch.equal(value, values[0]) and torch.equal(returns, V[0])
    _, target, of, _ = seen["model_critic_loss"][0]
    assert torch.equal(target, V) and of is dream
    _, target, feat, action = seen["data_critic_loss"][0]
    assert target.shape == (L - 1, B)
    assert (action == -.5).all() and torch.equal(feat, post.feat.detach())
    _, feat, action = seen["clone_loss"][0]
    assert (action == .5).all() and torch.equal(feat[:-1], s)


# ------------------------------------------------------------------------------------ other methods


@pytest.mark.parametrize("algo, flags", [
    ("vmail", dict(members=1, alpha=0., beta=0., seed_steps=0)),
    ("dgail", dict(members=1, alpha=0., beta=0., offline=True)),
    ("dbc", dict(reward="none", offline=True))])
def test_rows_of_the_table_are_cmil_with_other_options(algo, flags, tmp_path):
    """An update of the method and of cmil with the row's fields as flags: equal, bit for bit."""
    configs, states = [], []
    for chosen, options in ((algo, {}), ("cmil", flags)):
        c = cmil.make_config({"env": "point", "preset": "debug", "algo": chosen, "device": "cpu",
                              "logdir": str(tmp_path), **options})
        configs.append({**dataclasses.asdict(c), "algo": "either"})
        torch.manual_seed(0)
        agent = cmil.AGENTS.get(chosen, cmil.Agent)(c, 2, cmil.setup_torch(c))
        replay = agent_and_replay()[1]
        for clone in (True, False):
            agent.update(replay, clone)
        states.append(agent.state_dict())
    assert configs[0] == configs[1] and same(*states)


def test_vmail_is_not_conservative(monkeypatch):
    """One prior, no penalty, no seed rounds, no cloning: the start trains the world model alone,
    and the actor's loss is [W6] without the BC term."""
    agent, replay = agent_and_replay("vmail")
    c = agent.c
    assert (c.members, c.alpha, c.beta, c.seed_steps) == (1, 0, 0, 0) and not c.offline
    assert capture_losses(agent, replay, clone=True).keys() == {"world"}
    results = []
    calls_of(monkeypatch, cmil, "actor_loss", lambda real, *args: (
        results.append(real(*args)) or results[0]))
    losses, info = capture_losses(agent, replay, what="info")
    assert torch.equal(losses["actor"], results[0][0]) and not info["uncertainty"].any()


@pytest.mark.parametrize("algo", list(cmil.ALGOS))
def test_every_method_trains_and_resumes(algo, tmp_path):
    """A run to its end, and one that is stopped in the middle and goes on: equal, bit for bit."""
    changes = dict(algo=algo, **{**cmil.ALGOS[algo], "steps": 150, "eval_every": 150})
    if cmil.ALGOS[algo].get("pretrain", 1):
        changes["pretrain"] = 3
    state, lines = train(tmp_path / "a", **changes)
    train(tmp_path / "b", stop_at=state["updates"] - 4, **changes)
    again, again_lines = train(tmp_path / "b", **changes)
    assert same(state, again) and lines == again_lines and state["updates"] >= 8
    assert lines[-1]["step"] == 150 and "eval/success" in lines[-1]
    played = sorted((tmp_path / "a" / "episodes").glob("*.npz"))
    assert len(played) == (0 if changes.get("offline") else 3)


@pytest.mark.parametrize("algo", list(cmil.ALGOS))
def test_min_std_holds_in_every_method(algo):
    """However small the networks would have it, the policy's std is what --min-std allows."""
    agent, _ = agent_and_replay(algo, min_std=.04)
    actor, = (m for net in agent.networks.values() for m in net.modules()
              if isinstance(m, cmil.Actor))
    with torch.no_grad():
        actor.layers[-1].bias[2:] = -100
    policy = actor(torch.randn(3, actor.layers[0].in_features))
    torch.testing.assert_close(policy.scale, torch.full((3, 2), .04))


def test_match_is_literally_eq_8():
    """<x, y> / max(|x|, |y|)^2, by hand and in loops; 1 for equals, and zero vectors are no NaN."""
    x, y = torch.tensor([3., 4.]), torch.tensor([1., 2.])
    assert cmil.match(x, y).item() == pytest.approx(11 / 25)
    assert cmil.match(x, x).item() == pytest.approx(1) and cmil.match(x, -x).item() == -1
    assert cmil.match(x, 2 * x).item() == pytest.approx(.5)
    assert cmil.match(0 * x, 0 * x).item() == 0
    x, y = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    for t, n in itertools.product(range(4), range(3)):
        a, b = numbers(x[t, n]), numbers(y[t, n])
        assert cmil.match(x, y)[t, n].item() == pytest.approx(
            sum(a * b) / max(np.sqrt(sum(a * a)), np.sqrt(sum(b * b))) ** 2)


def test_ditto_compares_states_of_the_same_step(monkeypatch):
    """Rollouts begin at rows 0 ... L-H-1 of the demos' windows; after k steps from row t, the
    dream's deter meets the expert's of row t + k; that is the reward, for [W5], [W6] and [W7]."""
    agent, replay = agent_and_replay("ditto")
    c, seen = agent.c, {name: calls_of(monkeypatch, cmil, name, lambda real, *args: real(*args))
                        for name in ("match", "imagine", "world_model_loss", "actor_loss",
                                     "target_values", "model_critic_loss")}
    sampled, sample_demos, returned = [], replay.sample_demos, []
    replay.sample_demos = lambda batch: sampled.append(sample_demos(batch)) or sampled[-1]
    randomize(agent.targets)
    values = cmil.target_values
    monkeypatch.setattr(cmil, "target_values", lambda *args: returned.append(values(*args)) or (
        returned[-1]))
    losses = capture_losses(agent, replay)
    L, B, H = c.length, c.batch, c.horizon
    _, image, post, _ = seen["world_model_loss"][0]
    rows = (replay.image[:42].float() / 255 - .5).movedim(-1, 1).flatten(1)
    assert all((rows == frame.flatten()).all(1).any() for frame in image.flatten(0, 1))
    _, _, start, led_here, horizon = seen["imagine"][0]
    assert horizon == H and start.deter.shape[0] == len(led_here) == (L - H) * B
    assert not start.deter.requires_grad
    _, action = sampled[0]
    assert torch.equal(led_here, action[:L - H].flatten(0, 1))
    x, y = seen["match"][0]
    assert x.shape == y.shape == (H, (L - H) * B, c.deter) and not y.requires_grad
    for k, t, b in itertools.product(range(H), range(L - H), range(B)):
        assert torch.equal(y[k, t * B + b], post.deter[t + k + 1, b])
        assert all(torch.equal(x[t * B + b], y[t, b]) for x, y in zip(start, post))
    _, dream, reward, _ = seen["actor_loss"][0]
    assert torch.equal(x, dream.feat[1:, :, c.stoch:]) and torch.equal(reward, cmil.match(x, y))
    assert seen["target_values"][0][0] is agent.targets and seen["target_values"][0][2] is reward
    assert seen["model_critic_loss"][0][1] is returned[0][1] and len(sampled) == 1
    assert losses.keys() == {"world", "critics", "actor"}
    parts = {name.split(".")[1] for name in touched(losses["actor"], agent.world)}
    assert parts == {"input", "gru", "norm", "priors"}   # gradients go through the dynamics


def test_ditto_learns_to_go_where_the_expert_goes():
    """In a model that stays as it is, only the expert's own action leads to the expert's states,
    step for step: the policy finds that action, and the match rises."""
    agent, replay = agent_and_replay("ditto", lr=3e-3, gamma=.9)
    expert = np.float32([-.9, .9])
    replay.action[:] = torch.tensor(expert)
    with torch.no_grad():
        agent.world.rssm.input.weight[:, -2:] *= 5       # a model in which actions matter
    agent.apply = lambda losses, info: cmil.Agent.apply(agent, {
        name: loss for name, loss in losses.items() if name != "world"}, info)
    image = replay.image[:8].numpy()

    def error():
        return np.abs(agent.act(image, sample=False)[0] - expert).max()
    before = error()
    rewards = [float(agent.update(replay)["reward"]) for _ in range(100)]
    assert error() < .25 and before > .6, (before, error())
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + .2, rewards


def test_match_of_other_actions(tmp_path, monkeypatch, capsys):
    """results/match.py: the experts' own actions are those of the rows the dream is compared with;
    a run of another method is one line."""
    tool, (agent, replay) = script("match"), agent_and_replay("ditto")
    done = calls_of(monkeypatch, agent.world.rssm, "step_prior", lambda real, *args: real(*args))
    sampled, sample_demos = [], replay.sample_demos
    replay.sample_demos = lambda batch: sampled.append(sample_demos(batch)) or sampled[-1]
    found = tool.matches(agent, replay, windows=3)
    assert set(found) == {"policy", "expert", "random"} and len(set(found.values())) == 3
    H, (_, action) = agent.c.horizon, sampled[0]
    starts = agent.c.length - H
    for k, (_, a) in enumerate(done[H:2 * H], 1):
        assert torch.equal(a.view(starts, 3, 2), action[k:k + starts])
    spread = torch.stack([a for _, a in done[2 * H:]])
    assert len(done) == 3 * H and spread.min() < -.8 and spread.max() > .8
    for algo in ("ditto", "bc"):
        train(tmp_path / algo, **{**cmil.ALGOS[algo], "algo": algo, "pretrain": 1, "steps": 50})
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["match.py", str(tmp_path / "ditto"), str(tmp_path / "bc")])
    with pytest.raises(SystemExit):
        tool.main()
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["run"] == "ditto" and "a run of bc" in err


@pytest.mark.parametrize("algo", ["bc", "pdac"])
def test_acting_on_pixels_samples(algo):
    """sample=True draws an action for each environment anew; sample=False takes the mode."""
    agent, _ = agent_and_replay(algo)
    image = np.zeros((2, 64, 64, 3), np.uint8)
    first, second = (agent.act(image)[0] for _ in range(2))
    assert (first != second).all() and (first[0] != first[1]).all()
    first, second = (agent.act(image, None, False)[0] for _ in range(2))
    assert np.array_equal(first, second)
    # A batch's rows may be summed in another order: pdac's trunk shows the last bit of it.
    np.testing.assert_allclose(first[0], first[1], rtol=0, atol=0 if algo == "bc" else 1e-6)


def test_bc_clones_single_frames_end_to_end():
    """-mean log pi(action[t+1] | image[t]) of the demos' windows; encoder and policy learn."""
    agent, replay = agent_and_replay("bc")
    torch.manual_seed(0)
    loss, = capture_losses(agent, replay, clone=True).values()
    torch.manual_seed(0)
    image, action = replay.sample_demos(agent.c.batch)
    pixels, total = cmil.to_float(image), 0
    for t in range(len(image) - 1):
        total -= agent.policy(pixels[t]).log_prob(action[t + 1]).mean() / (len(image) - 1)
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert touched(loss, agent.policy) == {name for name, _ in agent.policy.named_parameters()}
    first, carry = agent.act(image[0].numpy(), None, False)
    second, _ = agent.act(image[0].numpy(), agent.act(image[1].numpy(), carry, False)[1], False)
    assert np.array_equal(first, second)                 # it has no memory


def test_n_step_target_is_literally_the_sum():
    """y_t = sum_{k<n} g^k r_{t+k} + g^n v_{t+n} in loops; one of them by hand."""
    reward, value = torch.randn(6, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    y = cmil.n_step_target(reward, value, .9, 3)
    assert y.shape == (4, 3)
    for t, b in itertools.product(range(4), range(3)):
        want = sum(.9 ** k * reward[t + k, b].item() for k in range(3)) + .9**3 * value[t + 3, b]
        assert y[t, b].item() == pytest.approx(want.item())
    hand = cmil.n_step_target(torch.tensor([[1.], [2.]]), torch.tensor([[9.], [9.], [4.]]), .5, 2)
    assert hand.tolist() == [[1 + 1 + 1]]


def test_gradient_penalty_by_hand(monkeypatch):
    """logit = w x: the gradient is w wherever it is taken, so that the penalty is (|w| - 1)^2; it
    pulls |w| towards 1. And it is taken between the pairs."""
    disc = cmil.Discriminator(2, 1, 8, 1)
    w = nn.Parameter(torch.tensor([2., 3., 6.]))
    disc.layers = Function(lambda x: (x * w).sum(-1, keepdim=True))
    pair = torch.randn(5, 2), torch.randn(5, 1)
    other = torch.randn(5, 2), torch.randn(5, 1)
    penalty = cmil.gradient_penalty(disc, pair, other)
    assert penalty.item() == pytest.approx((7 - 1) ** 2)
    gradient, = torch.autograd.grad(penalty, w)
    np.testing.assert_allclose(gradient, 2 * 6 * w.detach() / 7, rtol=1e-5)
    # logit = |x|^2: the gradient is 2 x, here three tenths of the way from policy to expert.
    disc.layers = Function(lambda x: (x ** 2).sum(-1, keepdim=True))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, .3))
    mix = .3 * torch.cat(pair, -1) + .7 * torch.cat(other, -1)
    assert cmil.gradient_penalty(disc, pair, other).item() == pytest.approx(
        ((2 * mix.norm(dim=-1) - 1) ** 2).mean().item(), rel=1e-5)


def test_random_shifts_are_crops_of_the_padded_frame():
    """Each frame is one of the 81 crops of its copy with repeated edges; in time all are drawn."""
    x = torch.randn(400, 2, 8, 8)
    padded = nn.functional.pad(x, (4, 4, 4, 4), mode="replicate")
    shifted, seen = cmil.random_shift(x), set()
    assert shifted.shape == x.shape
    for i in range(len(x)):
        fits = [(r, k) for r in range(9) for k in range(9)
                if torch.equal(shifted[i], padded[i, :, r:r + 8, k:k + 8])]
        assert len(fits) == 1
        seen.add(fits[0])
    assert {r for r, _ in seen} == {k for _, k in seen} == set(range(9)) and len(seen) > 60


def test_pdac_pairs_stacks_actions_and_targets(monkeypatch):
    """A stack holds its row's frame and the two before; Q(s_t, a_t) meets the three rewards from
    there on and the targets' value three rows later; D meets the demos' pairs as the expert's."""
    agent, replay = agent_and_replay("pdac")
    c, L = agent.c, agent.c.length
    number = torch.arange(len(replay.image), dtype=torch.uint8)
    replay.image[:] = number[:, None, None, None]        # each row's number, in its pixels ...
    replay.action[:] = number[:, None] / 255             # ... and in its action
    # Windows late in the demos (of 42 rows), and late in everything.
    monkeypatch.setattr(torch, "rand", lambda n, device=None: torch.full((n,), .9))
    shifted = calls_of(monkeypatch, cmil, "random_shift", lambda real, x: x)
    # embed: the number of the stack's last frame / 255; D: s - 2 a; Q: s and 2 s, targets 3 s, 4 s
    agent.critics["encoder"].forward = lambda x: x[..., 6:7, 0, 0] + .5
    agent.disc.layers = Function(lambda x: x[..., :1] - 2 * x[..., 1:2])
    asked = []

    def critics(s, a):
        asked.append((s, a))
        return torch.stack([s[..., 0], 2 * s[..., 0]]).requires_grad_()
    agent.critics["heads"].forward = critics
    next_actions = []
    agent.targets.forward = lambda s, a: next_actions.append(a) or torch.stack(
        [4 * s[..., 0], 3 * s[..., 0]])
    agent.actor.forward = lambda s: cmil.TruncatedNormal(
        torch.zeros(*s.shape[:-1], 2, requires_grad=True), torch.ones(*s.shape[:-1], 2))
    calls_of(monkeypatch, cmil.TruncatedNormal, "rsample", lambda real, policy: (
        policy.loc + .25))                               # a sample, not the mode
    seen = {name: calls_of(monkeypatch, cmil, name, lambda real, *args: real(*args))
            for name in ("n_step_target", "discriminator_loss", "gradient_penalty")}
    losses, info = capture_losses(agent, replay, what="info")

    (stack,), (expert_stack,) = shifted
    assert stack.shape == expert_stack.shape == ((L - 2) * c.batch, 9, 64, 64)
    frames = (stack[:, ::3, 0, 0].view(L - 2, c.batch, 3) + .5) * 255
    row = frames[..., 2]
    torch.testing.assert_close(frames[..., 0], row - 2)
    torch.testing.assert_close(frames[..., 1], row - 1)
    _, expert, policy, sigma = seen["discriminator_loss"][0]
    assert sigma == 0 and (expert[0] * 255 < 42).all() and (policy[0] * 255 > 42).all()
    for s, a in (expert, policy):                        # (embed[t], action[t+1]): numbers t, t+1
        torch.testing.assert_close(a[..., :1] * 255, s * 255 + 1)
    assert all(torch.equal(x, y) for pair, same_pair in zip((expert, policy), seen[
        "gradient_penalty"][0][1:]) for x, y in zip(pair, same_pair))
    penalty = (math.sqrt(5) - 1) ** 2                    # of D's gradient (1, -2)
    assert losses["disc"].item() == pytest.approx(info["disc/loss"].item() + 10 * penalty, rel=1e-5)

    reward, value, gamma, n = seen["n_step_target"][0]
    torch.testing.assert_close(reward * 255, row[:-1] - 2 * (row[:-1] + 1))
    torch.testing.assert_close(value * 255, 3 * row)     # the least of the targets
    assert all((action == .25).all() for action in next_actions) and len(next_actions) == 1
    assert (gamma, n) == (c.gamma, 3)
    s, a = asked[0]
    torch.testing.assert_close(s[..., 0] * 255, row[:L - 5])
    torch.testing.assert_close(a[..., 0] * 255, row[:L - 5] + 1)
    y = sum(c.gamma ** k * reward[k:k + L - 5] for k in range(3)) + c.gamma ** 3 * value[3:]
    want = ((s[..., 0] - y) ** 2).mean() + ((2 * s[..., 0] - y) ** 2).mean()
    assert losses["critics"].item() == pytest.approx(want.item(), rel=1e-5)
    entropy = cmil.TruncatedNormal(torch.zeros(2), torch.ones(2)).entropy().item()
    assert losses["actor"].item() == pytest.approx(
        -(row / 255).mean().item() - c.entropy * entropy, rel=1e-4)


def test_pdac_gradients_and_targets():
    """The encoder learns from the critics alone; the targets follow by a hundredth each update."""
    agent, replay = agent_and_replay("pdac", entropy=0.)
    losses = capture_losses(agent, replay)
    assert losses.keys() == {"critics", "actor", "disc"}
    everything = {name for name, _ in agent.critics.named_parameters()}
    assert touched(losses["critics"], agent.critics) == everything
    assert not touched(losses["critics"], agent.disc) | touched(losses["critics"], agent.actor)
    assert {name.split(".")[0] for name in touched(losses["actor"], agent.critics)} == {"heads"}
    assert touched(losses["actor"], agent.actor) and not touched(losses["actor"], agent.disc)
    assert touched(losses["disc"], agent.disc) and not touched(losses["disc"], agent.critics)
    randomize(agent.targets)                             # far from what they follow
    before = copy.deepcopy(agent.targets.state_dict())
    agent.update(replay)
    heads = agent.critics["heads"].state_dict()
    assert agent.targets.state_dict().keys() == heads.keys()
    for name, now in agent.targets.state_dict().items():
        expected = torch.lerp(before[name], heads[name], .01)
        torch.testing.assert_close(now, expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(now, before[name])


def test_pdac_embeds_a_stack_in_fifty_bounded_numbers():
    """[Q]'s trunk on the encoder: a linear layer to 50, normalised over them, tanh; in float64."""
    agent, _ = agent_and_replay("pdac")
    encoder = randomize(agent.critics["encoder"])
    stack = torch.rand(3, 9, 64, 64) - .5
    convolutions, linear, norm, _ = encoder
    x = numbers(convolutions(stack)) @ numbers(linear.weight).T + numbers(linear.bias)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    x = np.tanh(x * numbers(norm.weight) + numbers(norm.bias))
    assert x.shape == (3, 50) and x.std() > .3
    np.testing.assert_allclose(numbers(encoder(stack)), x, rtol=1e-4, atol=1e-5)


def test_pdac_acts_on_the_last_three_frames():
    """Repeated at an episode's start; then each frame in turn, the oldest first."""
    agent, _ = agent_and_replay("pdac")
    image = np.stack([np.full((2, 64, 64, 3), 50 * t, np.uint8) for t in range(5)])
    carry, stacks = None, []
    for frame in image:
        action, carry = agent.act(frame, carry)
        stacks.append(((carry[:, ::3, 0, 0] + .5) * 255).round()[0].tolist())
        assert action.shape == (2, 2) and action.dtype == np.float32
    assert stacks == [[0, 0, 0], [0, 0, 50], [0, 50, 100], [50, 100, 150], [100, 150, 200]]


def test_pdac_learns_what_the_expert_does_in_each_picture():
    """In the dark the expert pushes one way, in the light the other way; what was played is random.
    A logit of picture and action, critics that follow it and an actor that climbs them must bring
    the policy to both: without either of them, or blind, it would miss one by 1.8."""
    agent, replay = agent_and_replay("pdac", gamma=.2, length=10, batch=12, units=32,
                                     disc_units=32, lr=6e-4, disc_lr=3e-3)
    replay.rows = replay.windows = 0                     # other episodes take the place of all
    rng, expert = np.random.default_rng(0), np.float32([[-.9, .9], [.9, -.9]])
    for number in range(6):                              # the first two are the demonstrations
        light, image = number % 2, rng.integers(0, 40, (21, 64, 64, 3), np.uint8)
        action = rng.uniform(-1, 1, (21, 2)).astype(np.float32)
        action[:] = expert[light] if number < 2 else action
        replay.add(image + np.uint8(200 * light), action, demo=number < 2)
    pictures = np.stack([np.full((64, 64, 3), 20 + 200 * light, np.uint8) for light in (0, 1)])

    def error():
        return np.abs(agent.act(pictures, sample=False)[0] - expert).max()
    before = error()
    for _ in range(240):
        agent.update(replay)
    assert error() < .3 and before > .6, (before, error())


# ------------------------------------------------------------------------------------ optimizer


def adam_by_hand(w, gradients, c, lr):
    """AdamW in float64 with global-norm clipping; decay w *= 1 - c.weight_decay comes first."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step, g in enumerate(gradients, 1):
        g = g * min(1, c.clip / np.linalg.norm(g))
        w = w * (1 - c.weight_decay)
        m, v = .9 * m + .1 * g, .999 * v + .001 * g ** 2
        w = w - lr * (m / (1 - .9 ** step)) / (np.sqrt(v / (1 - .999 ** step)) + c.adam_eps)
    return w


def test_every_weight_moves_against_its_own_gradient():
    """Adam's first step is -lr sign(gradient), weight by weight, whatever the memory layout of a
    gradient is: the fused kernel ignores strides and once updated the wrong convolution weights."""
    agent, replay = agent_and_replay(weight_decay=0., free_nats=0.)
    step, seen = agent.opts["world"].step, []
    agent.opts["world"].step = lambda grads: (seen.extend(g.clone() for g in grads), step(grads))[1]
    before = [p.detach().clone() for p in agent.world.parameters()]
    agent.update(replay, clone=True)
    for (name, after), old, grad in zip(agent.world.named_parameters(), before, seen):
        large = grad.abs() > 100 * agent.c.adam_eps
        assert large.any(), name
        assert (torch.sign(after - old) == -torch.sign(grad))[large].all(), name


def test_optimizer_is_adam_with_clipping():
    """Three steps, the second one clipped, against Adam by hand in float64; norms are unclipped."""
    net, c, rng = nn.Linear(4, 3), config(clip=5., weight_decay=1e-3), np.random.default_rng(0)
    opt = cmil.Optimizer(net, .01, c)
    before = np.concatenate([numbers(p).ravel() for p in net.parameters()])
    gradients = [rng.normal(size=15) * scale for scale in (.5, 100., .3)]
    for g in gradients:
        parts = torch.tensor(g[:12].reshape(3, 4)).float(), torch.tensor(g[12:]).float()
        assert opt.step(parts).item() == pytest.approx(np.linalg.norm(g), rel=1e-5)
    after = np.concatenate([numbers(p).ravel() for p in net.parameters()])
    np.testing.assert_allclose(after, adam_by_hand(before, gradients, c, .01), rtol=1e-5, atol=1e-6)
    assert np.abs(after - before).max() > 1e-2


@pytest.mark.parametrize("lr", [3e-4, 5e-4, 1e-2])
def test_weight_decay_factor(lr):
    """With a zero gradient a step multiplies weights by 1 - 1e-6, to within one float32."""
    net = nn.Linear(100, 100)
    opt = cmil.Optimizer(net, lr, config(lr=lr))
    before = numbers(net.weight)
    opt.step([torch.zeros_like(p) for p in net.parameters()])
    expected = before * (1 - 1e-6)
    neighbour = np.spacing(np.abs(expected).astype(np.float32))
    assert (np.abs(numbers(net.weight) - expected) <= neighbour).all()
    assert (net.weight.detach().numpy() != before.astype(np.float32)).mean() > .99


def test_weight_decay_is_coupled_to_nothing_else():
    """The paper preset's decay is 1e-6 a step; weight_decay=0 leaves weights as they are."""
    assert cmil.Config().weight_decay == 1e-6
    net = nn.Linear(5, 5)
    opt = cmil.Optimizer(net, 3e-4, config(weight_decay=0.))
    before = copy.deepcopy(net.state_dict())
    opt.step([torch.zeros_like(p) for p in net.parameters()])
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient_changes_nothing(poison):
    """A NaN or infinity anywhere skips weights, moments, decay and step count, and is counted."""
    net = nn.Linear(4, 3)
    opt = cmil.Optimizer(net, .01, config())
    good = [torch.ones_like(p) for p in net.parameters()]
    bad = [torch.ones_like(p) for p in net.parameters()]
    bad[1][2] = poison
    opt.step(good)
    before = copy.deepcopy((net.state_dict(), opt.adam.state_dict()["state"]))
    for count in (1, 2):
        opt.step(bad)
        assert same((net.state_dict(), opt.adam.state_dict()["state"]), before)
        assert opt.skipped == opt.skipped_now == count
    opt.step(good)
    assert opt.skipped == 2 and opt.skipped_now == 0
    assert not same(net.state_dict(), before[0])
    assert opt.adam.state_dict()["state"][0]["step"] == 2


# ------------------------------------------------------------------------------------ agent


def test_targets_are_copied_on_schedule_only():
    """target_every = 3: updates 3 and 6 make the targets equal to the critics; else they rest."""
    agent, replay = agent_and_replay(target_every=3)
    last, stepped, step = copy.deepcopy(agent.critics.state_dict()), [], agent.gradient_step

    def watched(replay):
        info = step(replay)
        stepped.append(copy.deepcopy(agent.critics.state_dict()))
        return info
    agent.gradient_step = watched
    for update in range(1, 8):
        agent.update(replay)
        critics = agent.critics.state_dict()
        if update % 3 == 0:
            last = copy.deepcopy(stepped[-1])            # and the critics stay as they are
            assert same(critics, last)
        assert same(agent.targets.state_dict(), last), f"update {update}"
        assert update % 3 == 0 or not same(critics, last)
    assert not any(p.requires_grad for p in agent.targets.parameters())


def test_acting_is_filtering(monkeypatch):
    """act(), frame by frame, arrives at the states that observe() finds for the whole episode."""
    agent, _ = agent_and_replay()
    for net in (agent.world.rssm, agent.actor):
        randomize(net)
    image = np.random.default_rng(0).integers(0, 256, (7, 3, 64, 64, 3), np.uint8)
    actions, states, carry = [np.zeros((3, 2), np.float32)], [], None
    for t in range(7):
        action, carry = agent.act(image[t], carry, sample=False)
        states.append(carry[0])
        actions.append(action)
        torch.testing.assert_close(torch.tensor(action), agent.actor(carry[0].feat).mode)
    fix_noise(monkeypatch, torch.zeros(7, 3, 100))
    post = agent.world.rssm.observe(agent.world.encoder(cmil.to_float(torch.tensor(image))),
                                    torch.tensor(np.stack(actions[:7])))
    for t in range(7):
        torch.testing.assert_close(states[t].feat, post.feat[t], rtol=1e-4, atol=1e-4)


def test_acting_samples_latents_and_actions():
    """sample=True draws both, for each environment anew; sample=False is the same every time."""
    agent, _ = agent_and_replay()
    image = np.zeros((2, 64, 64, 3), np.uint8)
    first, second = (agent.act(image, sample=False) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    first, second = (agent.act(image) for _ in range(2))
    assert (first[0] != second[0]).all() and (first[1][0].stoch != second[1][0].stoch).all()
    assert (first[0][0] != first[0][1]).all()            # each environment draws its own
    assert np.abs(first[0]).max() <= 1 and first[0].dtype == np.float32


def test_open_loop():
    """Shapes; predictions see the context's frames and all actions, never the later frames."""
    agent, replay = agent_and_replay()
    image, action = replay.sample_demos(3)               # (8, 3, ...)

    def run(image, action):
        torch.manual_seed(0)
        return agent.open_loop(image, action)
    frames, spread = run(image, action)
    assert frames.shape == image.shape and frames.dtype == torch.uint8
    assert spread.shape == (3, 3) and (spread > 0).all()
    later = image.clone()
    later[5:] = 0
    assert same(run(later, action), (frames, spread))
    assert not same(run(image.flip(0), action)[1], spread)
    assert not same(run(image, action.flip(0))[1], spread)


def test_agent_state_is_complete():
    """An agent that loads another's state makes the same next updates, bit for bit."""
    agent, replay = agent_and_replay(target_every=2)
    agent.update(replay, clone=True), agent.update(replay)
    state = agent.state_dict()
    frozen = copy.deepcopy(state)
    infos = [agent.update(replay) for _ in range(2)]
    assert same(state, frozen)                           # a copy, not a view of what learns on
    other, _ = agent_and_replay(target_every=2, seed=1)
    torch.manual_seed(99)
    other.load_state_dict(state)
    assert same([other.update(replay) for _ in range(2)], infos)
    assert same(other.state_dict(), agent.state_dict())


def test_state_dict_is_tensors_and_plain_values(tmp_path):
    """A checkpoint loads with weights_only=True: no pickled code can hide in it."""
    agent, replay = agent_and_replay()
    agent.update(replay)
    torch.save(agent.state_dict(), tmp_path / "x.pt")
    assert same(torch.load(tmp_path / "x.pt", weights_only=True), agent.state_dict())


# ------------------------------------------------------------------------------------ speed

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


# Every step that is code of its own: method, and whether it is its clone_step.
STEPS = [("cmil", True), ("cmil", False), ("bc", True), ("ditto", False), ("pdac", False)]


@pytest.mark.parametrize("algo, clone", STEPS)
def test_an_update_never_asks_for_a_value(algo, clone):
    """No host synchronisation and no branch on a tensor's value: what a CUDA graph needs.

    torch's fake tensors have shapes and no values, and refuse every question about a value.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    agent, replay = agent_and_replay(algo)
    with FakeTensorMode(allow_non_fake_inputs=True):
        info = agent.update(replay, clone)
        assert all(value.shape == () for value in info.values())
        with pytest.raises(DataDependentOutputException):
            float(next(iter(info.values())))


class PretendGraph:
    """In torch.cuda.CUDAGraph's place: recording notes what would be done, replaying does it."""

    def __init__(self):
        self.replay = lambda: setattr(self, "replays", getattr(self, "replays", 0) + 1)


def pretend_cuda(monkeypatch, recording):
    """torch.cuda's graphs and streams without a device; `recording` stands in for its `graph`.
    -> list of (stream, what it did)"""
    did = []

    def stream(name):
        return types.SimpleNamespace(
            name=name, wait_stream=lambda other: did.append((name, f"waits for {other.name}")))
    main = stream("main")

    @contextlib.contextmanager
    def use(chosen):
        did.append((chosen.name, "in"))
        yield
        did.append((chosen.name, "out"))
    monkeypatch.setattr(cmil.Graphed, "failed", False)
    for name, value in {"Stream": lambda device: stream("side"), "current_stream": lambda: main,
                        "stream": use, "CUDAGraph": PretendGraph,
                        "graph": recording, "set_stream": lambda s: None,
                        "current_device": lambda: 0,
                        "default_generators": [types.SimpleNamespace(
                            clone_state=lambda: 0, graphsafe_set_state=lambda state: None)],
                        }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return did


def test_graphed_steps_are_recorded_once_and_replayed(monkeypatch):
    """Three real calls, on a stream of their own that waits for what was asked before and that
    what follows waits for; one recording that counts for nothing; a replay for every call after.
    """
    done = []
    did = pretend_cuda(monkeypatch, lambda graph, stream: contextlib.nullcontext())
    graphed = cmil.Graphed(lambda replay: done.append(replay) or len(done),
                           torch.device("cuda"), "auto")
    assert [graphed("R") for _ in range(6)] == [1, 2, 3, 4, 4, 4]
    assert done == ["R"] * 4 and graphed.graph.replays == 3
    assert did == 3 * [("side", "waits for main"), ("side", "in"), ("side", "out"),
                       ("main", "waits for side")]


def test_recorded_graphs_are_let_go():
    """A graph holds on to memory and to the tensors it was recorded with: it serves one kind of
    step from then on, until another kind follows, or loading replaces some of the tensors."""
    agent, replay = agent_and_replay()
    held = []
    for clone in (True, True, False, False):
        agent.update(replay, clone)
        held.append(agent.graphed)
    assert held[0] is held[1] is not held[2] is held[3]
    assert [graphed.step for graphed in held[1:3]] == [agent.clone_step, agent.gradient_step]
    state = agent.state_dict()
    for opt in state["opts"].values():
        opt["adam"]["param_groups"][0]["capturable"] = True      # as written on CUDA
    agent.load_state_dict(state)
    agent.update(replay)
    assert agent.graphed is not held[3]
    assert not any(opt.adam.param_groups[0]["capturable"] for opt in agent.opts.values())


@pytest.mark.parametrize("algo, clone", STEPS)
def test_an_update_in_bfloat16(algo, clone):
    """Autocast moves every number of an update a little, and none far; the states stay float32."""
    infos = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        agent, replay = agent_and_replay(algo, precision=precision, free_nats=0.)
        torch.manual_seed(1)
        infos.append(agent.update(replay, clone))
    for key in infos[0]:
        exact, rounded = (float(info[key]) for info in infos)
        assert rounded == pytest.approx(exact, rel=.1, abs=.05), key
    assert infos[0] != infos[1]                          # it did make a difference
    assert all(p.dtype == torch.float32 for network in agent.networks.values()
               for p in network.parameters())


def test_a_graph_that_cannot_be_recorded(monkeypatch, capsys):
    """auto: one line, and every call is a real one; on: the run stops with the reason."""
    def refuse(graph, stream):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")
    pretend_cuda(monkeypatch, refuse)
    done = []
    graphed = cmil.Graphed(done.append, torch.device("cuda"), "auto")
    for i in range(6):
        graphed(i)
    assert done == [0, 1, 2, 3, 4, 5]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "operation not permitted" in lines[0]
    other = cmil.Graphed(done.append, torch.device("cuda"), "auto")      # does not try again
    for i in range(6):
        other(i)
    assert len(done) == 12 and not capsys.readouterr().err
    monkeypatch.setattr(cmil.Graphed, "failed", False)
    graphed = cmil.Graphed(done.append, torch.device("cuda"), "on")
    with pytest.raises(SystemExit):
        for i in range(6):
            graphed(i)
    assert "--graph on" in one_error_line(capsys)


@pytest.mark.parametrize("device, mode", [("cpu", "auto"), ("cpu", "on"), ("cuda", "off")])
def test_where_there_is_no_graph(device, mode):
    """On a CPU, or with --graph off, a step is simply called."""
    graphed = cmil.Graphed(lambda replay: replay, torch.device(device), mode)
    assert [graphed(i) for i in range(6)] == list(range(6)) and graphed.graph is None


@needs_cuda
@pytest.mark.parametrize("precision, rtol, atol", [("float32", 2e-3, 2e-4),
                                                   ("bfloat16", 2e-2, 2e-3)])
def test_a_graphed_update_is_the_eager_one(precision, rtol, atol):
    """Ten steps of each kind, seven of them replayed as graphs, end where ten eager ones do: with
    an episode added after the recording, and with a step whose gradients are not finite."""
    states = {}
    for mode in ("on", "off"):
        torch.manual_seed(0)
        agent, replay = agent_and_replay(device="cuda", graph=mode, precision=precision,
                                         target_every=5)
        torch.manual_seed(1)
        for clone in (True, False):
            for i in range(10):
                if i == 6:                               # one more of the same: other draws follow
                    replay.add(replay.image[:21].cpu(), replay.action[:21].cpu())
                poisoned = agent.actor.layers[0].bias.data
                kept = poisoned.clone()
                if i == 8:
                    poisoned.fill_(math.nan)
                agent.update(replay, clone)
                if i == 8:
                    poisoned.copy_(kept)
                agent.report(replay), agent.act(np.zeros((2, 64, 64, 3), np.uint8))
        assert (agent.graphed.graph is not None) == (mode == "on")
        assert agent.opts["actor"].skipped == 2
        states[mode] = agent.state_dict()
    for name, module in states["on"]["modules"].items():
        for key, value in module.items():
            torch.testing.assert_close(value, states["off"]["modules"][name][key],
                                       rtol=rtol, atol=atol)
    assert torch.equal(states["on"]["rng_cuda"], states["off"]["rng_cuda"])


@needs_cuda
def test_a_recording_that_fails_spoils_nothing(monkeypatch, capsys):
    """A step that asks for a value cannot be recorded; with auto it goes on, random numbers too."""
    monkeypatch.setattr(cmil.Graphed, "failed", False)
    done = []
    graphed = cmil.Graphed(lambda replay: done.append(torch.rand(2, device="cuda").sum().item()),
                           torch.device("cuda"), "auto")
    for _ in range(6):
        graphed(None)
    assert len(done) == 6 and graphed.graph is None
    assert torch.rand(3, device="cuda").sum().item() > 0
    assert len(capsys.readouterr().err.splitlines()) == 1


@needs_cuda
@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("algo, clone", STEPS)
def test_an_update_does_not_synchronise_with_the_host(algo, clone, mode):
    """CUDA itself refuses every synchronising call while updates run."""
    agent, replay = agent_and_replay(algo, device="cuda", graph=mode)
    for _ in range(5):
        agent.update(replay, clone)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            agent.update(replay, clone)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------ replay


def numbered_replay(lengths=(9, 6, 12), demos=2, window=4):
    """Row k of the replay (k counted over all episodes) has pixels k and action k / 100."""
    replay = cmil.Replay(sum(lengths), window, 1, torch.device("cpu"))
    k, starts = 0, []
    for i, rows in enumerate(lengths):
        ids = np.arange(k, k + rows)
        image = np.broadcast_to(ids[:, None, None, None], (rows, 64, 64, 3)).astype(np.uint8)
        replay.add(image, (ids / 100).astype(np.float32)[:, None], demo=i < demos)
        starts.append(set(range(k, k + rows - window + 1)))
        k += rows
    return replay, starts


def test_replay_windows():
    """Windows are rows of one episode with their own actions; all starts are drawn, evenly."""
    replay, starts = numbered_replay()
    valid, demos = set.union(*starts), starts[0] | starts[1]
    for sample, expected in ((replay.sample, valid), (replay.sample_demos, demos), (
            functools.partial(replay.draw, replay.n_demo_starts, replay.n_starts), starts[2])):
        image, action = sample(1000)
        assert image.shape == (4, 1000, 64, 64, 3) and image.dtype == torch.uint8
        rows = image[:, :, 0, 0, 0].long()
        assert (image == rows[:, :, None, None, None]).all()
        torch.testing.assert_close(action[..., 0], rows / 100)
        assert (rows == rows[0] + torch.arange(4)[:, None]).all()
        count = torch.bincount(rows[0])
        assert set(rows[0].tolist()) == expected
        share = 1000 / len(expected)
        assert (count[sorted(expected)] - share).abs().max() < 5 * math.sqrt(share)


def test_replay_grows():
    """Windows of an episode are drawn as soon as it is added; the demos stay the demos."""
    replay, starts = numbered_replay()
    replay2 = cmil.Replay(30, 4, 1, torch.device("cpu"))
    replay2.add(np.zeros((9, 64, 64, 3), np.uint8), np.zeros((9, 1), np.float32), demo=True)
    assert replay2.n_starts == replay2.n_demo_starts == 6
    replay2.add(np.ones((9, 64, 64, 3), np.uint8), np.zeros((9, 1), np.float32))
    assert replay2.n_starts == 12 and replay2.n_demo_starts == 6
    assert replay2.sample(200)[0].any() and not replay2.sample_demos(200)[0].any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is resident")
def test_a_replay_takes_its_memory_at_once():
    """200 MB of frames are resident before the first one is stored (in a process of its own)."""
    code = """if True:
        import cmil, torch
        pages = lambda: int(open("/proc/self/statm").read().split()[1])
        before = pages()
        replay = cmil.Replay(16_300, 8, 2, torch.device("cpu"))
        print(replay.image.nbytes, pages() - before)"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    size, pages = map(int, answer.stdout.split())
    assert size > 200e6 and pages * os.sysconf("SC_PAGE_SIZE") > .95 * size


@pytest.mark.parametrize("edge, expected", [(0., 0), (1., 23)])
def test_replay_edges_of_the_random_number(edge, expected, monkeypatch):
    """u = 0 gives the first window; even u = 1 (rounding) gives the last one and not one behind."""
    replay, _ = numbered_replay()                        # the last window begins at 27 - 4 = 23
    monkeypatch.setattr(torch, "rand", lambda n, device=None: torch.full((n,), edge))
    rows = replay.draw(0, replay.n_starts, 5)[0][..., 0, 0, 0]
    assert rows.shape == (4, 5) and (rows[0] == expected).all() and rows.max() < 27


def test_replay_holds_an_episode_of_exactly_one_window():
    """T + 1 = L: one start; its window is the episode."""
    replay, _ = numbered_replay(lengths=(4,), demos=1)
    assert (replay.sample_demos(5)[0][:, :, 0, 0, 0].T == torch.arange(4)).all()


# ------------------------------------------------------------------------------------ evaluation


def test_seeds_of_streams_never_meet():
    """Training, evaluation and --eval use different environment seeds in every round."""
    drawn = [seed for run in range(3) for stream in (cmil.TRAIN, cmil.EVALUATE, cmil.FINAL)
             for number in range(50) for seed in cmil.env_seeds(run, stream, number, 5)]
    assert len(set(drawn)) == len(drawn) and all(0 <= seed < 2 ** 31 for seed in drawn)
    assert cmil.env_seeds(1, 2, 3, 5) == cmil.env_seeds(1, 2, 3, 5)


class Steps:
    """A vector environment of two: success at step 3 if the reset seed is even."""

    num_envs = 2

    def reset(self, seed):
        self.seed, self.t = np.array(seed), 0
        return np.zeros((2, 64, 64, 3), np.uint8), {}

    def step(self, action):
        self.t += 1
        even = self.seed % 2 == 0
        info = {"success": even & (self.t >= 3), "n_tasks": even * (self.t >= 3)}
        return np.full((2, 64, 64, 3), self.t, np.uint8), np.ones(2) * self.t, None, None, info


def test_rollouts():
    """success, tasks, return of exactly `episodes` episodes; torch's random state is untouched."""
    agent, _ = agent_and_replay()
    before = torch.get_rng_state()
    results, video = cmil.rollouts(agent, Steps(), 4, 5, 0, cmil.EVALUATE, True)
    seeds = sum((cmil.env_seeds(0, cmil.EVALUATE, batch, 2) for batch in range(3)), [])[:5]
    assert results["success"].tolist() == [float(seed % 2 == 0) for seed in seeds]
    assert results["tasks"].tolist() == results["success"].tolist()
    assert results["return"].tolist() == [10.] * 5       # 1 + 2 + 3 + 4
    assert video[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("flag, sample", [
    (None, False), ("--eval-sample", True), ("--no-eval-sample", False)])
def test_evaluations_act_as_they_are_told(flag, sample, uninterrupted, monkeypatch, capsys):
    """With the modes of policy and latent, or with samples: a run's own setting, or --eval's."""
    acted, act = [], cmil.Agent.act
    monkeypatch.setattr(cmil.Agent, "act", lambda self, image, carry, sample: (
        acted.append(sample) or act(self, image, carry, sample)))
    words = ["--eval", str(uninterrupted[0]), "--episodes", "1", "--num-envs", "1"]
    cmil.main(words + [flag] * bool(flag))
    assert acted == [sample] * 50 and "success" in json.loads(capsys.readouterr().out)


def test_all_environments_are_evaluated_with_modes(tmp_path):
    for preset in ("paper", "small"):
        for env in ("kitchen", "baoding", "point"):
            c = cmil.make_config({"env": env, "preset": preset, "logdir": str(tmp_path / "run")})
            assert c.eval_sample is False


def test_gif(tmp_path):
    """save_gif writes all frames, enlarged, at the environment's pace, readable by imageio."""
    import imageio.v3 as iio
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    for env in (envs.Point, envs.Baoding):
        envs.save_gif(tmp_path / "x.gif", frames, env)
        assert iio.imread(tmp_path / "x.gif").shape[:3] == (6, 256, 256)
        assert iio.immeta(tmp_path / "x.gif")["duration"] == 1000 // env.metadata["render_fps"] // (
            10) * 10                                                     # a GIF counts in 10 ms


# ------------------------------------------------------------------------------------ training


def run_config(logdir, **changes):
    """A run of seconds: 5 rounds of 50 steps; two are seed rounds, the others earn 8 updates."""
    return config(**{**dict(logdir=str(logdir), steps=250, seed_steps=100, train_ratio=.16,
                            pretrain=12, log_every=5, eval_every=100, target_every=7), **changes})


def train(logdir, stop_at=None, **changes):
    """Train, or stop (as SIGTERM would) when `stop_at` updates are made; -> state, metrics."""
    trainer = cmil.Trainer(run_config(logdir, **changes))
    learn = trainer.learn

    def learn_and_stop(clone):
        learn(clone)
        if trainer.agent.updates == stop_at:
            trainer.stop = "test"
    trainer.learn = learn_and_stop
    complete = trainer.run()
    assert complete == (stop_at is None)
    return trainer.agent.state_dict(), metrics(logdir)


def metrics(logdir, clock=("time", "fps", "ups")):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(logdir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run from start to end: folder, final state, metrics."""
    torch.manual_seed(123)  # must not matter
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, *train(folder)


def test_a_run_does_what_its_schedule_says(uninterrupted):
    """Updates, steps, evaluations, episodes and files of the run (worked out by hand)."""
    folder, state, lines = uninterrupted
    # 12 updates of pretraining; 250 steps in 5 rounds of 50; the last three earn 150 * .16 = 24.
    assert state["updates"] == 36
    assert lines[-1]["step"] == 250
    assert [line["update"] for line in lines if "recon" in line] == [5, 10, 15, 20, 25, 30, 35]
    assert [line["step"] for line in lines if "eval/success" in line] == [0, 100, 200, 250]
    played = [line for line in lines if "train/success" in line]
    assert [(line["step"], line["update"]) for line in played] == [
        (50, 12), (100, 12), (150, 20), (200, 28), (250, 36)]        # two seed rounds earn nothing
    assert all(0 <= line["train/success"] == line["train/tasks"] <= 1 for line in played)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    episodes = sorted(path.name for path in (folder / "episodes").iterdir())
    assert episodes == [f"r{i:06d}-w0.npz" for i in range(5)]
    with np.load(folder / "episodes" / episodes[0]) as episode:
        assert episode["image"].shape == (51, 64, 64, 3) and episode["image"].dtype == np.uint8
        assert episode["action"].shape == (51, 2) and not episode["action"][0].any()
        assert (episode["action"][1:] != 0).any(1).all()
    stored = json.loads((folder / "config.json").read_text())
    expected = dataclasses.asdict(run_config(folder))
    assert stored["config"] == {**expected, "precision": stored["config"]["precision"]}
    assert {"torch", "numpy", "gymnasium"} <= set(stored["versions"])
    assert (folder / "checkpoint.pt").exists() and list((folder / "videos").glob("*.gif"))


def test_metrics_have_the_promised_names(uninterrupted):
    """Every name that the contract promises is logged, finite, and nothing was skipped."""
    lines = uninterrupted[2]
    promised = {"step", "update", "recon", "kl", "bc", "disc/expert", "disc/policy", "disc/gap",
                "uncertainty", "uncertainty_expert", "skipped", "reward", "lambda_return",
                "critic/model", "critic/data", "grad/world", "grad/actor", "grad/disc",
                "grad/critics"}
    assert promised <= set(lines[-3])
    assert {"train/success", "train/tasks"} <= set(lines[-2])
    assert {"eval/success", "eval/tasks", "eval/return"} <= set(lines[-1])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line.get("skipped", 0) == 0 for line in lines)
    raw = metrics(uninterrupted[0], clock=())
    assert {"time", "fps", "ups"} <= set(raw[-3])


def test_same_seed_same_run(uninterrupted, tmp_path):
    """Two runs of one seed agree bit for bit; another seed differs."""
    state, lines = train(tmp_path / "again")
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])
    _, other = train(tmp_path / "other", seed=1, steps=100)
    assert other[0] != lines[0]


@pytest.mark.parametrize("stop_at", [7, 26], ids=["in pretraining", "in mid-round"])
def test_resumed_equals_uninterrupted(stop_at, uninterrupted, tmp_path):
    """A stop, and the same command again: weights, optimizers, rng and metrics, bit for bit."""
    _, lines = train(tmp_path, stop_at)
    assert lines == uninterrupted[2][:len(lines)]
    # Pretraining keeps every update; a stop in the round of updates 21 to 28 drops that round,
    # with what it has logged at update 25.
    assert lines[-1]["update"] == (5 if stop_at == 7 else 20)
    torch.manual_seed(99)  # a new process would have other random numbers, too
    np.random.seed(99)
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])


def test_resumed_twice_equals_uninterrupted(uninterrupted, tmp_path):
    """Stops may come again and again, in one round, too."""
    for stop_at in (3, 12, 15, 17, 36):
        train(tmp_path, stop_at)
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])


def test_killed_without_warning(uninterrupted, tmp_path):
    """SIGKILL long after a checkpoint: what episodes and metrics hold behind it is made again."""
    train(tmp_path, 26)
    old = (tmp_path / "checkpoint.pt").read_bytes()
    train(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(old)        # all else is as the longer run left it
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 250, "half a li')
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])


def test_killed_between_two_renames(uninterrupted, tmp_path):
    """With only the previous checkpoint left, the run resumes from that."""
    train(tmp_path, 7)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint.prev.pt")
    _, agent, vec, _ = cmil.load_agent(tmp_path)         # --eval finds it too
    vec.close()
    assert agent.updates > 0
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])


def test_logging_does_not_change_learning(uninterrupted, tmp_path):
    """log_every and eval_every may differ: the same weights, and the same evaluations."""
    state, lines = train(tmp_path, log_every=1, eval_every=50)
    assert same(state, uninterrupted[1])
    evaluations = [line for line in uninterrupted[2] if "eval/success" in line]
    assert all(line in lines for line in evaluations)


def test_a_finished_run_can_go_on_and_may_be_shortened(tmp_path):
    """--steps may change: more steps continue the run; fewer than it has made do no harm."""
    train(tmp_path, steps=150)
    state, lines = train(tmp_path, steps=200)
    assert lines[-1]["step"] == 200
    assert train(tmp_path, steps=200)[1] == lines        # nothing left to do
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with contextlib.suppress(SystemExit):                # one line saying so would be fine, too
        cmil.Trainer(run_config(tmp_path, steps=100)).run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and metrics(tmp_path) == lines


def test_workers_in_processes_of_their_own(tmp_path):
    """Two spawned workers: runs repeat bit for bit, and resume after a stop in mid-round."""
    first, lines = train(tmp_path / "a", num_envs=2, steps=300, seed_steps=100)
    train(tmp_path / "b", 20, num_envs=2, steps=300, seed_steps=100)
    second, again = train(tmp_path / "b", num_envs=2, steps=300, seed_steps=100)
    assert lines == again and same(first, second)
    with np.load(tmp_path / "a" / "episodes" / "r000000-w0.npz") as one, \
            np.load(tmp_path / "a" / "episodes" / "r000000-w1.npz") as two:
        assert (one["image"][0] != two["image"][0]).any()


def test_offline_method_takes_no_environment_steps(tmp_path):
    """dbc: the demos alone, cloning updates only, as many as the online run's; no episodes."""
    state, lines = train(tmp_path, algo="dbc", **cmil.ALGOS["dbc"])
    assert state["updates"] == 36 and lines[-1]["step"] == 250
    assert not list((tmp_path / "episodes").iterdir())
    assert not any("disc/loss" in line for line in lines)
    fresh = cmil.Agent(run_config(tmp_path), 2, torch.device("cpu"))
    assert state["opts"]["disc"]["adam"]["state"] == {}  # D and critics have never stepped
    assert fresh.opts["disc"].adam.state_dict()["state"] == {}


def spoil_clone_loss(monkeypatch, bad):
    """Make the gradient of cloning NaN in the updates whose numbers (from 1) are in `bad`."""
    calls, clone_loss = [], cmil.clone_loss

    def spoiled(actor, feat, action):
        calls.append(1)
        return clone_loss(actor, feat, action) * (math.nan if len(calls) in bad else 1)
    monkeypatch.setattr(cmil, "clone_loss", spoiled)


@pytest.mark.parametrize("log_every", [1, 10, 1000])
def test_stops_after_non_finite_gradients(log_every, tmp_path, capsys, monkeypatch):
    """Ten bad updates in a row end the run with one line and the last good state, however often
    one logs."""
    spoil_clone_loss(monkeypatch, range(1, 99))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, log_every=log_every, pretrain=30)
    assert stop.value.code == 2
    assert re.search("actor loss.*non-finite.*10 updates, at step 0, update 10", line := (
        one_error_line(capsys))) and "checkpoint.pt" in line


@pytest.mark.parametrize("log_every", [1, 5])
def test_skipped_updates_are_counted(log_every, tmp_path, monkeypatch):
    """Nine bad updates in a row and some more end nothing, and the metrics say how many."""
    spoil_clone_loss(monkeypatch, {2, *range(12, 21), 30})
    _, lines = train(tmp_path, log_every=log_every)
    counts = {line["update"]: line["skipped"] for line in lines if "skipped" in line}
    assert counts[5] == 1 and counts[20] == 10 and counts[25] == 10 and counts[35] == 11


def test_stop_in_an_evaluation(uninterrupted, tmp_path):
    """A signal need not wait until all episodes are over: the evaluation is made anew."""
    trainer, moments = cmil.Trainer(run_config(tmp_path)), []
    breathe = trainer.breathe

    def third_moment():
        moments.append(trainer.steps_in_round)
        trainer.stop = "test" if len(moments) == 3 else ""
        breathe()
    trainer.breathe = third_moment
    assert not trainer.run() and len(moments) == 3
    assert not any("eval/success" in line for line in metrics(tmp_path))
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])


@pytest.mark.parametrize("where", ["pretraining", "seed rounds"])
def test_minutes(where, tmp_path, capsys):
    """--minutes ends a run in whatever phase it is, cleanly, and it can be resumed."""
    changes = dict(pretrain=10 ** 6) if where == "pretraining" else dict(
        pretrain=0, steps=30_000, seed_steps=30_000)
    c = run_config(tmp_path, minutes=.02, **changes)
    began = time.time()
    trainer = cmil.Trainer(c)
    give_up_after(trainer, 6)
    assert not trainer.run() and time.time() - began < 5
    assert "--minutes 0.02" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["updates"] \
        == trainer.agent.updates


def give_up_after(trainer, seconds):
    """Stop a trainer that does not end by itself, so that its test fails and does not hang."""
    progress, end = trainer.progress, time.time() + seconds

    def watched():
        progress()
        if time.time() > end:
            trainer.stop = "the test gave up"
    trainer.progress = watched


def command(*words, **options):
    """python cmil.py WORDS in a process of its own."""
    return subprocess.run([sys.executable, HERE / "cmil.py", *map(str, words)], text=True,
                          capture_output=True, timeout=120, cwd=HERE, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signals(number, tmp_path):
    """Exit code 0, one line that says how to resume, and resuming goes on from there."""
    words = ["--env", "point", "--preset", "debug", "--num-envs", "1", "--pretrain", "100000",
             "--log-every", "5", "--device", "cpu", "--threads", "1", "--logdir", tmp_path]
    with subprocess.Popen([sys.executable, HERE / "cmil.py", *map(str, words)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        end = time.time() + 60
        while time.time() < end and process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if (tmp_path / "metrics.jsonl").stat().st_size:
                    break
            time.sleep(.2)
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert number.name in out and "same command resumes" in out and "Traceback" not in error
    made = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["updates"]
    assert made >= 5
    answer = command(*words, "--minutes", ".001")
    assert answer.returncode == 0 and f"update {made}" in answer.stdout, answer.stderr
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["updates"] > made


def test_a_reader_that_goes_away(tmp_path):
    """python cmil.py | head -1: the run goes on to its end without a word."""
    words = ["--env", "point", "--preset", "debug", "--num-envs", "1", "--device", "cpu",
             "--threads", "1", "--logdir", str(tmp_path)]
    with subprocess.Popen([sys.executable, HERE / "cmil.py", *words], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert "cmil on point" in process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 0 and error == ""
    assert [line["step"] for line in metrics(tmp_path) if "eval/success" in line][-1] == 400


def test_a_log_without_a_checkpoint_is_left_alone(tmp_path, capsys):
    """Lines in metrics.jsonl that no checkpoint knows of are somebody's: one line, none is lost."""
    (tmp_path / "metrics.jsonl").write_text("somebody's\n")
    with pytest.raises(SystemExit) as stop:
        cmil.main(finished((tmp_path,)))
    assert stop.value.code == 2 and "metrics.jsonl has lines" in one_error_line(capsys)
    assert (tmp_path / "metrics.jsonl").read_text() == "somebody's\n"


def test_a_checkpoint_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    """The log and the new file are synced, in this order, before anything is renamed; at the end
    the folder, so that no episode is missing that a later checkpoint counts."""
    trainer, events = cmil.Trainer(run_config(tmp_path)), []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *a, name=name, real=getattr(os, name): (
            events.append(name), real(*a))[1])
    trainer.checkpoint()
    trainer.close()
    assert events == ["fsync", "fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize("git", [True, False])
def test_commit_in_the_config(git, tmp_path, monkeypatch):
    """config.json names the commit where there is one; a machine without git trains too."""
    expected = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True,
                              text=True).stdout.strip() if (HERE / ".git").exists() else ""
    if not git:
        monkeypatch.setenv("PATH", "")
    cmil.Trainer(run_config(tmp_path)).close()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["commit"] == (expected if git else "")


def test_config_says_where_a_run_went_on(tmp_path, monkeypatch):
    """config.json: the first start's facts stay; every later one adds its own, and its steps."""
    train(tmp_path, 7)
    first = json.loads((tmp_path / "config.json").read_text())
    assert "resumed" not in first and first["update"] == 0
    monkeypatch.setattr(sys, "argv", ["cmil.py", "--steps", "300"])
    train(tmp_path, steps=300)
    stored = json.loads((tmp_path / "config.json").read_text())
    [again] = stored.pop("resumed")
    assert stored.pop("config") == {**first.pop("config"), "steps": 300} and stored == first
    assert again == {**first, "update": 7, "command": "python cmil.py --steps 300"}
    train(tmp_path, steps=300)                           # nothing is left to be done
    assert len(json.loads((tmp_path / "config.json").read_text())["resumed"]) == 1


def test_progress_before_the_first_update(tmp_path, capsys):
    """A run says where it is in seed rounds too: pdac's come before any update."""
    trainer = cmil.Trainer(run_config(tmp_path, algo="pdac", pretrain=0, log_every=1))
    trainer.steps_in_round, trainer.shown = 10, (time.monotonic() - 20, 0, 0)
    capsys.readouterr()
    trainer.progress()
    trainer.close()
    assert capsys.readouterr().out.startswith("step 10/250 update 0 ups 0.00 fps ")


def test_no_memory_to_load_into_is_not_another_version(tmp_path, monkeypatch):
    """Out of memory while loading: that is said, not that the checkpoint holds other networks."""
    train(tmp_path, 7)

    def full(agent, state):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(cmil.Learner, "load_state_dict", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        cmil.Trainer(run_config(tmp_path))


def test_no_cuda_when_asked(tmp_path, capsys, monkeypatch):
    """--device cuda without a device: one line, exit code 2, no folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--env", "point", "--preset", "debug", "--num-envs", "1", "--device", "cuda",
                   "--logdir", str(tmp_path / "run")])
    assert stop.value.code == 2 and "finds no CUDA device" in one_error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_padded_steps_have_no_action(tmp_path):
    """After an early end of a generic environment, stored actions are zero (they did nothing)."""
    demos = tmp_path / "demos"
    demos.mkdir()
    action = np.zeros((13, 1), np.float32)
    np.savez(demos / "a.npz", image=np.zeros((13, 64, 64, 3), np.uint8), action=action)
    train(tmp_path / "run", env="TestCountdown-v0", demos=str(demos), num_demos=1, steps=24,
          seed_steps=12, eval_every=12)
    with np.load(tmp_path / "run" / "episodes" / "r000000-w0.npz") as episode:
        assert (episode["action"][:, 0] != 0).tolist() == [False] + [True] * 7 + [False] * 5


# ------------------------------------------------------------------------------------ faults

# Each is injected into a real run, which then goes on; its end must be that of the run without it.

DYING = """
import io, os, signal, sys
sys.path.insert(0, {here!r})
import numpy as np, torch
import test_cmil

def die_in(owner, name, at, half):
    original, calls = getattr(owner, name), []
    def dying(first, *rest, **named):
        calls.append(first)
        if len(calls) == at:
            if half:                         # of the bytes are written, and reach the disk
                file = first if name != "save" else rest[0]
                whole = io.BytesIO()
                original(*[whole if x is file else x for x in (first, *rest)], **named)
                file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(first, *rest, **named)
    setattr(owner, name, dying)

die_in({owner}, {name!r}, {at}, {half})
test_cmil.train({folder!r}, checkpoint_minutes=0)
"""


@pytest.mark.parametrize("owner, name, at, half", [
    ("torch", "save", 15, True),                 # the checkpoint after round 2
    ("os", "replace", 2 + 2 * 13, False),        # the old checkpoint is moved, the new is not
    ("np", "savez_compressed", 4, True),         # the episode of round 4
], ids=["in a checkpoint", "between two renames", "in an episode"])
def test_killed_at_a_bad_moment(owner, name, at, half, uninterrupted, tmp_path):
    """SIGKILL within a write: the same command ends as the uninterrupted run, bit for bit."""
    code = DYING.format(here=str(HERE), owner=owner, name=name, at=at, half=half,
                        folder=str(tmp_path))
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    assert list(tmp_path.rglob("*.tmp"))             # so it was in the middle of something
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list((tmp_path / "episodes").iterdir())) == 5


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 64]) + data[position + 1:]


DAMAGE = {"truncated": lambda data: data[:len(data) // 2], "empty": lambda data: b"",
          "bit flipped": lambda data: flip(data, len(data) // 2)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, uninterrupted, tmp_path, capsys):
    """One line says so, nothing good is overwritten, and the run ends as the uninterrupted one."""
    train(tmp_path, 20)
    train(tmp_path, 30)
    newest = tmp_path / "checkpoint.pt"
    made = [torch.load(path, weights_only=True)["agent"]["updates"]
            for path in (newest.with_suffix(".prev.pt"), newest)]
    damaged = DAMAGE[damage](newest.read_bytes())
    newest.write_bytes(damaged)
    capsys.readouterr()
    _, agent, vec, _ = cmil.load_agent(tmp_path)         # --eval goes back too, and changes nothing
    vec.close()
    assert agent.updates == made[0] < made[1] and newest.read_bytes() == damaged
    error, = capsys.readouterr().err.splitlines()
    assert "checkpoint.pt cannot be read" in error and "back to checkpoint.prev.pt" in error
    state, lines = train(tmp_path, 24)
    assert newest.with_suffix(".damaged.pt").read_bytes() == damaged
    for path in (newest, newest.with_suffix(".prev.pt")):
        torch.load(path, weights_only=True)              # both are good now
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])


def test_no_flipped_bit_goes_unnoticed(uninterrupted, tmp_path):
    """Wherever a bit flips, the checkpoint is refused, or what is loaded is what was saved."""
    saved, rng = (uninterrupted[0] / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    agent, refused = cmil.Agent(run_config(tmp_path), 2, torch.device("cpu")), 0
    for position in [*rng.integers(len(saved), size=40), *(len(saved) - 1 - np.arange(20))]:
        (tmp_path / "checkpoint.pt").write_bytes(flip(saved, position))
        try:
            cmil.load_checkpoint(tmp_path, agent)
            assert same(agent.state_dict(), uninterrupted[1])
        except SystemExit as stop:
            refused += stop.code == 2
    assert refused > 30


def test_no_readable_checkpoint(tmp_path, capsys):
    """Both damaged: exit code 2, one line that names them; nothing is lost."""
    train(tmp_path, 7)
    train(tmp_path, 9)
    before, checkpoints = metrics(tmp_path), sorted(tmp_path.glob("checkpoint*.pt"))
    for path in checkpoints:
        path.write_bytes(path.read_bytes()[:5000])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    line = one_error_line(capsys)
    assert stop.value.code == 2 and len(checkpoints) == 2
    assert all(str(path) in line for path in checkpoints)
    assert metrics(tmp_path) == before and sorted(tmp_path.glob("checkpoint*.pt")) == checkpoints


class FullDisk:
    """A file on a disk on which there is room for `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("what", ["a checkpoint", "an episode", "metrics", "a film"])
def test_disk_full(what, uninterrupted, tmp_path, capsys, monkeypatch):
    """One line, exit code 2, no temporary files; the last checkpoint stands and the run goes on."""
    train(tmp_path, 24)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    save, savez, init = torch.save, np.savez_compressed, cmil.Trainer.__init__
    if what == "a checkpoint":
        monkeypatch.setattr(torch, "save", lambda state, f: save(state, FullDisk(f, 9000)))
    elif what == "an episode":
        monkeypatch.setattr(np, "savez_compressed", lambda f, **arrays: savez(
            FullDisk(f, 900), **arrays))
    elif what == "a film":
        monkeypatch.setattr(imageio, "mimsave", lambda file, *_, **__: (
            FullDisk(file, 9).write(bytes(10))))
    else:
        def on_a_full_disk(self, c):
            init(self, c)
            self.metrics = FullDisk(self.metrics, 900)
        monkeypatch.setattr(cmil.Trainer, "__init__", on_a_full_disk)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cmil.main(finished((tmp_path,)))
    line = one_error_line(capsys)
    assert stop.value.code == 2 and "No space left on device" in line
    assert str(tmp_path) in line
    assert not list(tmp_path.rglob("*.tmp"))
    if what != "a film":                             # the first one comes after a good checkpoint
        assert (tmp_path / "checkpoint.pt").read_bytes() == good
    monkeypatch.undo()
    state, lines = train(tmp_path)
    assert lines == uninterrupted[2] and same(state, uninterrupted[1])


FLAKY = """
import multiprocessing, os, signal, threading, time
import gymnasium as gym, numpy as np

def strike(how):
    # Fail in this way; with MARK, once: a file remembers it.
    if os.environ["MARK"]:
        try:
            os.close(os.open(os.environ["MARK"] + how.replace(" ", "-"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if how == "exit":
        raise SystemExit(3)
    if "exception" in how:
        raise RuntimeError("the motor is 100% hot,", "put it out")
    if how == "unpicklable":
        raise ValueError("it holds a lock", threading.Lock())
    if how == "interrupt":
        raise KeyboardInterrupt
    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    time.sleep(1)

class Flaky(gym.Env):
    # A dot that actions move. What HOW lists happens in step FAIL_AT of a process or at its start.
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = action_space = gym.spaces.Box(-1., 1., (1,))
    steps = 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        if multiprocessing.current_process().daemon and int(os.environ["FAIL_AT"]) >= 0:
            first, *later = os.environ["HOW"].split(", ")
            if not later or os.path.exists(os.environ["MARK"] + first):
                for how in later or [first]:
                    if how.startswith("start"):
                        strike(how)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == int(os.environ["FAIL_AT"]):
            strike(os.environ["HOW"].split(", ")[0])
        self.x = float(np.clip(self.x + .2 * action[0], -1, 1))
        return np.zeros(1, np.float32), 0., False, False, {"success": self.x > .5}

    def close(self):
        if "close" in os.environ["HOW"] and self.steps:
            strike("close exception")

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        image[28:36, int(28 + 28 * self.x):][:, :8] = 255
        return image

gym.register("Flaky-v0", Flaky, max_episode_steps=12)
"""


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """run(folder, how, at, once) trains on Flaky with two workers -> state, metrics."""
    (tmp_path / "flaky_env.py").write_text(FLAKY)
    monkeypatch.syspath_prepend(tmp_path)
    action = np.zeros((13, 1), np.float32)
    np.savez(tmp_path / "demo.npz", image=np.zeros((13, 64, 64, 3), np.uint8), action=action)

    def run(folder, how="killed", at=-1, once=True, **changes):
        for name, value in {"HOW": how, "FAIL_AT": str(at), "MARK": str(
                tmp_path / f"mark-{folder}-") if once else ""}.items():
            monkeypatch.setenv(name, value)
        return train(tmp_path / folder, **{**dict(
            env="flaky_env:Flaky-v0", demos=str(tmp_path / "demo.npz"), num_demos=1, num_envs=2,
            steps=72, seed_steps=24, eval_every=36, train_ratio=.3, log_every=3), **changes})
    return run


def remarks(capsys):
    """The lines of stderr that are not about demonstrations or presets."""
    return [line for line in capsys.readouterr().err.splitlines()
            if not line.startswith(("envs: ", "preset "))]


@pytest.mark.parametrize("how, at, named", [
    ("killed", 29, ["died with exit code -9"]), ("killed", 5, ["died with exit code -9"]),
    ("exit", 29, ["died with exit code 3"]),
    ("exception", 30, ["failed with RuntimeError: ('the motor is 100% hot,', 'put it out')"]),
    ("exception, close exception", 31, ["failed with RuntimeError: ('the motor"]),
    ("unpicklable", 31, ["failed with ValueError: ('it holds a lock"]),
    ("interrupt", 32, ["failed with KeyboardInterrupt"]),
    ("hangs", 31, ["did not answer within 20 s"]),
    ("killed, start exception", 29, ["died with exit code -9", "died with exit code 1"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_worker_that_fails_is_replaced(how, at, named, flaky, capfd, monkeypatch):
    """In a round (steps 13-36 of a worker), an evaluation (1-12, 37-48) or when it is made anew:
    one line names it, and the run ends as one without the failure, bit for bit."""
    monkeypatch.setattr(envs.Workers, "TIMEOUT", 20 if how == "hangs" else 300)
    expected = flaky("calm")
    capfd.readouterr()
    state, lines = flaky("struck", how, at)
    said = remarks(capfd)
    assert len(said) == len(named), said
    for line, words in zip(said, named):
        assert re.search(f"worker [01] {re.escape(words)}.*new workers", line)
    assert lines == expected[1] and same(state, expected[0])


def test_workers_that_always_fail_end_the_run(flaky, capfd, tmp_path):
    """New workers three times, then a stop with the reason; the checkpoint is good."""
    with pytest.raises(envs.WorkerDied, match="exit code -9"):
        flaky("struck", at=5, once=False)
    said = remarks(capfd)
    assert len(said) == 3 and all("making new workers" in line for line in said)
    assert torch.load(tmp_path / "struck" / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("how", ["start exception", "start hangs"])
def test_workers_that_do_not_start(how, flaky, capfd, monkeypatch, tmp_path):
    """One line, no run folder, no process left behind, and no waiting for ever."""
    monkeypatch.setattr(envs.Workers, "TIMEOUT", 20)
    with pytest.raises(envs.WorkerDied, match="died with exit code 1|did not answer"):
        flaky("struck", how, 0, once=False)
    assert not remarks(capfd) and not (tmp_path / "struck").exists()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error, named", [
    (OSError(28, "No space left on device"), "No space left"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), "smaller --batch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
     "smaller --batch"),
    (None, "loss had non-finite gradients in the last 18 updates, at step 42, update 30")])
def test_the_learner_fails_while_workers_step(error, named, flaky, capfd, monkeypatch, tmp_path):
    """In mid-round, with a step pending in two processes: one line, exit code 2, none left behind;
    afterwards the run ends as one without the failure."""
    expected = flaky("calm", train_ratio=.9)
    reward = cmil.imitation_reward

    def fail(*args):
        if error:
            raise error
        return reward(*args) * math.nan
    monkeypatch.setattr(cmil, "imitation_reward", fail)
    train_ = train

    def main(folder, **changes):
        try:
            cmil.Trainer(run_config(folder, **changes)).run()
        except Exception as error:
            cmil.die(envs.trouble(error))
    monkeypatch.setitem(globals(), "train", main)
    with pytest.raises(SystemExit) as stop:
        flaky("struck", train_ratio=.9)
    line, = remarks(capfd)
    assert stop.value.code == 2 and named in line
    assert not multiprocessing.active_children()
    monkeypatch.setitem(globals(), "train", train_)
    monkeypatch.setattr(cmil, "imitation_reward", reward)
    state, lines = flaky("struck", train_ratio=.9)
    assert lines == expected[1] and same(state, expected[0])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signal masks are Unix's")
def test_ctrl_c_does_not_reach_workers():
    """From their first moment on; the learner hears it."""
    vec = envs.make_vec("point", 2)
    masks = [int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
             for pid in (*(process.pid for process in vec.processes), os.getpid())]
    vec.close()
    assert [bool(mask >> (signal.SIGINT - 1) & 1) for mask in masks] == [True, True, False]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_while_workers_start(error, monkeypatch):
    """Ctrl-C, or too few file handles for the second process: none is left behind."""
    start, started = multiprocessing.process.BaseProcess.start, []

    def second_fails(process):
        started.append(process)
        if len(started) == 2:
            raise error(24, "Too many open files")
        start(process)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", second_fails)
    with pytest.raises(error, match="Too many open files"):
        envs.make_vec("point", 3)
    assert len(started) == 2 and not multiprocessing.active_children()


def test_a_signal_that_workers_hear_too(flaky, capfd, tmp_path):
    """A scheduler ends learner and workers: that is a stop, and no reason to make new workers."""
    expected = flaky("calm")
    capfd.readouterr()
    trainer = []

    def init(self, c, init=cmil.Trainer.__init__):
        init(self, c)
        trainer.append(self)
    end = envs.Workers._end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmil.Trainer, "__init__", init)
        patch.setattr(envs.Workers, "_end", lambda self, error: (
            setattr(trainer[0], "stop", "SIGTERM"), end(self, error))[1])
        with pytest.raises(AssertionError):              # train() expects a complete run
            flaky("struck", at=29)
    assert not remarks(capfd) and len(trainer) == 1
    state, lines = flaky("struck")
    assert lines == expected[1] and same(state, expected[0])


def test_one_run_has_one_writer(tmp_path, capsys):
    """A second process on the same folder: one line; the first one's files are left alone."""
    first = cmil.Trainer(run_config(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        cmil.main(finished((tmp_path,)))
    assert stop.value.code == 2 and "another process" in one_error_line(capsys)
    assert before == {path: path.read_bytes() for path in before}
    first.close()
    train(tmp_path)                                      # the lock went with its owner


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can be another")
def test_a_folder_of_another_user(tmp_path, capsys, monkeypatch):
    """--logdir below a folder that may not be written: one line, exit code 2."""
    def mkdir(real, *args, **options):
        os.seteuid(65534)
        try:
            real(*args, **options)
        finally:
            os.seteuid(0)
    calls_of(monkeypatch, Path, "mkdir", mkdir)
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--env", "point", "--preset", "debug", "--num-envs", "1", "--device", "cpu",
                   "--logdir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert f"{tmp_path / 'run'}" in (line := one_error_line(capsys)) and "Permission denied" in line


@pytest.mark.parametrize("flag", ["--deter 1000000", "--units 10000000", "--batch " + str(2**60),
                                  "--members 1000000000", "--stoch 1000000000",
                                  f"--num-envs {2**62}"])
def test_sizes_beyond_all_memory(flag, tmp_path, capsys):
    """One line that says so, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--env", "point", "--preset", "debug", "--num-envs", "1", "--device", "cpu",
                   "--logdir", str(tmp_path / "run"), *flag.split()])
    assert stop.value.code == 2 and "out of memory" in one_error_line(capsys)


def test_mistakes_of_the_code_keep_their_traceback():
    """trouble() explains what a user can mend, and nothing else."""
    assert "out of memory" in envs.trouble(MemoryError())
    for error in (TypeError("x"), RuntimeError("an illegal memory access was encountered")):
        with pytest.raises(type(error)):
            envs.trouble(error)
    assert "interrupted" in envs.trouble(KeyboardInterrupt())


@pytest.mark.parametrize("damage", ["rows", "floats", "NaN", "text", "flipped", "missing"])
def test_resume_with_a_damaged_episode(damage, tmp_path, capsys):
    """One line that names the file; nothing is changed."""
    train(tmp_path, 30)
    file = tmp_path / "episodes" / "r000001-w0.npz"
    whole, before = file.read_bytes(), metrics(tmp_path)
    arrays = dict(np.load(file))
    arrays.update({"rows": {k: v[:20] for k, v in arrays.items()}, "text": {"action": arrays[
        "action"].astype("U4")}, "floats": {"image": arrays["image"] / np.float32(255)},
        "NaN": {"action": arrays["action"] * np.float32(np.nan)}}.get(damage, {}))
    np.savez(file, **arrays)
    if damage == "flipped":
        file.write_bytes(flip(whole, len(whole) // 2))
    elif damage == "missing":
        file.unlink()
    with pytest.raises(SystemExit) as stop:
        cmil.main(finished((tmp_path,)))
    assert stop.value.code == 2 and str(file) in one_error_line(capsys)
    file.write_bytes(whole)
    copy = shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))  # not locked
    assert train(copy)[1][:len(before)] == before


def test_metrics_that_have_lost_their_end(uninterrupted, tmp_path, capsys):
    """After a power failure the log may be shorter than the checkpoint says: whole lines stay."""
    train(tmp_path, 30)
    file = tmp_path / "metrics.jsonl"
    lines = len(metrics(tmp_path))
    file.write_bytes(file.read_bytes()[:-40])
    capsys.readouterr()
    state, left = train(tmp_path)
    assert "has lost its last lines" in capsys.readouterr().err
    assert left == uninterrupted[2][:lines - 1] + uninterrupted[2][lines:]
    assert same(state, uninterrupted[1])


def test_resume_without_its_config(tmp_path, capsys):
    """A checkpoint whose config.json is gone is not taken for a run with today's flags."""
    train(tmp_path, 7)
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit) as stop:
        cmil.main(finished((tmp_path,), "--alpha", "3"))
    assert stop.value.code == 2 and "config.json is missing" in one_error_line(capsys)


@pytest.mark.parametrize("field, value", [
    ("device", "tpu"), ("deter", "16"), ("tasks", 5), ("algo", "zzz"), ("batch", None),
    ("preset", "zzz"), ("gamma", "0.9"), ("offline", 1), ("length", 0)])
def test_values_of_a_damaged_config(field, value, uninterrupted, tmp_path, capsys):
    """A field of config.json with an impossible value: one line that names it."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    stored = json.loads((run / "config.json").read_text())
    stored["config"][field] = value
    (run / "config.json").write_text(json.dumps(stored))
    for words in (["--eval", str(run)], ["--env", "point", "--logdir", str(run)]):
        with pytest.raises(SystemExit) as stop:
            cmil.main(words)
        assert stop.value.code == 2 and field in one_error_line(capsys)


@pytest.mark.parametrize("given, named", [
    ("nonsense", "MUJOCO_GL=nonsense .unset it.."), (None, "EGL and OSMesa both fail")])
def test_without_gl(given, named, monkeypatch):
    """No way to draw: one line that names what was tried and the packages to install."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if given:
        monkeypatch.setenv("MUJOCO_GL", given)
    else:
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=1))
    envs.choose_gl.cache_clear()
    with pytest.raises(envs.UserError, match=f"{named}.*libegl1"):
        envs.choose_gl()
    assert os.environ.get("MUJOCO_GL") == given
    envs.choose_gl.cache_clear()


def test_gl_that_hangs(monkeypatch, tmp_path):
    """A driver on which drawing never ends is one that fails: the next is tried."""
    (tmp_path / "mujoco.py").write_text("""
import os, time
class MjModel: from_xml_string = staticmethod(lambda text: None)
class Renderer:
    def __init__(self, *sizes): time.sleep(60 * (os.environ["MUJOCO_GL"] == "egl"))
    render = lambda self: None
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(envs, "GL_TRIAL", 3)
    envs.choose_gl.cache_clear()
    began = time.monotonic()
    envs.choose_gl()
    assert os.environ["MUJOCO_GL"] == "osmesa" and time.monotonic() - began < 30
    envs.choose_gl.cache_clear()


@pytest.mark.parametrize("workers", [1, 5])
def test_same_command_same_metrics(workers, tmp_path):
    """Two full runs in processes of their own agree bit for bit, clocks aside."""
    for name in "ab":
        answer = command("--env", "point", "--preset", "debug", "--num-envs", workers, "--steps",
                         250 * workers, "--pretrain", 10, "--train-ratio", .04, "--log-every", 2,
                         "--device", "cpu", "--threads", 1, "--logdir", tmp_path / name)
        assert answer.returncode == 0, answer.stderr
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert len(metrics(tmp_path / "a")) > 15
    first, second = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                     for name in "ab")
    assert same(first["agent"], second["agent"])


@pytest.mark.stress
def test_killed_twenty_times(tmp_path):
    """SIGKILL at twenty random moments of the small hours of a run with two workers."""
    words = ["--env", "point", "--preset", "debug", "--steps", "2000", "--checkpoint-minutes", "0",
             "--device", "cpu", "--threads", "1"]
    answer = command(*words, "--logdir", tmp_path / "calm")
    assert answer.returncode == 0, answer.stderr
    took = metrics(tmp_path / "calm", clock=())[-1]["time"]
    seed, kills = int(time.time()), 0
    print("seed", seed)                                  # pytest shows it if the test fails
    rng = np.random.default_rng(seed)
    while kills < 20:
        with subprocess.Popen([sys.executable, HERE / "cmil.py", *words, "--logdir",
                               str(tmp_path / "struck")], stdout=subprocess.PIPE, text=True) as run:
            if kills % 4:
                run.stdout.readline()                    # it has started; now it is at work
                time.sleep(rng.uniform(0, 2 * took / 20))
            else:
                time.sleep(rng.uniform(0, 8))            # while it starts, or resumes
            run.kill()
            kills += 1
    answer = command(*words, "--logdir", tmp_path / "struck")
    assert answer.returncode == 0, answer.stderr
    assert metrics(tmp_path / "struck") == metrics(tmp_path / "calm")
    first, second = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                     for name in ("calm", "struck"))
    assert same(first["agent"], second["agent"])
    assert len(list((tmp_path / "struck" / "episodes").iterdir())) == 40


# ------------------------------------------------------------------------------------ command line


def one_error_line(capsys):
    """The only line of stderr that is not the choice of a preset."""
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("preset ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("cmil: error: ")
    return lines[0]


BAD_COMMANDS = [
    ("--alhpa 3", "--alhpa"), ("--alph 3", "--alph"), ("--alpha", "--alpha"), ("10", "10"),
    ("--alpha much", "--alpha"), ("--steps 1e5", "--steps"), ("--batch 2.5", "--batch"),
    ("--env nowhere", "nowhere"), ("--env no.such.module:Thing-v0", "no.such.module"),
    ("--algo gail", "gail"), ("--preset tiny", "tiny"), ("--device cuda0x", "cuda0x"),
    ("--reward log", "log"), ("--target max", "max"), ("--precision half", "half"),
    ("--gamma 1.5", "gamma"), ("--lam -0.1", "lam"), ("--kl-balance 2", "kl-balance"),
    ("--batch 0", "batch"), ("--members 0", "members"), ("--lr 0", "lr"), ("--lr nan", "lr"),
    ("--alpha inf", "alpha"), ("--horizon 0", "horizon"), ("--length 1", "length"),
    ("--num-envs -1", "num-envs"), ("--eval-every 0", "eval-every"),
    ("--num-demos -1", "num-demos"),
    ("--env point --length 60", "length"), ("--env point --tasks microwave", "microwave"),
    ("--env point --robot-noise-ratio 0.5", "robot_noise_ratio"),
    ("--env point --demos /no/such/place", "/no/such/place"),
    ("--env point --episode-steps 3", "steps"), ("--eval /no/such/run", "/no/such/run"),
    ("--eval", "--eval"), ("--plot /no/such/run", "/no/such/run"),
    ("--graph on", "--graph"), ("--seed 100000000000000000000", "seed"),
    ("--threads 99999999999", "threads"), ("--steps 100000000000", "steps"),
    ("--episodes 3", "--episodes"), ("--video x.gif", "--video"), ("--out x.png", "--out"),
    ("--eval x --bench", "--bench"), ("--plot-bound /no/such/run", "/no/such/run"),
    ("--algo bc --reward logit", "reward"), ("--algo pdac --reward none", "reward"),
    ("--algo pdac --pretrain 5", "pretrain"), ("--algo pdac --length 5", "length"),
    ("--algo pdac --seed-steps 0", "--seed-steps above 0"),
    ("--plot x --seed 3", "--seed does nothing"),
    ("--plot-bound x --weight-decay 1", "--weight-decay does nothing with --plot-bound"),
    ("--algo ditto --horizon 8", "horizon"), ("--algo ditto --reward none", "--algo ditto needs"),
    ("--algo ditto --no-offline", "--offline"), ("--algo pdac --offline", "--no-offline"),
    ("--algo dbc --reward logit", "--reward none"), ("--reward none", "needs --offline"),
    ("--algo dbc --no-offline", "needs --offline"), ("--algo dbc --beta 0", "a --beta above 0"),
    ("--algo vmail --reward none --offline", "a --beta above 0"),
]


@pytest.mark.parametrize("words, named", BAD_COMMANDS, ids=[words for words, _ in BAD_COMMANDS])
def test_mistakes_get_one_line(words, named, tmp_path, capsys):
    """Exit code 2 and one line that names what was wrong; no run folder is left behind."""
    defaults = {"--preset": "debug", "--env": "point", "--logdir": str(tmp_path / "run"),
                "--num-envs": "1", "--device": "cpu"}
    given = words.split()
    if given[0] not in ("--eval", "--plot", "--plot-bound"):
        given += [w for flag, v in defaults.items() if flag not in given for w in (flag, v)]
    with pytest.raises(SystemExit) as stop:
        cmil.main(given)
    assert stop.value.code == 2
    assert named in one_error_line(capsys)
    assert not (tmp_path / "run").exists()


def bad_values(field):
    """What no flag of this kind can mean."""
    if field.metadata["choices"]:
        return ["nonsense", "", "-1", "auto,paper"]
    kind = type(field.default)
    if kind is str:  # logdir: below a file
        return {"env": ["nowhere", "", "no:such", "point\nkitchen"], "tasks": ["zzz", "+", "9"],
                "demos": ["nowhere", "a\nb", os.devnull], "logdir": [__file__ + "/run"]}[field.name]
    return {bool: ["true", "", "0", "no"], int: ["-1", "1.5", "nan", "", "1e3", "9" * 25, "ten"],
            float: ["-1", "nan", "inf", "", "-inf", "1e999", "ten", "1,5"]}[kind]


@pytest.mark.parametrize("field", [*filter(bad_values, dataclasses.fields(cmil.Config))],
                         ids=lambda field: field.name)
def test_fuzzed_flags(field, tmp_path, capsys):
    """Each field with each kind of nonsense: exit code 2, one line with its flag, no folder."""
    flag = "--" + field.name.replace("_", "-")
    for value in bad_values(field):
        with pytest.raises(SystemExit) as stop:
            cmil.main(["--env", "point", "--preset", "debug", "--num-envs", "1", "--device", "cpu",
                       "--logdir", str(tmp_path / "run"), f"{flag}={value}"])
        named = flag if field.type not in (str, "str") or field.metadata["choices"] else (
            value.split("\n")[0] or "''")
        assert stop.value.code == 2 and named in one_error_line(capsys), value
    assert not (tmp_path / "run").exists()


def test_logdir_that_cannot_be_a_folder(tmp_path, capsys):
    """--logdir naming a file: exit code 2 and one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--env", "point", "--preset", "debug", "--num-envs", "1", "--device", "cpu",
                   "--logdir", str(tmp_path / "file")])
    assert stop.value.code == 2 and str(tmp_path / "file") in one_error_line(capsys)


def test_mistake_in_a_process_of_its_own():
    """What the shell sees: exit code 2, one line on stderr, nothing on stdout, no traceback."""
    answer = command("--env", "nowhere", "--preset", "debug")
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.count("\n") == 1 and "nowhere" in answer.stderr


def finished(uninterrupted, *words):
    """The command line that resumes the run of the fixture, with more words."""
    flags = []
    for key, value in dataclasses.asdict(run_config(uninterrupted[0])).items():
        flag = key.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [
            f"--{flag}", str(value)]
    return [*flags, *words]


@pytest.mark.parametrize("words, name", [("--alpha 3", "alpha"), ("--seed 5", "seed"),
                                         ("--no-data-critic", "data_critic"),
                                         ("--algo vmail", "algo")])
def test_resume_with_a_changed_field_names_it(words, name, uninterrupted, capsys):
    """One line with the field's name and its stored value; the run is left as it was."""
    before = (uninterrupted[0] / "config.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        cmil.main(finished(uninterrupted, *words.split()))
    assert stop.value.code == 2
    line = one_error_line(capsys)
    assert f"{name} (now" in line and "beta (now" not in line
    assert (uninterrupted[0] / "config.json").read_bytes() == before


def test_what_may_change_on_resume(uninterrupted, tmp_path):
    """Every field of RESUME_MAY_CHANGE is accepted by make_config on an existing run."""
    changes = dict(steps=300, minutes=1., log_every=3, eval_every=70, eval_episodes=3,
                   checkpoint_minutes=2., threads=2, graph="off")
    assert set(changes) | {"logdir"} == set(cmil.RESUME_MAY_CHANGE)
    words = [word for k, v in changes.items()
             for word in [f"--{k.replace('_', '-')}", str(v)]]
    explicit, _ = cmil.parse(finished(uninterrupted, *words))
    assert cmil.make_config(explicit).steps == 300


def test_the_same_command_resumes_with_the_defaults(tmp_path):
    """`auto` fields (precision, preset) of the first command do not count as changed later."""
    words = ["--env", "point", "--preset", "debug", "--num-envs", "1", "--minutes", ".0001",
             "--device", "cpu", "--logdir", str(tmp_path)]
    cmil.main(words)
    cmil.main(words)                                     # SystemExit if it were refused
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    words[2:4] = []                                      # an existing run keeps its preset
    cmil.main(words)
    assert stored["preset"] == "debug"


def test_eval_prints_one_json_line(uninterrupted, tmp_path, capsys):
    """--eval: a line with the promised keys; --video: a GIF of an episode; the run is untouched."""
    from PIL import Image, ImageSequence
    folder = uninterrupted[0]
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    answers = []
    for _ in range(2):
        cmil.main(["--eval", str(folder), "--episodes", "3", "--video", str(tmp_path / "x.gif")])
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        answers.append(json.loads(out))
    assert {"episodes", "success", "success_ci95", "tasks", "return"} <= set(answers[0])
    assert answers[0]["episodes"] == 3 and answers[0] == answers[1]
    low, high = answers[0]["success_ci95"]
    assert 0 <= low <= answers[0]["success"] <= high <= 1
    with Image.open(tmp_path / "x.gif") as gif:      # equal neighbours are stored as one, longer
        shown = sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) / 1000
        assert gif.size == (256, 256) and 1 < gif.n_frames <= 51
    assert shown == pytest.approx(51 / 12, rel=.05)      # seconds
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


@pytest.mark.parametrize("words", [
    ["--video", "/no/such/folder/x.gif"], ["--video", "x.avi"], ["--episodes", "0"],
    ["--num-envs", "0"], ["--seed", "-1"], ["--threads", "-1"]])
def test_eval_mistakes_get_one_line(words, uninterrupted, capsys):
    """A picture that cannot be written, or no episodes at all: exit code 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--eval", str(uninterrupted[0]), "--episodes", "1", *words])
    assert stop.value.code == 2 and words[0] in one_error_line(capsys)


def test_eval_uses_the_checkpoint(uninterrupted):
    """The evaluated agent has the run's weights, not fresh ones."""
    _, agent, vec, steps = cmil.load_agent(uninterrupted[0])
    vec.close()
    assert steps == 50 and same(agent.state_dict()["modules"], uninterrupted[1]["modules"])


def test_eval_of_a_run_made_with_cuda(uninterrupted, tmp_path, monkeypatch):
    """It is not needed to evaluate: --graph on only speeds up learning."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    stored = json.loads((run / "config.json").read_text())
    stored["config"] |= {"graph": "on"}
    (run / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, agent, vec, _ = cmil.load_agent(run)
    vec.close()
    assert same(agent.state_dict()["modules"], uninterrupted[1]["modules"])


@pytest.mark.parametrize("damage, named", [
    ("no checkpoint", "checkpoint.pt"), ("cut checkpoint", "checkpoint.pt"),
    ("bad config", "config.json"), ("list", "config.json"), ("unknown field", "config.json"),
    ("other sizes", "other networks")])
def test_eval_of_a_damaged_run(damage, named, uninterrupted, tmp_path, capsys):
    """A run without a readable checkpoint or config.json gives one line that names the file."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    checkpoint = run / "checkpoint.pt"
    stored = json.loads((run / "config.json").read_text())
    if damage == "no checkpoint":
        for file in run.glob("checkpoint*.pt"):
            file.unlink()
    elif damage == "cut checkpoint":
        (run / "checkpoint.prev.pt").unlink()
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    elif damage == "other sizes":
        stored["config"]["deter"] += 1
    elif damage == "unknown field":
        stored["config"]["warp"] = 1
    (run / "config.json").write_text({"bad config": "{", "list": "[]"}.get(
        damage, json.dumps(stored)))
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--eval", str(run), "--episodes", "1"])
    assert stop.value.code == 2 and named in one_error_line(capsys)


def test_a_run_from_before_a_field_resumes(tmp_path, capsys):
    """A field that config.json does not know had its default."""
    c = run_config(tmp_path)
    stored = dataclasses.asdict(c)
    del stored["reward_noise"]
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    assert cmil.make_config(dataclasses.asdict(c)) == c
    with pytest.raises(SystemExit):
        cmil.make_config({**dataclasses.asdict(c), "reward_noise": True})
    assert "reward_noise (now True, run False)" in one_error_line(capsys)


def bench(tmp_path, capsys, monkeypatch, looks, *words):
    """--bench with a clock on which 20 s pass in so many looks, and updates that take no time."""
    clock = itertools.count()
    monkeypatch.syspath_prepend(HERE / "results")
    monkeypatch.setattr(importlib.import_module("bench"), "time", types.SimpleNamespace(
        perf_counter=lambda: next(clock) * 20 / looks))  # for the bench alone, not for its workers
    monkeypatch.setattr(cmil.Agent, "update", lambda self, replay, clone=False: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cmil.main(["--bench", "--env", "point", "--preset", "debug", "--num-envs", "1",
               "--device", "cpu", *words])
    return json.loads(capsys.readouterr().out)           # nothing else is printed there


def test_bench(tmp_path, capsys, monkeypatch):
    """--bench: one JSON line with the promised keys, positive rates; no folder is left behind."""
    line = bench(tmp_path, capsys, monkeypatch, 60, "--num-envs", "2", "--train-ratio", "1.5")
    # The pretended clock moves 1/3 s a look, and a loop looks once a turn: 3 turns a second. A turn
    # is an update; an episode of two environments; or a step of both with its three updates.
    assert line["updates_per_s"] == pytest.approx(3, rel=.05)
    assert line["env_steps_per_s"] == pytest.approx(3 * 50 * 2, rel=.05)
    assert line["both"]["env_steps_per_s"] == pytest.approx(3 * 2, rel=.05)
    assert line["both"]["updates_per_s"] == pytest.approx(3 * 3, rel=.05)
    assert {"updates_per_s", "env_steps_per_s", "both", "peak_mem_gb"} <= set(line)
    for values in (line, line["both"]):
        assert values["updates_per_s"] > 0 and values["env_steps_per_s"] > 0
    assert line["peak_mem_gb"] > 0
    assert not list(tmp_path.glob("cmil*"))              # torch may make a cache folder there


def test_bench_outlasts_an_episode(tmp_path, capsys, monkeypatch):
    """--bench goes on for its 20 s even if that is more steps than an episode has (a fast GPU)."""
    monkeypatch.setattr(envs.Point, "_step", lambda self, action: 0.)
    monkeypatch.setattr(envs.Point, "_frame", black)
    monkeypatch.setattr(envs, "point_demos", lambda n, **options: [
        {"image": np.zeros((202, 64, 64, 3), np.uint8), "action": np.zeros((202, 2), np.float32)}])
    line = bench(tmp_path, capsys, monkeypatch, 300, "--episode-steps", "201")
    assert line["both"]["updates_per_s"] > 0


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
"""


def test_import_needs_neither_mujoco_nor_gymnasium_nor_gl():
    """`import cmil`, and using its parts, works where only torch and numpy are installed."""
    blocked = {"mujoco", "gymnasium", "gymnasium_robotics", "OpenGL", "imageio", "matplotlib",
               "envs"}
    code = BLOCKER.format(names=blocked) + (
        "import cmil, torch\n"
        "print(cmil.lambda_return(torch.ones(2, 1), torch.zeros(3, 1), .5, 1.).tolist())\n"
        "assert not {'mujoco', 'gymnasium', 'OpenGL'} & set(sys.modules)\n")
    answer = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert answer.stdout.strip() == "[[1.5], [1.0]]", answer.stderr


def test_envs_needs_neither_torch_nor_mujoco():
    """envs.py makes and steps point without importing torch, cmil or mujoco."""
    code = BLOCKER.format(names={"torch", "cmil", "mujoco", "OpenGL", "gymnasium_robotics"}) + (
        "import envs\n"
        "env = envs.make_env('point')\n"
        "env.reset(seed=0)\n"
        "print(env.step(env.action_space.sample())[0].shape)\n")
    answer = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert answer.stdout.strip() == "(64, 64, 3)", answer.stderr


# ------------------------------------------------------------------------------------ figures


def fake_run(folder, seed, algo="cmil", points=4, **extra):
    """A run folder whose success grows by (seed + 1) / 10 an evaluation."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {
        "env": "kitchen", "algo": algo, "seed": seed}}))
    lines = [{"step": 10 * i, "update": i, "time": 60. * i, "eval/success": i * (seed + 1) / 10,
              "eval/tasks": i / 2, **extra} for i in range(points)]
    lines.insert(1, {"step": 5, "recon": 3.})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "eval/succ')    # being written
    return str(folder)


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "results"))
    return importlib.import_module("figures")


def test_curves_are_means_over_seeds(figures, tmp_path):
    """Three seeds: mean and bounds at each evaluation; the curve ends with the shortest seed."""
    runs = [figures.read_run(fake_run(tmp_path / str(i), i, points=4 + i))[1] for i in range(3)]
    x, mean, low, high = figures.curve(runs, "eval/success", "step")
    assert x.tolist() == [0, 10, 20, 30]
    np.testing.assert_allclose(mean, [0, .2, .4, .6])
    np.testing.assert_allclose(low, [0, .1, .2, .3])     # three values: the interval is their range
    np.testing.assert_allclose(high, [0, .3, .6, .9])
    x, mean, low, high = figures.curve(runs[:1], "eval/success", "time")
    assert x.tolist() == [0, 60, 120, 180] and low is None and high is None
    assert figures.curve(runs, "eval/rotation", "step") is None


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
@pytest.mark.parametrize("x", ["step", "update", "time"])
def test_plot_draws_a_picture(x, tmp_path, capsys):
    """--plot's function on two methods and several seeds: a picture that can be read."""
    import imageio.v3 as iio
    runs = [fake_run(tmp_path / f"{algo}{i}", i, algo)
            for algo in ("cmil", "dbc") for i in range(2)]
    answer = subprocess.run([sys.executable, HERE / "results" / "figures.py", *runs, "--x", x,
                             "--out", tmp_path / "x.png"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    picture = iio.imread(tmp_path / "x.png")
    assert picture.shape[0] > 500 and len(np.unique(picture)) > 20


def test_settings_are_curves_of_their_own(figures, tmp_path, capsys):
    """Runs of one method that differ in more than their seed are not its seeds; none counts twice.
    """
    runs = [fake_run(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1), ("c", 0))]
    for run, alpha in zip(runs, (1., 1., 10.)):
        path = Path(run) / "config.json"
        stored = json.loads(path.read_text())
        stored["config"].update(alpha=alpha, logdir=run)
        path.write_text(json.dumps(stored))
    groups = figures.grouped(runs)
    assert {name: len(seeds) for name, seeds in groups["kitchen"].items()} == {
        "cmil, alpha 1.0": 2, "cmil, alpha 10.0": 1}
    assert [*figures.grouped(runs[:2])["kitchen"]] == ["cmil"]
    with pytest.raises(SystemExit) as stop:
        figures.grouped([runs[0], runs[1], runs[0]])
    assert stop.value.code == 2 and "the same settings and seed" in one_error_line(capsys)


def test_table_of_methods(tmp_path):
    """compare.py: means and intervals of the final evaluations, the best one while training."""
    runs = [fake_run(tmp_path / f"{algo}{i}", i, algo)
            for algo in ("cmil", "dbc") for i in range(2)]
    for run, success in zip(runs, (.5, .7, .1, .3)):
        (Path(run) / "eval.json").write_text(json.dumps({"success": success, "tasks": 4 * success}))
    table = [sys.executable, HERE / "results" / "compare.py"]
    answer = subprocess.run([*table, *runs], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in answer.stdout.splitlines()]
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    assert rows[2][:6] == ["kitchen", "cmil", "0.60 (0.50-0.70)", "0.50, 0.70", "0.45", "2.40"]
    assert rows[3][1:4] == ["dbc", "0.20 (0.10-0.30)", "0.10, 0.30"]
    answer = subprocess.run([*table, runs[0], "--final", "x.json"], capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "x.json" in answer.stderr


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_what_a_figure_shows(figures, tmp_path, monkeypatch):
    """Two methods of five seeds: means as lines, 95% intervals of the mean as bands, a line style
    and marker for each, labelled axes; hours on the axis of time."""
    from matplotlib import axes
    drawn, bands, texts = {}, [], []
    calls_of(monkeypatch, axes.Axes, "plot", lambda real, self, x, y, **o: (
        drawn.setdefault(o["label"], (x, y, o["ls"], o["marker"])), real(self, x, y, **o))[1])
    calls_of(monkeypatch, axes.Axes, "fill_between", lambda real, self, x, low, high, **o: (
        bands.append((low, high)), real(self, x, low, high, **o))[1])
    for name in ("set_ylabel", "set_xlabel"):
        calls_of(monkeypatch, axes.Axes, name, lambda real, self, text: (
            texts.append(text), real(self, text))[1])
    figures.plot([fake_run(tmp_path / f"{algo}{seed}", seed, algo) for seed in range(5)
                  for algo in ("cmil", "dbc")], str(tmp_path / "x.png"), "time")
    assert drawn.keys() == {"cmil (5 seeds)", "dbc (5 seeds)"}
    (x, y, *style), (_, _, *other) = drawn.values()
    np.testing.assert_allclose(x, np.arange(4) / 60)                     # minutes, in hours
    np.testing.assert_allclose(y, .3 * np.arange(4))                     # of .1 .2 .3 .4 .5
    assert style[0] != other[0] and style[1] != other[1]
    low, high = cmil.bootstrap_ci([.1, .2, .3, .4, .5])
    assert low > .15 and high < .45                                      # so not least and most
    np.testing.assert_allclose([bands[0][0][1], bands[0][1][1]], [low, high])
    assert {"success rate", "tasks completed", "hours"} <= set(texts)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_plot_from_the_command_line(uninterrupted, tmp_path):
    """python cmil.py --plot RUN --out FILE works on a real run."""
    answer = command("--plot", uninterrupted[0], "--out", tmp_path / "x.png")
    assert answer.returncode == 0 and (tmp_path / "x.png").stat().st_size > 5000, answer.stderr


def test_smoothing_and_scaling_of_the_bound(figures):
    """Means over windows that shrink at the ends, in loops; [0, 1]; a constant becomes zeros."""
    values = np.array([3., 1., 4., 1., 5., 9.])
    for width in (1, 3, 4):
        want = [values[max(0, i - width // 2):i + width // 2 + 1].mean() for i in range(6)]
        np.testing.assert_allclose(figures.smoothed(values, width), want)
    assert figures.normalised([2, 4, 3]).tolist() == [0, 1, .5]
    assert figures.normalised([2, 2]).tolist() == [0, 0]


def test_parts_of_the_bound(figures, tmp_path):
    """Each over its own steps, in [0, 1]; a higher return is a smaller gap."""
    _, entries = figures.read_run(fake_run(tmp_path / "run", 1))
    for i, entry in enumerate(entries):
        entry["eval/return" if "eval/success" in entry else "disc/gap"] = i
    entries[1]["uncertainty_expert"] = 1.
    entries.insert(1, {"step": 0, "uncertainty_expert": 9.})             # of the start
    parts = figures.bound_parts(entries)
    assert parts.keys() == {"disc/gap", "eval/return", "uncertainty_expert"}
    assert parts["uncertainty_expert"][0].tolist() == [5]
    step, gap = parts["eval/return"]
    assert step.tolist() == [0, 10, 20, 30] and gap.tolist() == [1, .5, .25, 0]
    assert parts["disc/gap"][0].tolist() == [5]


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_plot_bound(uninterrupted, figures, tmp_path, monkeypatch, capsys):
    """--plot-bound RUN draws its curves; a run without a discriminator is one line. An offline
    run's steps are said to be another's."""
    from matplotlib import axes
    labels, below = [], []
    calls_of(monkeypatch, axes.Axes, "set", lambda real, *args, **options: (
        below.append(options["xlabel"]), real(*args, **options))[1])
    calls_of(monkeypatch, axes.Axes, "plot", lambda real, *args, **options: (
        labels.append(options["label"]), real(*args, **options))[1])
    run = shutil.copytree(uninterrupted[0], tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for change in (0, 1):                                # what never changes is left out
        lines = [{**line, "eval/return": change * line["step"]} if "eval/return" in line else line
                 for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        stored = json.loads((run / "config.json").read_text())
        stored["config"]["offline"] = bool(change)
        (run / "config.json").write_text(json.dumps(stored))
        labels.clear()
        cmil.main(["--plot-bound", str(run), "--out", str(tmp_path / "x.png")])
        assert labels == list(figures.BOUND.values())[:3 + change]
        assert ("offline" in below[-1]) == bool(change)
        assert (tmp_path / "x.png").stat().st_size > 5000
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--plot-bound", fake_run(tmp_path / "dbc", 0, "dbc")])
    assert stop.value.code == 2 and "dbc has no discriminator" in one_error_line(capsys)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
@pytest.mark.parametrize("env, tasks, demos, lines", [
    ("kitchen", "", "", {"eval/success": 1, "eval/tasks": 4}), ("TestCountdown-v0", "", "", {}),
    ("kitchen", "", "own.npz", {}),
    ("kitchen", "kettle+microwave", "", {"eval/success": 1, "eval/tasks": 2})])
def test_curves_have_the_experts_line(env, tasks, demos, lines, figures, tmp_path, monkeypatch):
    """What the demonstrations reach, where they are the project's own."""
    from matplotlib import axes
    drawn = calls_of(monkeypatch, axes.Axes, "axhline", lambda real, *args, **options: real(
        *args, **options))
    run, other = fake_run(tmp_path / "run", 0), fake_run(tmp_path / "other", 0)
    for folder, config in (("run", {"env": env, "tasks": tasks, "demos": demos}),
                           ("other", {"env": "Other-v0", "demos": "its.npz"})):
        (tmp_path / folder / "config.json").write_text(json.dumps({
            "config": {**config, "algo": "cmil"}}))
    figures.plot([run, other], str(tmp_path / "x.png"))
    assert [height for _, height in drawn] == list(lines.values())


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_environments_have_only_their_own_panels(figures, tmp_path, monkeypatch):
    """Beside each other, the kitchen has success and tasks, Baoding success and rotation; the
    demonstrations' rotation is drawn for episodes as long as theirs."""
    pictures, runs = [], []
    monkeypatch.setattr(figures, "save", lambda figure, out: pictures.append(figure))
    for name, config, extra in (("kitchen", {"env": "kitchen"}, {"eval/tasks": 2}),
                                ("baoding", {"env": "baoding"}, {"eval/rotation": .7})):
        runs.append(fake_run(tmp_path / name, 0))
        (tmp_path / name / "config.json").write_text(json.dumps({
            "config": {**config, "algo": "cmil"}}))
        lines = [{"step": s, "update": s, "time": s, "eval/success": .5, "eval/tasks": .5, **extra}
                 for s in (0, 100)]
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines))
    figures.plot(runs, "x.png")
    seen = {(axis.get_subplotspec().colspan.start, axis.get_ylabel()): axis
            for axis in pictures[0].axes if axis.get_visible()}
    assert sorted(seen) == [(0, "success rate"), (0, "tasks completed"), (1, "rotation (turns)"),
                            (1, "success rate")]
    for place, axis in seen.items():
        assert bool(axis.get_xlabel()) == (place[1] != "success rate")
    assert len(seen[1, "rotation (turns)"].lines) == 2                   # curve, demonstrations
    (tmp_path / "baoding" / "config.json").write_text(json.dumps({
        "config": {"env": "baoding", "episode_steps": 50, "algo": "cmil"}}))
    figures.plot(runs[1:], "x.png")
    assert [len(axis.lines) for axis in pictures[1].axes] == [1, 1]


@pytest.mark.parametrize("problem", ["empty", "missing", "damaged", "no evaluation", "folder"])
def test_plot_of_a_bad_run(problem, figures, tmp_path, capsys):
    """One line that names the run, exit code 2."""
    run = Path(fake_run(tmp_path / "run", 0))
    if problem == "folder":
        shutil.rmtree(run)
    elif problem == "missing":
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text({"empty": "", "damaged": "{\n",
                                            "no evaluation": '{"step": 5}\n'}[problem])
    with pytest.raises(SystemExit) as stop:
        figures.plot([str(run)], str(tmp_path / "x.png"))
    assert stop.value.code == 2 and str(run) in one_error_line(capsys)


def test_plot_without_matplotlib(tmp_path):
    """One line that says what to install, exit code 2."""
    run = fake_run(tmp_path / "run", 0)
    code = BLOCKER.format(names={"matplotlib"}) + f"import cmil\ncmil.main(['--plot', {run!r}])\n"
    answer = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "pip install matplotlib" in answer.stderr


# ------------------------------------------------------------------------------------ measuring


def script(name):
    """A script of results/ as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_profile_counts_an_updates_operations(monkeypatch, capsys):
    """Its count of a product's and a convolution's operations is 2 x multiplications by hand."""
    profile = script("profile_update")
    a, image = torch.randn(3, 5), torch.randn(2, 3, 8, 8)
    with profile.Count() as count:
        a @ torch.randn(5, 7)
        nn.functional.conv2d(image, torch.randn(4, 3, 4, 4), stride=2)   # 3 x 3 outputs
    assert count.flop == {"matrix products": 2 * 3 * 5 * 7,
                          "convolutions": 2 * 2 * 4 * 9 * 3 * 16}
    with profile.Count() as count:
        b = a.t() + a[0, 0]                          # of 15, 1 and 15 floats; the views: nothing
        b.mul_(2)                                    # read and written: counted once
        torch.zeros_like(a)
        a[torch.tensor([0, 2])]                      # 10 of the 15 are read, 10 written
    assert count.bytes == 4 * (15 + 1 + 15 + 15 + 10 + 10) and not count.flop
    for algo, step in (("cmil", "gradient_step"), ("dbc", "clone_step"), ("pdac", "gradient_step")):
        steps = calls_of(monkeypatch, cmil.AGENTS.get(algo, cmil.Agent), step,
                         lambda real, *args: real(*args))
        monkeypatch.setattr(sys, "argv", f"profile_update.py --preset debug --device cpu "
                                         f"--algo {algo}".split())
        profile.main()
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["algo"] == algo and len(steps) == 17       # counted, 15 timed, profiled
        assert result["seconds_per_update"] > result["floor_seconds"] > 0
        assert set(result["gflop"]) == {"convolutions", "matrix products"}


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_scaling_measures_and_draws(monkeypatch, tmp_path, capsys):
    """A line for every value of every field, and a picture."""
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "VALUES", {"horizon": (1, 2), "members": (1, 3)})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", str(tmp_path / "x.png"), "--preset",
                                      "debug", "--device", "cpu"])
    made = calls_of(monkeypatch, scaling.bench, "agent_on_noise", lambda real, c: real(c))
    scaling.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(line)[0] for line in lines] == ["horizon"] * 2 + ["members"] * 2
    assert all(line["ratio"] == pytest.approx(line["ms"] / line["preset_ms"], rel=.02)
               for line in lines) and (tmp_path / "x.png").stat().st_size > 5000
    # Every other agent is the preset's own; the rest differ from it in one field each.
    assert [(c.horizon, c.members) for (c,) in made] == [
        (4, 3), (1, 3), (4, 3), (2, 3), (4, 3), (4, 1), (4, 3), (4, 3)]


def test_bench_at_commits(monkeypatch, capsys, tmp_path):
    """One line a commit, with its name, from a checkout of that commit that is removed after."""
    commits = script("bench_commits")
    seen = []

    def run(command, cwd=None, **options):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="abc1234\n")
        seen.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, 0, stdout='noise\n{"updates_per_s": 2}\n')
    monkeypatch.setattr(commits.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_commits.py", "abc,HEAD", "--env", "point"])
    commits.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"commit": "abc1234", "flags": "--env point", "updates_per_s": 2}] * 2
    assert [words for words, _ in seen] == [["cmil.py", "--bench", "--env", "point"]] * 2
    assert not any(Path(folder).exists() for _, folder in seen)


def test_sweep_runs_each_variant_once(monkeypatch, capsys, tmp_path):
    """A run and a final evaluation for every variant and seed; the same command makes none anew."""
    sweep = script("sweep")
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--out", str(tmp_path), "--seeds", "3",
                                      "--variants", "", "--no-data-critic", "--sigma 0.5",
                                      "--episodes", "2", "--",
                                      "--env", "point", "--preset", "debug", "--steps", "200",
                                      "--device", "cpu", "--threads", "1"])
    sweep.main()
    rows = {row["run"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {"base-s3", "sigma-0.5-s3", "no-data-critic-s3"}
    off = json.loads((tmp_path / "no-data-critic-s3" / "config.json").read_text())["config"]
    assert off["data_critic"] is False and off["sigma"] == math.sqrt(2.5)
    for name, sigma in (("base-s3", math.sqrt(2.5)), ("sigma-0.5-s3", 0.5)):
        config = json.loads((tmp_path / name / "config.json").read_text())["config"]
        assert config["sigma"] == sigma and config["seed"] == 3
        evaluations = [line["eval/tasks"] for line in metrics(tmp_path / name)
                       if "eval/tasks" in line]
        assert rows[name]["tasks"] == evaluations and rows[name]["eval"]["success"] >= 0
        assert rows[name]["eval-sampled"]["tasks"] >= 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    sweep.main()
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")
                      if file.is_file()}
    learned = [line["recon"] for line in metrics(tmp_path / "base-s3") if "recon" in line]
    last = learned[-max(1, len(learned) // 5):]
    assert rows["base-s3"]["recon"] == pytest.approx(np.mean(last), abs=1e-3)
    played = [line["train/tasks"] for line in metrics(tmp_path / "base-s3")
              if "train/tasks" in line]
    assert len(played) == 2 and rows["base-s3"]["training_tasks"] == played[-1]
    lines = [{"update": 5 * max(0, i - 1), "train/tasks": float(i), "ups": 1.} for i in range(6)]
    (tmp_path / "base-s3" / "metrics.jsonl").write_text(
        "".join(json.dumps({**line, "time": 0}) + "\n" for line in lines))
    row = sweep.row(tmp_path / "base-s3", 16)            # updates 0 0 5 10 15 20: seed rounds first
    assert row["training_tasks_until_16"] == (2 + 3 + 4) / 3 and row["training_tasks"] == 5


def test_sweep_does_not_evaluate_what_was_stopped(monkeypatch, tmp_path):
    """A run that a signal stops is no result: the sweep ends, and the same command takes it up."""
    sweep, calls = script("sweep"), []

    def run(command, **_):
        calls.append(Path(command[1]).name)
        raise sweep.subprocess.CalledProcessError(1, command)
    monkeypatch.setattr(sweep.subprocess, "run", run)
    argv = ["sweep.py", "--out", str(tmp_path), "--jobs", "1", "--variants", "", "--sigma 0.5",
            "--", "--env", "point"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="the same command goes on"):
        sweep.main()
    assert set(calls) == {"drift.py"} and not list(tmp_path.rglob("eval*.json"))
    monkeypatch.setattr(sys, "argv", [*argv, "--seed-steps", "50"])
    with pytest.raises(SystemExit, match="base-s0 was made with --env point; give another --out"):
        sweep.main()


def test_a_signal_shows_in_the_exit_code_of_drift(tmp_path):
    """cmil.py ends with 0; a script that goes on to evaluate must know the difference."""
    run = subprocess.Popen(
        [sys.executable, str(HERE / "results" / "drift.py"), "--env", "point", "--preset", "debug",
         "--steps", "100000", "--device", "cpu", "--threads", "1", "--logdir", str(tmp_path / "r")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "step 0, update 0" in "".join(run.stdout.readline() for _ in range(4))
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "the same command resumes" in out and "Traceback" not in errors


def test_sight_reads_what_is_there(monkeypatch):
    """The ridge regression finds a linear map; what feat does not hold stays unknown."""
    sight, rng = script("sight"), np.random.default_rng(0)
    feat, hidden = rng.normal(size=(500, 6)), rng.normal(size=(500, 1))
    target = np.c_[feat @ rng.normal(size=(6, 2)) + 3, hidden]
    error = sight.ridge(feat[:400], target[:400])(feat[400:]) - target[400:]
    assert np.abs(error[:, :2]).max() < 0.05
    assert error[:, 2].std() == pytest.approx(hidden[400:].std(), rel=0.1)
    c = cmil.make_config(dict(env="kitchen", preset="debug", algo="dbc", logdir="unused",
                              device="cpu"))
    demos = [{"image": rng.integers(0, 255, (30, 64, 64, 3), np.uint8),
              "action": rng.uniform(-1, 1, (30, 9)).astype(np.float32)} for _ in range(4)]
    qpos, drawn = rng.normal(size=(30, 4, 30)), []
    found = sight.measure(c, 2, demos, qpos, [])
    assert found["microwave"] > 0.5                      # noise cannot be read
    assert all(np.isfinite(value) for value in found.values())
    black = [{"image": np.zeros((40, 64, 64, 3), np.uint8), "action": demos[0]["action"][:1]
              .repeat(40, 0)} for _ in range(50)]        # a run's episodes: the world model's only
    model_loss, clone_loss = cmil.world_model_loss, cmil.clone_loss
    monkeypatch.setattr(cmil, "world_model_loss", lambda world, image, *rest: (
        drawn.append(image), model_loss(world, image, *rest))[1])
    monkeypatch.setattr(cmil, "clone_loss", lambda actor, feat, action: (
        drawn.append(action), clone_loss(actor, feat, action))[1])
    assert sight.measure(c, 2, demos, qpos, black).keys() == found.keys()
    images, actions = drawn[0::2][:2], drawn[1::2][:2]
    assert all((image == -.5).float().mean() > .5 for image in images)
    assert all(len(action[1:].flatten(0, 1).unique(dim=0)) > 4 for action in actions)


def test_sight_of_finished_runs(monkeypatch, capsys, tmp_path):
    """A run's last checkpoint, and what a clock would know; a share of 1 is the mean's error."""
    sight = script("sight")
    truth = np.random.default_rng(0).normal(size=(50, 2, 30)) * np.arange(1, 31)
    ones = sight.shares(truth.mean((0, 1)) - truth, truth)
    assert [ones[part] for part in ("light", "slide", "microwave", "kettle")] == [1, 1, 1, 1]
    c = cmil.make_config(dict(
        env="kitchen", preset="debug", algo="dbc", device="cpu", logdir=str(tmp_path), steps=20,
        episode_steps=20, num_envs=1, pretrain=2, eval_episodes=1))
    assert cmil.Trainer(c).run()
    monkeypatch.setattr(sys, "argv", ["sight.py", "--runs", str(tmp_path), "--fresh",
                                      str(HERE / "demos" / "kitchen.npz")])
    sight.main()
    clock, found = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert clock["run"] == "clock" and 0 < clock["arm"] < 0.5
    assert found["update"] > 0 and all(np.isfinite(found[key]) for key in (*sight.PARTS, "bc"))


def test_drift_takes_the_actors_loss_apart():
    """Its terms add up to actor_loss; watching leaves weights and random numbers alone."""
    drift = script("drift")
    for discount in (True, False):
        agent, replay = agent_and_replay(actor_discount=discount, alpha=3.0)
        torch.manual_seed(1)
        agent.update(replay)
        before = torch.get_rng_state()
        image, action = replay.sample(4)
        post = agent.world.rssm.observe(agent.world.encoder(cmil.to_float(image)), action)
        dream = cmil.imagine(agent.world.rssm, agent.actor, post.map(lambda x: x.flatten(0, 1)),
                             action.flatten(0, 1), agent.c.horizon)
        reward = cmil.conservative_reward(agent.disc, dream, agent.c)
        whole, _ = cmil.actor_loss(agent.critics, dream, reward, agent.c)
        assert sum(drift.actor_terms(agent, dream).values()).item() == pytest.approx(
            whole.item(), rel=1e-5)
        torch.set_rng_state(before)
        weights = [p.clone() for p in agent.actor.parameters()]
        found = drift.watch(agent, replay)
        assert all(np.isfinite(value) for value in found.values()) and len(found) == 19
        assert found["watch/grad_bc"] > 0 and found["watch/grad_penalty"] > 0
        assert all(torch.equal(*pair) for pair in zip(weights, agent.actor.parameters()))
        assert all(p.grad is None for p in agent.actor.parameters())


@pytest.mark.parametrize("algo", ["vmail", "pdac"])
def test_drift_watches_only_what_there_is(algo, tmp_path):
    """One prior has no penalty to take apart; a method without a model is left alone."""
    drift = script("drift")
    changes = {**cmil.ALGOS[algo], "steps": 150, "seed_steps": 50, "log_every": 4}
    if algo == "vmail":
        changes["pretrain"] = 2
    assert drift.Watched(run_config(tmp_path, algo=algo, **changes)).run()
    watched = {name for line in metrics(tmp_path) for name in line if name.startswith("watch/")}
    assert "watch/grad_penalty" not in watched
    assert ("watch/grad_value" in watched) == (algo == "vmail")


def test_tools_for_latents_refuse_runs_without_them(tmp_path, capsys, monkeypatch):
    """noise.py and drift.py --at: one line for a run of bc."""
    train(tmp_path, **{**cmil.ALGOS["bc"], "algo": "bc", "pretrain": 1, "steps": 50})
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["noise.py", str(tmp_path)])
    for tool in (script("noise").main, lambda: script("drift").at(str(tmp_path))):
        with pytest.raises(SystemExit):
            tool()
        assert "bc" in one_error_line(capsys)


def test_drift_at_a_checkpoint(uninterrupted, tmp_path, capsys):
    """--at: what the policy played without the demonstrations; the run is left as it was."""
    drift = script("drift")
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
              and "tfevents" not in path.name}
    asked, real = [], cmil.Replay.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmil.Replay, "draw", lambda self, first, end, batch: (
            asked.append((int(first), int(end), int(self.n_demo_starts), int(self.n_starts))),
            real(self, first, end, batch))[1])
        drift.at(str(tmp_path / "run"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["watch/u_random"] > 0 and found["watch/u_replay_std"] > 0 and found["update"] > 0
    ranges = {(first, end) for first, end, _, _ in asked}
    demos, everything = asked[0][2:]
    assert ranges == {(0, everything), (0, demos), (demos, everything)} and 0 < demos < everything
    assert all(path.read_bytes() == data for path, data in before.items())


def test_noise_of_latents_and_actions_apart(uninterrupted, tmp_path, capsys, monkeypatch):
    """noise.py: both alike are --eval's episodes; modes of both never draw, the others do."""
    noise, run = script("noise"), str(uninterrupted[0])
    monkeypatch.setattr(sys, "argv", ["noise.py", run, "--episodes", "2", "--seed", "7"])
    noise.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["latents"], line["actions"]) for line in lines] == [
        (a, b) for a in ("modes", "sampled") for b in ("modes", "sampled")]
    for line, flag in ((lines[0], "--no-eval-sample"), (lines[3], "--eval-sample")):
        cmil.main(["--eval", run, "--episodes", "2", "--seed", "7", flag])
        assert json.loads(capsys.readouterr().out)["return"] == pytest.approx(line["return"],
                                                                              abs=1e-4)
    agent, image = agent_and_replay()[0], np.zeros((2, 64, 64, 3), np.uint8)
    for latents, actions in ((False, True), (True, False)):
        first, second = (noise.Mixed(agent, latents).act(image, None, actions) for _ in range(2))
        assert np.allclose(first[0], agent.actor(first[1][0].feat).mode.detach()) != actions
        assert torch.equal(first[1][0].stoch, second[1][0].stoch) != latents
        assert np.array_equal(first[0], first[1][1].numpy())  # what is carried is what is done


def test_drift_draws_what_it_logs(monkeypatch, tmp_path):
    """Every logged name is in one of the panels, bands are mean -+ std, an offline run too."""
    pytest.importorskip("matplotlib")
    from matplotlib import axes
    drift, filled = script("drift"), []
    agent, replay = agent_and_replay()
    torch.manual_seed(0)
    found = drift.watch(agent, replay)
    drawn = {name for names in drift.PANELS.values() for name in names}
    assert {name for name in found if not name.endswith("_std")} <= drawn
    for run in ("online", "offline"):
        (tmp_path / run).mkdir()
        lines = [{"update": 100 * i, "bc": -i, "eval/tasks": 0,
                  **({"reward": 1.0, "reward_std": 0.5} if run == "online" else {}),
                  **(found if run == "online" else {})} for i in range(3)]
        (tmp_path / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(axes.Axes, "fill_between",
                        lambda self, x, low, high, **_: filled.append((x, low, high)))
    drift.draw([tmp_path / "online", tmp_path / "offline"], tmp_path / "drift.png")
    assert len(filled) == 8 and (tmp_path / "drift.png").stat().st_size > 10_000
    x, low, high = next(f for f in filled if np.allclose(f[1], 0.5) and np.allclose(f[2], 1.5))
    assert x == [0, 100, 200]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux counts them")
def test_soak_counts_what_a_run_holds(tmp_path):
    """Lines of a run with its workers; growth by a straight line; a run that fails at once."""
    soak = script("soak")
    lines = [{"seconds": 36 * i, "memory_mb": 1000 + i + (i < 10) * 500, "handles": 40,
              "processes": 3} for i in range(110)]
    found = soak.growth(lines, 360)
    assert found["hours"] == .99 and found["lines"] == 100 and found["handles"]["an_hour"] == 0
    assert abs(found["memory_mb"]["an_hour"] - 100) < .1 and found["memory_mb"]["most"] == 1109
    assert found["memory_mb"]["first"] == 1022 and found["memory_mb"]["last"] == 1097
    words = ["--env", "point", "--preset", "debug", "--pretrain", 40, "--steps", 100, "--device",
             "cpu", "--threads", 1, "--logdir", tmp_path / "run"]
    for flags, code in ((words, 0), (["--env", "nowhere"], 2)):
        answer = subprocess.run(
            [sys.executable, HERE / "results" / "soak.py", "--out", tmp_path / "x.jsonl", "--every",
             ".1", "--warm-up", "0", "--", *map(str, flags)], capture_output=True, text=True)
        last = json.loads(answer.stdout.splitlines()[-1])
        assert last["exit"] == code, answer.stderr
        logged = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        if code == 0:                                    # with two workers, each a Python
            most = {key: max(line[key] for line in logged) for key in logged[0]}
            assert most["processes"] >= 3 and most["memory_mb"] > 100 and most["handles"] > 20


# ------------------------------------------------------------------------------------ point


def episode(env, seed, policy):
    """One episode -> images (T+1, ...), infos (T+1), how it ended at each step (T, 2)."""
    image, info = env.reset(seed=seed)
    images, infos, ends = [image], [info], []
    for t in range(env.get_wrapper_attr("episode_steps")):
        image, _, terminated, truncated, info = env.step(policy(t))
        images.append(image), infos.append(info), ends.append((terminated, truncated))
    return np.stack(images), infos, np.array(ends)


def random_policy(size, seed=0):
    rng = np.random.default_rng(seed)
    return lambda t: rng.uniform(-1, 1, size).astype(np.float32)


def test_point_expert_nearly_always_arrives():
    """At least 297 of 300 seeds, at random speeds of its range."""
    env, rng = envs.make_env("point"), np.random.default_rng(5)
    arrived = 0
    for seed in range(300):
        speed = rng.uniform(*envs.EXPERT_SPEED) * envs.GAIN / (1 - envs.INERTIA)
        _, infos, _ = episode(env, seed, lambda t: envs.point_expert(env, speed))
        arrived += infos[-1]["success"]
    assert arrived >= 297


def test_point_is_not_solved_by_chance():
    """Random actions and standing still never arrive in 50 episodes each."""
    env = envs.make_env("point")
    for policy in (random_policy(2), lambda t: np.zeros(2, np.float32)):
        assert not any(episode(env, seed, policy)[1][-1]["success"] for seed in range(50))


def test_point_has_fixed_length():
    """Success or failure never ends an episode: truncated exactly at step 50, terminated never."""
    env = envs.make_env("point")
    speed = .8 * envs.GAIN / (1 - envs.INERTIA)
    images, infos, ends = episode(env, 0, lambda t: envs.point_expert(env, speed))
    assert not ends[:, 0].any() and ends[:, 1].tolist() == [False] * 49 + [True]
    assert images.shape == (51, 64, 64, 3) and images.dtype == np.uint8
    success = [info["success"] for info in infos]
    assert success[-1] and success == sorted(success)    # once true, it stays
    for info in infos:
        assert info["n_tasks"] == len(info["tasks"]) == info["success"] and not info["padded"]
        assert info["tasks"] in ((), ("goal",))
    with pytest.raises(ValueError, match="reset"):
        env.step(np.zeros(2, np.float32))


def test_point_reset_is_a_fresh_start():
    """reset(seed) after an episode equals reset(seed) of a fresh environment, and what follows."""
    used, fresh = envs.make_env("point"), envs.make_env("point")
    _, infos, _ = episode(used, 3, lambda t: np.ones(2, np.float32))
    assert infos[-1]["touched"]
    first, second = (episode(env, 7, random_policy(2, 2)) for env in (used, fresh))
    assert np.array_equal(first[0], second[0]) and first[1] == second[1]
    assert not np.array_equal(first[0][0], episode(fresh, 8, random_policy(2))[0][0])


BAD_ACTIONS = [[np.nan, 0], [0, np.inf], [1.5, 0], [0, -2], [0], [0, 0, 0]]


@pytest.mark.parametrize("action", BAD_ACTIONS, ids=str)
def test_point_refuses_bad_actions(action):
    """NaN, infinite, out of range or of the wrong size: ValueError before anything moves."""
    env = envs.make_env("point")
    before, _ = env.reset(seed=0)
    position = env.unwrapped.position.copy()
    with pytest.raises(ValueError, match="action"):
        env.step(np.array(action, np.float32))
    assert np.array_equal(env.unwrapped.position, position)


def test_point_demos_pair_actions_and_images():
    """action[t] led to image[t]: replaying the actions from the demo's seed gives its images."""
    demos = envs.load_demos("", "point")
    assert len(demos) == 10 and all(demo["success"] for demo in demos)
    rng, env = np.random.default_rng(0), envs.make_env("point")
    rng.uniform()                                        # the expert's speed
    images, _, _ = episode(env, int(rng.integers(2 ** 31)), lambda t: demos[0]["action"][t + 1])
    assert np.array_equal(images, demos[0]["image"])
    for demo in demos:
        assert demo["image"].shape == (51, 64, 64, 3) and demo["image"].dtype == np.uint8
        assert demo["action"].shape == (51, 2) and demo["action"].dtype == np.float32
        assert not demo["action"][0].any() and np.abs(demo["action"]).max() <= 1
    again = envs.load_demos("", "point", 3)
    assert len(again) == 3 and np.array_equal(again[2]["image"], demos[2]["image"])


@pytest.mark.parametrize("env_id", ["cmil/Point-v0", "cmil/Kitchen-v0"])
def test_environments_are_registered(env_id):
    """`import envs` is enough for gym.make."""
    assert env_id in gym.registry


def test_point_passes_gymnasiums_checks():
    """gymnasium's own check_env."""
    from gymnasium.utils.env_checker import check_env
    check_env(gym.make("cmil/Point-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name, options, named", [
    ("nowhere", {}, "nowhere"), ("CartPole-v1", {}, "Discrete"), ("point", {"tasks": "tea"}, "tea"),
    ("point", {"robot_noise_ratio": .1}, "robot_noise_ratio"),
    ("point", {"episode_steps": -5}, "episode_steps")])
def test_bad_environments_get_one_line(name, options, named):
    """An unknown environment, or an option that does not apply, is a UserError of one line."""
    with pytest.raises(envs.UserError, match=named) as error:
        envs.make_env(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n", [1, 2])
def test_vector_environments(n):
    """make_vec: the facts, T steps in lockstep, info as arrays, each worker its own seed."""
    vec = envs.make_vec("point", n)
    try:
        assert envs.env_facts(vec) == {"episode_steps": 50, "action_dim": 2, "gl_renderer": ""}
        image, _ = vec.reset(seed=list(range(n)))
        single = envs.make_env("point")
        for i in range(n):
            assert np.array_equal(image[i], single.reset(seed=i)[0])
        for _ in range(50):
            image, _, terminated, truncated, info = vec.step(np.zeros((n, 2), np.float32))
        assert truncated.all() and not terminated.any() and image.shape == (n, 64, 64, 3)
        assert info["success"].shape == info["n_tasks"].shape == info["padded"].shape == (n,)
        with pytest.raises(ValueError, match="finite"):
            vec.reset(seed=0)
            vec.step(np.full((n, 2), np.nan, np.float32))
    finally:
        with contextlib.suppress(Exception):
            vec.close()


class Countdown(gym.Env):
    """A generic environment: an action in [-2, 6], pictures 100 x 80, its end at step 7."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-2., 6., (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.actions = 0, []
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        self.actions.append(float(action[0]))
        return np.zeros(1, np.float32), 1., self.t == 7, False, {"success": self.t == 7}

    def render(self):
        return np.full((100, 80, 3), 10 * self.t, np.uint8)


gym.register("TestCountdown-v0", Countdown, max_episode_steps=12)


def test_generic_environment_is_padded():
    """Any Gymnasium id: actions rescaled, frames 64 x 64, an early end padded to T and marked."""
    env = envs.make_env("TestCountdown-v0")
    images, infos, ends = episode(env, 0, lambda t: np.array([t % 3 - 1], np.float32))
    assert images.shape == (13, 64, 64, 3) and ends[:, 1].tolist() == [False] * 11 + [True]
    assert images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 70, 70, 70, 70, 70]
    assert [info["padded"] for info in infos] == [False] * 8 + [True] * 5
    assert [info["success"] for info in infos] == [False] * 7 + [True] * 6
    inner = env.unwrapped._inner.unwrapped
    assert inner.actions == [-2, 2, 6, -2, 2, 6, -2]     # -1, 0, 1 on the scale of -2 .. 6


# ------------------------------------------------------------------------------------ demo files


def pixel_demo(**changes):
    """The arrays of a Dreamer-style episode for point, with changes (None removes one)."""
    rng = np.random.default_rng(0)
    arrays = {"image": rng.integers(0, 256, (31, 64, 64, 3), np.uint8),
              "action": rng.uniform(-1, 1, (31, 2)).astype(np.float32)}
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def test_pixel_demos_load(tmp_path, capsys):
    """Files and folders, 64 and 128 pixels, float32 and float64; row 0's action is made zero."""
    arrays = pixel_demo()
    np.savez(tmp_path / "a.npz", **arrays)
    large = arrays["image"].repeat(2, 1).repeat(2, 2)
    double = arrays["action"].astype(np.float64)
    np.savez_compressed(tmp_path / "b.npz", image=large, action=double)
    first, second = envs.load_demos(tmp_path, "point")
    for demo in (first, second):
        assert np.array_equal(demo["image"], arrays["image"]) and demo["image"].dtype == np.uint8
        assert np.array_equal(demo["action"][1:], arrays["action"][1:])
        assert demo["action"].dtype == np.float32 and not demo["action"][0].any()
        assert demo["success"] is None
    assert len(envs.load_demos(tmp_path / "a.npz", "point")) == 1
    assert len(envs.load_demos(tmp_path, "point", 1)) == 1
    assert "renderer" in capsys.readouterr().err
    shorter = envs.load_demos(tmp_path, "point", 0, episode_steps=20)
    assert all(len(demo["image"]) == len(demo["action"]) == 21 for demo in shorter)


def no_number(value):
    action = pixel_demo()["action"]
    action[4, 1] = value
    return action


BAD_PIXELS = {
    "no image": dict(image=None), "no action": dict(action=None),
    "float image": dict(image=np.zeros((31, 64, 64, 3), np.float32)),
    "wrong image size": dict(image=np.zeros((31, 32, 32, 3), np.uint8)),
    "rows do not match": dict(image=np.zeros((30, 64, 64, 3), np.uint8)),
    "integer action": dict(action=np.zeros((31, 2), np.int64)),
    "other action size": dict(action=np.zeros((31, 3), np.float32)),
    "flat action": dict(action=np.zeros(31, np.float32)),
    "NaN": dict(action=no_number(np.nan)), "infinite": dict(action=no_number(np.inf)),
    "out of range": dict(action=no_number(1.5)),
    "too short": dict(image=np.zeros((1, 64, 64, 3), np.uint8),
                      action=np.zeros((1, 2), np.float32)),
    "pickled": dict(action=np.array([None] * 31, object)),
}


@pytest.mark.parametrize("problem", [*BAD_PIXELS, "truncated", "flipped byte", "text", "empty file",
                                     "empty folder", "missing"])
def test_bad_pixel_demos_get_one_line(problem, tmp_path):
    """Each kind of damage is one UserError line that names the file."""
    file = tmp_path / "bad.npz"
    np.savez(file, **pixel_demo(**BAD_PIXELS.get(problem, {})))
    whole = bytearray(file.read_bytes())
    if problem == "truncated":
        file.write_bytes(whole[:len(whole) // 2])
    elif problem == "flipped byte":
        whole[len(whole) // 2] ^= 64
        file.write_bytes(whole)
    elif problem in ("text", "empty file"):
        file.write_text("hello" if problem == "text" else "")
    elif problem in ("missing", "empty folder"):
        file.unlink()
    with pytest.raises(envs.UserError) as error:
        envs.load_demos(tmp_path if problem == "empty folder" else file, "point")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert problem == "empty folder" or "bad.npz" in str(error.value)


def fuzzed(rng):
    """A random mistake in one array of a demonstration -> its arrays."""
    arrays = pixel_demo()
    key = str(rng.choice(["image", "action"]))
    array, cut = arrays[key], int(rng.integers(1, 31))
    mistakes = {
        "missing": lambda: None, "rows": lambda: array[:cut], "no rows": lambda: array[:0],
        "scalar": lambda: array.ravel()[0], "flat": lambda: array.ravel(),
        "dimension": lambda: array[None], "sizes": lambda: np.moveaxis(array, -1, 0),
        "kind": lambda: array.astype(rng.choice(["int8", "int32", "U4", "complex64", "bool"])),
        "pickle": lambda: array.astype(object), "one": lambda: array[..., :1]}
    if key == "action":
        value = rng.choice([np.nan, np.inf, -np.inf, 1.01, -3, 1e30])
        mistakes["number"] = lambda: no_number(value)
    return {**arrays, key: mistakes[str(rng.choice(list(mistakes)))]()}


def test_fuzzed_demos(tmp_path):
    """150 random mistakes in arrays and bytes: each is one UserError line that names the file."""
    rng, file = np.random.default_rng(0), tmp_path / "bad.npz"
    for case in range(150):
        if case % 3:
            np.savez(file, **{k: v for k, v in fuzzed(rng).items() if v is not None})
        else:                                            # bytes lost or changed
            np.savez(file, **pixel_demo())
            whole = file.read_bytes()
            at = int(rng.integers(100, len(whole) - 100))
            file.write_bytes(whole[:at] if case % 2 else flip(whole, at))
        with pytest.raises(envs.UserError) as error:
            envs.load_demos(file, "point", min_steps=7)
        assert "\n" not in str(error.value) and "bad.npz" in str(error.value), case


def test_too_few_demos_get_one_line(tmp_path):
    """Asking for more demonstrations than a file holds says how many there are."""
    np.savez(tmp_path / "a.npz", **pixel_demo())
    with pytest.raises(envs.UserError, match="1 demonstrations.*3"):
        envs.load_demos(tmp_path / "a.npz", "point", 3)


@pytest.mark.parametrize("problem", ["too short", "NaN", "other action size"])
def test_bad_demos_end_a_run_with_one_line(problem, tmp_path, capsys):
    """The same from the command line: exit code 2 and one line that names the file."""
    changes = BAD_PIXELS[problem] if problem != "too short" else dict(
        image=np.zeros((5, 64, 64, 3), np.uint8), action=np.zeros((5, 2), np.float32))
    np.savez(tmp_path / "bad.npz", **pixel_demo(**changes))
    with pytest.raises(SystemExit) as stop:
        cmil.main(["--env", "point", "--preset", "debug", "--num-envs", "1", "--device", "cpu",
                   "--num-demos", "1", "--demos", str(tmp_path / "bad.npz"),
                   "--logdir", str(tmp_path / "run")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("envs: ")]    # a remark on renderers
    assert len(lines) == 1 and lines[0].startswith("cmil: error: ") and "bad.npz" in lines[0]


# ------------------------------------------------------------------------------------ kitchen


needs_kitchen = pytest.mark.skipif(not importlib.util.find_spec("mujoco"), reason="no mujoco here")
TASKS = ("microwave", "kettle", "light switch", "slide cabinet")
# The shipped demonstrations: environment, how many, what each completes.
SHIPPED = [("kitchen", 10, TASKS), ("baoding", 20, ("turn",))]


@pytest.fixture(scope="module")
def kitchen():
    """One kitchen for all tests of it."""
    env = envs.make_env("kitchen", episode_steps=280)
    yield env
    env.close()


def black(env):
    """A picture in place of env._frame()."""
    return np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def hand():
    """One hand with balls for all tests of it."""
    env = envs.make_env("baoding")
    yield env
    env.close()


@pytest.fixture
def simulator(request):
    """The one environment with the name that the test is parametrized with."""
    return request.getfixturevalue({"kitchen": "kitchen", "baoding": "hand"}[request.param])


@pytest.fixture
def dark(monkeypatch):
    """Environments whose frames are not drawn: the physics alone, at a tenth of the time."""
    monkeypatch.setattr(envs.Simulated, "_frame", black)


@needs_kitchen
def test_kitchen_passes_gymnasiums_checks(kitchen):
    """gymnasium's own check_env, and the spaces and facts of the contract."""
    from gymnasium.utils.env_checker import check_env
    check_env(kitchen.unwrapped, skip_render_check=True)
    assert kitchen.action_space.shape == (9,) and kitchen.observation_space.shape == (64, 64, 3)
    vec = envs.make_vec("kitchen", 1)
    facts = envs.env_facts(vec)
    vec.close()
    assert facts["episode_steps"] == 280 and facts["action_dim"] == 9 and facts["gl_renderer"]


@needs_kitchen
def test_kitchen_reset_is_a_fresh_start(kitchen):
    """reset(seed) after part of an episode equals a fresh kitchen: images and physics, each bit."""
    fresh = envs.make_env("kitchen", episode_steps=280)
    kitchen.reset(seed=3)
    policy = random_policy(9, 1)
    for t in range(15):
        kitchen.step(policy(t))
    results = []
    for env in (kitchen, fresh):
        policy, images = random_policy(9, 2), [env.reset(seed=7)[0]]
        for t in range(5):
            images.append(env.step(policy(t))[0])
        results.append((np.stack(images), env.unwrapped.data.qpos.copy()))
    fresh.close()
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
    assert results[0][0].std() > 20 and not np.array_equal(results[0][0][0], results[0][0][-1])


@needs_kitchen
def test_kitchen_has_fixed_length(dark):
    """A single task has 75 steps; truncated exactly there, terminated never; info as promised."""
    env = envs.make_env("kitchen", tasks="microwave")
    _, infos, ends = episode(env, 0, random_policy(9))
    env.close()
    assert len(ends) == 75 and not ends[:, 0].any() and ends[:, 1].tolist() == [False] * 74 + [True]
    assert infos[0]["tasks"] == () and infos[0]["n_tasks"] == 0 and not infos[0]["success"]
    assert isinstance(infos[0]["success"], bool) and isinstance(infos[0]["tasks"], tuple)


@needs_kitchen
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.5])
def test_kitchen_refuses_bad_actions(bad, kitchen):
    """MuJoCo would take them silently: ValueError, and the simulation has not moved."""
    kitchen.reset(seed=0)
    before = kitchen.unwrapped.data.qpos.copy()
    action = np.zeros(9, np.float32)
    action[3] = bad
    with pytest.raises(ValueError, match="action"):
        kitchen.step(action)
    assert np.array_equal(kitchen.unwrapped.data.qpos, before)


@needs_kitchen
def test_the_kitchen_is_registered():
    """gym.make makes it, options and all."""
    env = gym.make("cmil/Kitchen-v0", tasks="kettle")
    image, info = env.reset(seed=0)
    assert image.shape == (64, 64, 3) and info["tasks"] == () and env.action_space.shape == (9,)
    env.close()


@needs_kitchen
def test_simple_shapes_look_the_same(kitchen, monkeypatch):
    """Merged corners and coarse round shapes change few pixels, and the simulation's not at all."""
    env = kitchen
    env.reset(seed=0)
    faces = env.model.mesh_facenum.copy()
    simple = env.draw(env.data)
    envs._release(env.model)
    monkeypatch.setattr(envs, "FINE_MESH", 10**9)
    monkeypatch.setattr(envs.Kitchen, "DETAIL", {"mesh": 0.01, "round": (28, 16, 4)})  # mujoco's
    exact = env.draw(env.data)
    monkeypatch.undo()
    envs._release(env.model)
    error = np.abs(simple.astype(int) - exact).max(-1)                   # (64, 64)
    assert 0 < error.mean() < 2 and (error > 25).mean() < .02
    assert (env.model.mesh_facenum == faces).all()


def test_corners_of_a_mesh_are_merged():
    """A hand-made strip: two corners of one cube become the first; faces without area and second
    copies of a face go."""
    vert = np.array([[0, 0, 0], [1, 0, 0], [.01, .01, 0], [0, 1, 0], [5, 5, 5.]])
    face = np.array([[0, 1, 3], [0, 2, 3], [2, 1, 3], [1, 3, 4], [9, 9, 9]])
    model = types.SimpleNamespace(
        mesh_facenum=np.array([4, 1]), mesh_faceadr=np.array([0, 4]), mesh_vertadr=np.array([0, 5]),
        mesh_vertnum=np.array([5, 0]), mesh_vert=vert, mesh_face=face.copy(),
        mesh_facenormal=10 * face, mesh_texcoordadr=np.array([-1, -1]))
    envs.simplify_meshes(model, .1, least=3)
    assert model.mesh_facenum.tolist() == [2, 1]
    assert model.mesh_face[:2].tolist() == [[0, 1, 3], [1, 3, 4]]
    assert model.mesh_facenormal[:2].tolist() == [[0, 10, 30], [10, 30, 40]]
    assert model.mesh_face[4].tolist() == [9, 9, 9]      # of another mesh


@needs_kitchen
def test_drawing_does_not_disturb_the_physics(kitchen, monkeypatch):
    """The same actions with and without drawing give the same qpos, bit for bit."""
    finals = []
    for draw in (True, False):
        if not draw:
            monkeypatch.setattr(envs.Kitchen, "_frame", black)
        policy = random_policy(9, 4)
        kitchen.reset(seed=5)
        for t in range(15):
            kitchen.step(policy(t))
        finals.append(kitchen.unwrapped.data.qpos.copy())
    assert np.array_equal(*finals)


def stored_demos(name="kitchen"):
    with np.load(HERE / "demos" / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def replay_demo(env, demos, i):
    """Reset to demo i's seed and repeat its actions -> largest error of qpos, tasks completed."""
    import mujoco
    _, info = env.reset(seed=int(demos["seed"][i]))
    assert info["tasks"] == () and not info["success"]   # nothing is left of an episode before
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.unwrapped.model, kind))
    mujoco.mj_getState(env.unwrapped.model, env.unwrapped.data, state, kind)
    np.testing.assert_allclose(state, demos["start"][i], atol=1e-9)
    errors = [np.abs(env.unwrapped.data.qpos - demos["qpos"][i, 0]).max()]
    for t, action in enumerate(demos["action"][i]):
        info = env.step(action)[4]
        errors.append(np.abs(env.unwrapped.data.qpos - demos["qpos"][i, t + 1]).max())
    return max(errors), info


@needs_kitchen
@pytest.mark.parametrize("name, count, tasks", SHIPPED)
def test_demos_replay_to_their_states(name, count, tasks, dark):
    """All demos, from their reset seeds: qpos within 1e-3 at every step, all tasks done; no two
    are alike. The physics alone (nothing is drawn), so half a second an episode.
    """
    demos, env = stored_demos(name), envs.make_env(name)
    assert str(demos["env"]) == name and (HERE / "demos" / f"{name}.npz").stat().st_size <= 1e6
    assert len(set(demos["seed"].tolist())) == len(demos["seed"]) == count
    assert demos["action"].shape == (count, env.episode_steps, env.action_dim)
    for i in range(count):
        error, info = replay_demo(env, demos, i)
        assert error < 1e-3, f"demo {i} is off by {error}"
        assert set(info["tasks"]) == set(tasks) and info["success"]
        assert info["n_tasks"] == len(tasks)
    env.close()
    spread = demos["action"].std(0).mean()                               # over the demonstrations
    assert spread > .03, spread


@needs_kitchen
@pytest.mark.parametrize("simulator, name, actions", [
    ("kitchen", "kitchen", 9), ("baoding", "baoding", 20)], indirect=["simulator"])
def test_demo_images_are_the_environments(simulator, name, actions):
    """A demo's pictures equal the environment's frames when its actions are repeated (12 steps)."""
    demos = stored_demos(name)
    loaded, = envs.load_demos("", name, 1, episode_steps=12)
    assert loaded["image"].shape == (13, 64, 64, 3) and loaded["action"].shape == (13, actions)
    assert np.array_equal(loaded["action"][1:], demos["action"][0, :12])
    image, _ = simulator.reset(seed=int(demos["seed"][0]))
    for t in range(13):
        # qpos is stored in float32: an edge may fall on the next pixel's colour, by a little.
        difference = np.abs(image.astype(int) - loaded["image"][t])
        assert difference.mean() < .05 and (difference > 8).mean() < .001, t
        if t < 12:
            image = simulator.step(demos["action"][0, t])[0]


@needs_kitchen
@pytest.mark.parametrize("simulator, name", [("kitchen", "kitchen"), ("baoding", "baoding")],
                         indirect=["simulator"])
def test_demos_go_through_render_state(simulator, name, monkeypatch, tmp_path):
    """Agent and demos are drawn by the SAME function, or D could tell them apart by style."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(envs, "render_state", lambda *args: calls.append(args) or np.full(
        (64, 64, 3), 7, np.uint8))
    assert (simulator.reset(seed=0)[0] == 7).all() and len(calls) == 1
    demo, = envs.load_demos("", name, 1, episode_steps=2)
    assert (demo["image"] == 7).all() and len(calls) == 4
    assert calls[0][2:] == calls[3][2:]                  # the same camera and detail
    envs.load_demos("", name, 1, episode_steps=2)
    assert len(calls) == 4                               # the second time they come from the cache
    if name == "baoding":                                # but not those of another model
        monkeypatch.setattr(envs, "BAODING_XML", envs.BAODING_XML.replace("0.84 0.49", "0.84 0.4"))
        envs.load_demos("", name, 1, episode_steps=2)
        assert len(calls) == 7


def bad_state_demo(problem):
    """The shipped demonstrations, cut to two of 20 steps, with one problem."""
    demos = stored_demos()
    demos.update({key: demos[key][:2] for key in ("seed", "start", "qpos", "action")})
    demos["qpos"], demos["action"] = demos["qpos"][:, :21].copy(), demos["action"][:, :20].copy()
    if problem == "NaN action":
        demos["action"][1, 5, 2] = np.nan
    elif problem == "NaN qpos":
        demos["qpos"][1, 5, 2] = np.nan
    elif problem == "out of range":
        demos["action"][0, 3, 0] = -1.2
    elif problem == "other action size":
        demos["action"] = demos["action"][:, :, :8]
    elif problem == "wrong qpos shape":
        demos["qpos"] = demos["qpos"][:, :, :25]
    elif problem == "rows do not match":
        demos["action"] = demos["action"][:, :-1]
    elif problem == "wrong dtype":
        demos["action"] = demos["action"].astype(np.int32)
    elif problem == "other environment":
        demos["env"] = np.array("baoding")
    elif problem == "pickled":
        demos["qpos"] = np.array([None, None], object)
    elif problem == "no action":
        del demos["action"]
    elif problem == "no start":
        del demos["start"]
    return demos


@needs_kitchen
@pytest.mark.parametrize("problem", [
    "NaN action", "NaN qpos", "out of range", "other action size", "wrong qpos shape",
    "rows do not match", "wrong dtype", "other environment", "pickled", "no action", "no start",
    "truncated", "too short"])
def test_bad_kitchen_demos_get_one_line(problem, tmp_path, kitchen, monkeypatch):
    """Each kind of damage to a state file is one UserError line that names the file."""
    monkeypatch.setattr(envs, "make_env", lambda name, **options: kitchen)   # making one takes time
    monkeypatch.setattr(type(kitchen), "close", lambda self: None)
    file = tmp_path / "bad.npz"
    np.savez(file, **bad_state_demo(problem))
    if problem == "truncated":
        file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(envs.UserError) as error:
        envs.load_demos(file, "kitchen", min_steps=21 if problem == "too short" else 1)
    assert "\n" not in str(error.value) and "bad.npz" in str(error.value)


@needs_kitchen
def test_fuzzed_kitchen_demos(tmp_path, kitchen, monkeypatch):
    """60 random mistakes in what of a state file is read: one UserError line that names it."""
    monkeypatch.setattr(envs, "make_env", lambda name, **options: kitchen)
    monkeypatch.setattr(type(kitchen), "close", lambda self: None)
    rng, file = np.random.default_rng(0), tmp_path / "bad.npz"
    for case in range(60):
        demos, key = bad_state_demo("none"), str(rng.choice(["qpos", "action"]))
        array = demos[key]
        spoilt, value = array.copy(), rng.choice([np.nan, np.inf, -np.inf])
        spoilt.flat[rng.integers(array.size)] = value
        mistakes = {"missing": None, "rows": array[:, :3], "no episodes": array[:0],
                    "number": spoilt, "one episode": array[0], "turned": array.swapaxes(1, 2),
                    "pickle": array.astype(object),
                    "kind": array.astype(rng.choice(["int16", "U4", "complex64"]))}
        demos[key] = mistakes[str(rng.choice(list(mistakes)))]
        np.savez(file, **{k: v for k, v in demos.items() if v is not None})
        with pytest.raises(envs.UserError) as error:
            envs.load_demos(file, "kitchen")
        assert "\n" not in str(error.value) and "bad.npz" in str(error.value), case


@needs_kitchen
@pytest.mark.stress
@pytest.mark.parametrize("env, measures", [
    ("kitchen", {"eval/tasks": 4}), ("baoding", {"eval/rotation": 75, "eval/dropped": 1})])
def test_simulators_train(env, measures, tmp_path):
    """The whole program on kitchen and baoding: two workers, a few updates, an evaluation, and a
    resume."""
    words = ["--env", env, "--preset", "debug", "--episode-steps", "30", "--steps", "120",
             "--seed-steps", "60", "--pretrain", "5", "--log-every", "5", "--logdir", tmp_path,
             "--device", "cpu", "--threads", "1"]
    answer = command(*words)
    assert answer.returncode == 0, answer.stderr
    assert "GL: " in answer.stdout
    last = metrics(tmp_path)[-1]
    assert last["step"] == 120
    assert all(abs(last[name]) <= most for name, most in measures.items())
    assert command(*words[:7], "180", *words[8:]).returncode == 0
    assert metrics(tmp_path)[-1]["step"] == 180


# ------------------------------------------------------------------------------------ it learns


def test_pretraining_learns(tmp_path):
    """Reconstruction and cloning losses fall far, and the policy predicts what the expert does in
    episodes it has never seen: far better than the best constant action (oracle: their variance).
    """
    c = config(num_demos=100, conv_depth=8, stoch=16, deter=64, hidden=64, members=3, units=64,
               batch=8, length=16, lr=1e-3)
    agent = cmil.Agent(c, 2, cmil.setup_torch(c))
    replay = cmil.Replay(6000, c.length, 2, torch.device("cpu"))
    episodes = envs.point_demos(110)
    for demo in episodes[:100]:
        replay.add(demo["image"], demo["action"], demo=True)
    info = [agent.update(replay, clone=True) for _ in range(500)]
    recon, bc = (np.array([float(i[key]) for i in info]) for key in ("recon", "bc"))
    assert recon[-30:].mean() < .05 * recon[:5].mean()
    assert bc[-30:].mean() < bc[:5].mean() - 1

    image, action = (torch.tensor(np.stack([demo[key] for demo in episodes[100:]], 1))
                     for key in ("image", "action"))     # (T+1, 10, ...)
    with torch.no_grad():
        post = agent.world.rssm.observe(agent.world.encoder(cmil.to_float(image)), action)
        s, a = cmil.state_action_pairs(post.feat, action)
        error = ((agent.actor(s).mode - a) ** 2).sum()
    variance = ((a - a.mean((0, 1))) ** 2).sum()
    # .34 to .38 over training seeds; the speed an expert drew for its episode cannot be seen at
    # once. (With 10 demonstrations, and for each action alone, .34 to .61: a matter of luck.)
    assert error < .45 * variance


def test_actor_and_critics_climb_a_fixed_reward():
    """Where the reward is the first action, whatever the state, and nothing else pulls, the policy
    learns to push the first action to its limit of 1 (a random policy's mean is about 0)."""
    agent, replay = agent_and_replay(beta=0., alpha=0., lr=1e-3)
    agent.disc = lambda s, a, sigma=0.: a[..., 0]
    agent.apply = lambda losses, info: cmil.Agent.apply(agent, {
        name: loss for name, loss in losses.items() if name != "disc"}, info)
    rewards = [float(agent.update(replay)["reward"]) for _ in range(150)]
    assert abs(np.mean(rewards[:5])) < .2 and np.mean(rewards[-5:]) > .7, rewards


@pytest.mark.stress
def test_cmil_beats_its_own_start_on_point(tmp_path):
    """The small preset's run on the pixel point task (minutes on two cores): far more evaluation
    episodes succeed than after cloning alone."""
    words = ["--env", "point", "--preset", "small", "--seed", "3", "--logdir", tmp_path,
             "--eval-every", "6000", "--eval-episodes", "50", "--device", "cpu"]
    subprocess.run([sys.executable, HERE / "cmil.py", *map(str, words)], check=True, cwd=HERE)
    success = [line["eval/success"] for line in metrics(tmp_path) if "eval/success" in line]
    assert success[-1] > success[0] + .25, success


# ------------------------------------------------------------------------------------ the README


def test_lines_named_in_the_readme():
    """Each line of cmil.py that the README links to still holds what the link says."""
    source = (HERE / "cmil.py").read_text().splitlines()
    links = re.findall(r"\[`([^`]+)`\]\(cmil\.py#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 20
    wrong = [(text, line) for text, line in links if text not in source[int(line) - 1]
             or text.startswith(("def ", "class ")) != source[int(line) - 1].strip().startswith(
                 ("def ", "class "))]
    assert not wrong


def test_the_readme_explains_what_is_logged(uninterrupted):
    """Each name in metrics.jsonl has its row in the table (grad/* stands for all of them)."""
    text = (HERE / "README.md").read_text()
    names = {name for line in metrics(uninterrupted[0], clock=()) for name in line}
    assert {"recon", "eval/success", "grad/actor", "ups"} <= names
    every = dict.fromkeys(("success", "n_tasks", "rotation", "error", "dropped"), [0])
    names |= {f"{when}/{name}" for when in ("eval", "train") for name in envs.outcome(every)}
    assert not [name for name in names
                if f"`{'grad/*' if name.startswith('grad/') else name}`" not in text]


# ------------------------------------------------------------------------------------ baoding


@needs_kitchen
def test_baoding_passes_gymnasiums_checks(hand):
    """gymnasium's own check_env; spaces, facts and infos of the contract; it is registered."""
    from gymnasium.utils.env_checker import check_env
    check_env(hand, skip_render_check=True)
    assert hand.action_space.shape == (20,) and hand.model.nu == 20 and hand.model.njnt == 24 + 2
    assert hand.episode_steps == 75 and hand.SUBSTEPS * hand.model.opt.timestep == pytest.approx(.1)
    env = gym.make("cmil/Baoding-v0", episode_steps=5)
    image, info = env.reset(seed=0)
    assert image.shape == (64, 64, 3) and image.std() > 20
    assert info["rotation"] == info["error"] == 0 and info["dropped"] is False
    assert info["tasks"] == () and not info["success"]
    ends = [env.step(np.zeros(20, np.float32))[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]
    env.close()


@needs_kitchen
def test_baoding_reset_is_a_fresh_start(hand):
    """reset(seed) after part of an episode equals a fresh hand, bit for bit; seeds differ."""
    fresh, policy = envs.make_env("baoding"), random_policy(20, 1)
    hand.reset(seed=3)
    for t in range(10):
        hand.step(policy(t))
    results = []
    for env in (hand, fresh):
        policy, images = random_policy(20, 2), [env.reset(seed=7)[0]]
        images += [env.step(policy(t))[0] for t in range(5)]
        results.append((np.stack(images), env.data.qpos.copy(), env._info()))
    fresh.close()
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1]) and results[0][2] == results[1][2]
    hand.reset(seed=8)
    first = hand.data.qpos.copy()
    hand.reset(seed=9)
    assert np.abs(first - hand.data.qpos)[hand._hand].std() > .005       # the start is wide
    assert np.abs(hand.balls_in(first) - hand.balls_in(hand.data.qpos)).max() > 5e-4
    away = np.linalg.norm(hand.balls_in(hand.data.qpos)[:, :2] - hand.targets(0), axis=1)
    assert (away > .018).all() and (away < .03).all()  # m from the balls


@needs_kitchen
def test_holding_still_and_flailing_fail(dark):
    """Zero actions keep the balls and turn nothing; random ones drop them, and the episode goes on.
    """
    env = envs.make_env("baoding")
    for seed in range(3):
        _, infos, ends = episode(env, seed, lambda t: np.zeros(20, np.float32))
        assert not infos[-1]["dropped"] and abs(infos[-1]["rotation"]) < .1
        assert not infos[-1]["success"] and ends[:, 1].tolist() == [False] * 74 + [True]
        _, infos, ends = episode(env, seed, random_policy(20, seed))
        assert [info["dropped"] for info in infos].index(True) < 30 and infos[-1]["dropped"]
        assert not any(info["success"] for info in infos) and len(ends) == 75
    env.close()


def rolled(env, turns, radius=1.0, lowest=.16, ball=1, phase=0.0, aside=0.0):
    """Positions (76, nq) of balls that go round the targets' ellipse, scaled by `radius`, at an
    even pace and clockwise from `phase` on; `ball` is at height `lowest` in row 40, and from row 1
    on the first is so many metres `aside`."""
    qpos = np.tile(env.model.qpos0, (76, 1))
    angle = phase - 2 * np.pi * turns * np.arange(76) / 75
    for i, half in zip(env._balls, (0, np.pi)):
        qpos[:, i] = env.CENTRE[0] + radius * env.AXES[0] * np.cos(angle + half)
        qpos[:, i + 1] = env.CENTRE[1] + radius * env.AXES[1] * np.sin(angle + half)
        qpos[:, i + 2] = .16
    qpos[40, env._balls[ball] + 2] = lowest
    qpos[1:, env._balls[0]] += aside
    return qpos


def turned(turns, phase=0.0):
    """Turns, seen from its centre, of a point on the ellipse whose parameter makes `turns`."""
    angle = phase - 2 * np.pi * np.linspace(0, turns, 9999)
    angle = np.unwrap(np.arctan2(.036 * np.sin(angle), .02 * np.cos(angle)))
    return (angle[0] - angle[-1]) / (2 * np.pi)


@needs_kitchen
@pytest.mark.parametrize("case, turns, error, dropped, success", [
    (dict(turns=1.25), 1.25, 0, False, True),                # on the targets all the time
    (dict(turns=1.25, lowest=.101), 1.25, 0, False, True),
    (dict(turns=1.25, phase=.7), turned(1.25, .7), 0, False, True),  # from where the balls are
    (dict(turns=1.25, aside=.01), None, .005, False, True),  # the mean over both balls
    (dict(turns=1.25, aside=1.), None, .05, False, False),   # at most .1 m each
    (dict(turns=1.25, lowest=.099), turned(.65), 0, True, False),    # out of the hand in row 40
    (dict(turns=1.25, lowest=.099, ball=0), turned(.65), 0, True, False),
    (dict(turns=-1.25), -1.25, None, False, False),          # the other way round
    (dict(turns=1.05), turned(1.05), None, False, False),    # 1.084: too few, though near
    (dict(turns=1.25, radius=1.6), 1.25, .0174, False, True),
    (dict(turns=1.25, radius=1.75), 1.25, .0217, False, False)])         # too far from the targets
def test_what_counts_as_turning_the_balls(hand, case, turns, error, dropped, success):
    """Rotation (up to a drop), error, drop and success of made-up trajectories, known in advance.

    The mean distance to the targets of balls on an ellipse r times as large is r - 1 times the mean
    distance of the ellipse from its centre, here over 75 evenly spaced parameters.
    """
    qpos = rolled(hand, **case)
    hand._begin(qpos[0])
    for row in qpos[1:]:
        hand._follow(row)
    info, before = hand._info(), copy.deepcopy(vars(hand).get("_errors"))
    done = hand.tasks_in(rolled(hand, 1.25)[:40]) or hand.tasks_in(qpos)
    assert hand._info() == info and hand._errors == before               # an episode goes on
    assert turns is None or info["rotation"] == pytest.approx(turns, abs=1e-6)
    assert info["dropped"] == dropped
    if error is not None:
        assert info["error"] == pytest.approx(error, abs=2e-4)
    assert done == (("turn",) if success else ()) and info["success"] == success


@needs_kitchen
def test_the_reward_of_baoding(dark):
    """1 for a step with both balls within 25 mm of their targets and none dropped: demonstrations
    nearly always, stillness hardly ever."""
    demos, env = stored_demos("baoding"), envs.make_env("baoding")
    for aside, lowest, reward in ((.024, .16, 1), (.026, .16, 0), (0, .099, 0), (0, .101, 1)):
        env.reset(seed=0)
        rows = rolled(env, 1.25, aside=aside)
        rows[1, env._balls[1] + 2] = lowest
        env._begin(rows[0])

        def place(action):
            env.data.qpos[:] = rows[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(env, "_simulate", place)
            assert env._step(np.zeros(20)) == reward
    for action, low, high in ((demos["action"][0], 55, 75), (np.zeros((75, 20)), -1, 20)):
        env.reset(seed=int(demos["seed"][0]))
        assert low < sum(env.step(a)[1] for a in action) <= high
    env.close()


@needs_kitchen
def test_a_demonstration_cannot_be_repeated_blindly(dark):
    """Other starts, and other noise on the actions, need other actions."""
    demos, env = stored_demos("baoding"), envs.make_env("baoding")
    solved = []
    for i in range(6):
        env.reset(seed=90_000 + i)
        infos = [env.step(action)[4] for action in demos["action"][i]]
        solved.append(infos[-1]["success"])
    env.close()
    assert sum(solved) <= 3, solved


@needs_kitchen
def test_baoding_adds_noise_to_actions(hand, monkeypatch):
    """What the joints are told is the action and noise of std .05, clipped to [-1, 1]; it is drawn
    anew at each step and for each seed."""
    told = calls_of(monkeypatch, hand, "_simulate", lambda real, action: None)
    action, noises = np.full(20, .3), []
    action[0] = 1
    for seed in (0, 1):
        hand.reset(seed=seed)
        told.clear()
        for _ in range(200):
            hand._step(action)
        noises.append(np.array(told)[:, 0] - action)                     # (200, 20)
    noise, other = noises
    assert abs(noise[:, 1:].std() - .05) < .003 and abs(noise[:, 1:].mean()) < .004
    assert noise[:, 0].max() == 0 > noise[:, 0].min()                    # never above 1
    assert not np.allclose(noise[0], noise[1]) and not np.allclose(noise[0], other[0])


@needs_kitchen
@pytest.mark.parametrize("steps", [10, 25, 36, 60, 75])
def test_what_is_commanded_of_a_shorter_episode(dark, steps):
    """Balls on their targets succeed at any length, those at four fifths of their pace never do;
    in 75 steps 1.1 turns are asked for. Oracle: the turns of a finely cut path."""
    env = envs.make_env("baoding", episode_steps=steps)
    assert env.commanded(steps) == pytest.approx(turned(steps / 60), abs=1e-6)
    path = rolled(env, 1.25)[:steps + 1]
    assert env.tasks_in(path) == ("turn",)
    slow = np.stack([[np.interp(.8 * k, range(76), column) for column in rolled(env, 1.25).T]
                     for k in range(steps + 1)])
    assert turned(.8 * steps / 60) < .88 * turned(steps / 60) and env.tasks_in(slow) == ()
    assert .88 * env.commanded(75) == pytest.approx(1.1)
    env.close()


@needs_kitchen
def test_baoding_targets(hand):
    """They start along the balls' line, lie opposite each other and come back after 60 steps."""
    hand._begin(rolled(hand, 1.25)[0])
    first = hand.targets(0)
    assert np.allclose(first, hand.balls_in(rolled(hand, 1.25)[0])[:, :2])
    assert np.allclose(first.mean(0), hand.CENTRE) and np.allclose(hand.targets(60), first)
    quarter = hand.targets(np.array([0, 15]))[:, 0] - hand.CENTRE                    # (2, 2)
    assert np.allclose(quarter[1] / hand.AXES, [[0, 1], [-1, 0]] @ (quarter[0] / hand.AXES))


@needs_kitchen
def test_baoding_actions_are_joint_targets(hand):
    """Zero is HAND_POSE; +-1 stay inside the actuators' ranges, nine tenths of the way to them."""
    names = [hand.model.actuator(i).name.replace("robot0:A_", "") for i in range(20)]
    zero = hand.control(np.zeros(20))
    assert np.allclose(zero, [envs.HAND_POSE[name] for name in names])
    low, high = hand.model.actuator_ctrlrange.T
    for sign, end in ((1, high), (-1, low)):
        assert np.allclose(hand.control(np.full((3, 20), sign)) - zero, .9 * (end - zero))


@pytest.fixture
def maker(monkeypatch):
    """demos/make_baoding.py as a module."""
    monkeypatch.syspath_prepend(HERE / "demos")
    import make_baoding
    return make_baoding


@needs_kitchen
def test_the_baoding_expert_is_deterministic(maker, dark):
    """A seed fixes its episode, whatever the number of threads; another seed's is another."""
    env, search = envs.make_env("baoding", episode_steps=3), maker.Search(8, 3)
    played = [maker.episode(env, seed, search, maker.Pool(env.model, threads))[0]
              for seed, threads in ((0, 1), (0, 2), (1, 1))]
    env.close()
    assert np.array_equal(played[0]["action"], played[1]["action"])
    assert np.array_equal(played[0]["qpos"], played[1]["qpos"])
    assert not np.array_equal(played[0]["action"], played[2]["action"])
    assert played[0]["action"].shape == (3, 20) and np.abs(played[0]["action"]).max() <= 1


@needs_kitchen
def test_the_baoding_experts_noise(maker, hand):
    """Sample 0 has none; steps correlate by .4; its std is sigma times the mean square scale."""
    search = maker.Search(samples=4000, horizon=4, sigma=.5)
    noise = maker.Expert(hand, search, np.random.default_rng(0), None).noise()     # (N, H, 20)
    assert not noise[0].any() and noise[1:].any(axis=(1, 2)).all()
    low, high = maker.SCALE
    expected = .25 * (high**2 - low**2) / (2 * math.log(high / low))     # E[(sigma e^U)^2]
    variance = (noise[1:] ** 2).mean((0, 2))                             # (H,)
    assert np.allclose(variance, expected, rtol=.05)
    assert (noise[1:, :-1] * noise[1:, 1:]).mean() == pytest.approx(.4 * expected, rel=.05)


@needs_kitchen
def test_what_the_demonstrations_are_worth(dark, capsys):
    """results/baoding_demos.py: it plays the file's own episodes, and its clone fits what it saw.
    """
    worth, stored = script("baoding_demos"), stored_demos("baoding")
    env, two = envs.make_env("baoding"), {key: stored[key][:2] for key in ("seed", "action")}
    seen, action = worth.as_shipped(env, two)
    assert np.array_equal(action, two["action"]) and seen.shape == (2, 75, env.model.nq + 36)
    assert np.abs(seen[:, :, :env.model.nq] - stored["qpos"][:2, :-1]).max() < 1e-6
    policy = worth.fit(seen, action, 0, steps=500)
    assert np.square(policy(seen) - action).mean() < .1 * action.var(1).mean()
    infos = [worth.play(env, seed, tape) for seed, tape in zip(two["seed"].tolist(), action)]
    worth.tell("x", infos, seed=3)
    line = json.loads(capsys.readouterr().out)
    assert line["success"] == 1 and line["rotation"] > 1.1 and (line["seed"], line["episodes"]) == (
        3, 2)
    env.close()


@needs_kitchen
def test_the_baoding_expert_looks_ahead_in_the_same_simulator(maker, hand):
    """Where its plans end up is where the environment's own steps would, without noise."""
    hand.reset(seed=0)
    expert = maker.Expert(hand, maker.Search(3, 4), np.random.default_rng(0),
                          maker.Pool(hand.model, 1))
    plans = np.clip(expert.plan + expert.noise(), -1, 1)                 # (N, H, 20)
    found = expert.simulate(plans, hand.data)                            # (N, H, 2, 3)
    for n in range(3):
        hand.reset(seed=0)
        for h in range(4):
            hand._simulate(plans[n, h])
            assert np.abs(hand.balls_in(hand.data.qpos) - found[n, h]).max() < 1e-9
    assert np.abs(found[0] - found[1]).max() > 1e-5


@needs_kitchen
def test_one_search_of_the_baoding_expert(maker, hand, monkeypatch):
    """The plan is pulled to the reference, the new one is the mean of the samples by weight; its
    first action is executed (never below 0 for a joint that starts at its limit) and it moves on by
    one step. Oracle: the rule of the file's head, in loops, on given noise and costs."""
    search = maker.Search(samples=30, horizon=3, pull=.25)
    reference = np.linspace(-.4, .4, 5)[:, None] * np.ones(20)
    expert = maker.Expert(hand, search, np.random.default_rng(0), None, reference)
    assert np.array_equal(expert.plan, reference[:3])
    noise = np.random.default_rng(1).normal(size=(30, 3, 20)) * .3
    cost = np.random.default_rng(2).uniform(1, 3, 30)
    monkeypatch.setattr(expert, "noise", lambda: noise)
    monkeypatch.setattr(expert, "simulate", lambda plans, data: None)
    monkeypatch.setattr(expert, "cost", lambda t, plans, balls: cost)
    pulled = .75 * reference[:3] + .25 * reference[[3, 4, 4]]            # at t = 3: its end goes on
    samples = np.clip(pulled + noise, -1, 1)
    temperature = .5 * (np.quantile(cost, .1) - cost.min())
    weight = [math.exp(-(x - cost.min()) / temperature) for x in cost]
    plan = sum(w * sample for w, sample in zip(weight, samples)) / sum(weight)
    action = expert.act(3, None)
    rests = {hand.model.actuator(i).name.replace("robot0:A_", "") for i in range(20)
             if expert.least[i] == 0}
    assert rests == {"MFJ2", "LFJ2", "LFJ4"}
    assert action.dtype == np.float32
    assert np.allclose(action, [max(a, 0) if least == 0 else a
                                for a, least in zip(plan[0], expert.least)], atol=1e-6)
    assert np.allclose(expert.plan, plan[[1, 2, 2]])


@needs_kitchen
def test_the_baoding_experts_cost(maker, hand):
    """Against its terms written out for one step of one sample: distances in units of 2 cm, the
    line's angle, a low ball, a lost ball, change of action, deviation from the reference."""
    hand.reset(seed=0)
    search = maker.Search(samples=2, horizon=2, near=.5, smooth=2.)
    expert = maker.Expert(hand, search, np.random.default_rng(0), None, np.full((5, 20), .1))
    expert.last = np.full(20, .3)
    target = hand.targets(np.array([4, 5]))                              # after steps 3 and 4
    balls = np.full((2, 2, 2, 3), .15)
    balls[..., :2] = target
    balls[1, 1, 0, :2] = target[1, 1]                                    # swapped: half a turn off
    balls[1, 1, 1, :2] = target[1, 0]
    balls[1, 1, 0, 2] = .07                                              # and one has fallen
    plans = np.zeros((2, 2, 20))
    plans[1, 1] = .5
    apart = np.linalg.norm(target[1, 0] - target[1, 1])
    steps = [[2 * .3**2 + .5 * .1**2, .5 * .1**2],
             [2 * .3**2 + .5 * .1**2, 2 * apart / .02 + 1.5 * math.pi + .04 / .005 + 20
              + 2 * .5**2 + .5 * .4**2]]
    expected = [(first + 2 * last) / 3 for first, last in steps]
    assert np.allclose(expert.cost(3, plans, balls), expected)


@needs_kitchen
def test_smoothing_keeps_a_steady_action(maker):
    """The mean of episodes; a constant stays; a single peak is spread by a kernel of sum 1."""
    actions = np.zeros((2, 9, 1))
    actions[0] = 1
    assert np.allclose(maker.smoothed(actions), .5)
    peak = np.zeros((1, 9, 1))
    peak[0, 4] = 1
    spread = maker.smoothed(peak)[:, 0]
    assert spread.sum() == pytest.approx(1) and spread[4] == spread.max() < .8
    assert spread[3] / spread[4] == pytest.approx(math.exp(-.5 / .7**2))
