"""Three more methods: bc, ditto, pdac. This file also shows how to add a method.

    python experiments/baselines.py --algo bc --env point      the flags of cmil.py

A method is a subclass of cmil.Learner: it assigns networks, calls set_up(), and defines
`losses(replay)` or `clone_losses(replay)`, and `act`. An entry in cmil.METHODS adds it.

SOURCES  [T] DITTO: DeMoss et al. 2023, arXiv 2302.03086
         [A] DAC: Kostrikov et al. 2019, arXiv 1809.02925
         [Q] DrQ-v2: Yarats et al. 2022, arXiv 2107.09645
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cmil  # noqa: I001  one folder up; before torch, for it sets how OpenMP waits
import torch
from torch import nn


class Ditto(cmil.Agent):
    """ditto: no discriminator; imagined states should match the expert's step by step [T].

    row t        0       1       2       3        H = 3 steps from rows 0 ... L-H-1 of a window
    expert   z0 = s0     z1      z2      z3       posterior deter: what [T]'s code compares
    dream        s0 ->   s1 ->   s2 ->   s3       the policy, in the model
    reward      [r0]    [r1]    [r2]              r_t = match(s_{t+1}, z_{t+1})

    Departures from [T]: world model and policy learn together after pretraining; the actor's
    gradient goes through the dynamics; gamma, H, networks are CMIL's; rates fall; D is unused."""

    @staticmethod
    def check(c):
        if not c.offline or c.reward == "none" or c.horizon >= c.length:
            cmil.die("--algo ditto needs --offline, a --reward, --horizon below --length")

    def losses(self, replay):
        c, world, H = self.c, self.world, self.c.horizon
        image, action = replay.sample(c.batch, demo_share=1)  # (L, B, ...)
        image, starts = cmil.to_float(image), len(action) - H
        with self.autocast():
            post = world.rssm.observe(world.encoder(image), action)
            world_loss, info = cmil.world_model_loss(world, image, post, c)  # [P1]
            post = post.map(lambda x: x.detach())
            steps = [post.deter[t:t + starts].flatten(0, 1) for t in range(1, H + 1)]
            expert = torch.stack(steps)  # (H, N, D), N = (L-H) B
            start = post.map(lambda x: x[:starts].flatten(0, 1))
            first_action = action[:starts].flatten(0, 1)
            dream = cmil.imagine(world.rssm, self.actor, start, first_action, H)
            reward = match(dream.feat[1:, :, c.stoch:], expert)  # (H, N)
            _, returns = cmil.target_values(self.targets, dream, reward, c)
            q_loss, q_info = cmil.model_critic_loss(self.critics, returns, dream, c)  # [W7]
            pi_loss, pi_info = cmil.actor_loss(self.critics, dream, reward, c)  # [W6]
        losses = {"world": world_loss, "critics": q_loss, "actor": pi_loss}
        return losses, {**info, **q_info, **pi_info}

def match(x, y):
    """[T] eq. 8: <x, y> / max(|x|, |y|)^2; 1 where x = y: (..., D) twice -> (...)"""
    largest = torch.maximum(x.square().sum(-1), y.square().sum(-1)).clamp(min=1e-12)
    return (x * y).sum(-1) / largest

class PixelAgent(cmil.Learner):
    """bc, pdac: no model; policy(frames) of the last FRAMES frames (N, 3 FRAMES, 64, 64)."""

    @torch.no_grad()
    def act(self, image, carry=None, sample=True):
        """As Agent.act; carry: the last frames (at the start, copies of the first)."""
        frame = cmil.to_float(torch.as_tensor(image, device=self.device))  # (N, 3, 64, 64)
        past = frame.repeat(1, self.FRAMES, 1, 1) if carry is None else carry
        frames = torch.cat([past[:, 3:], frame], 1)
        with self.autocast():
            policy = self.policy(frames)
        action = policy.rsample() if sample else policy.mode
        return action.cpu().numpy(), frames

class PixelBC(PixelAgent):
    """bc: pi(a_t|x_t) by maximum likelihood on the demonstrations, end to end; "BC" of [P], which
    gives no details. Networks and rates are CMIL's."""
    FRAMES = 1

    def __init__(self, c, action, device):
        super().__init__(c)
        encoder = cmil.Encoder(c.conv_depth)
        actor = cmil.Actor(encoder.size, action, c)
        self.policy = nn.Sequential(encoder, actor)
        self.set_up(device)

    @staticmethod
    def check(c):
        if c.reward != "none" or not c.offline:
            cmil.die("--algo bc needs --offline and --reward none")

    def clone_losses(self, replay):
        image, action = replay.sample(self.c.batch, demo_share=1)  # (L, B, ...)
        with self.autocast():
            x, a = cmil.state_action_pairs(cmil.to_float(image), action)
            loss = cmil.negative_log_prob(self.policy(x), a, self.c)
        return {"policy": loss}, {"bc": loss}

class PixelDAC(PixelAgent):
    """pdac: discriminator-actor-critic from pixels without a model, the baseline of [P].

    From [A]: D's logit as reward, gradient penalty 10. From [Q]: shifts of 4 pixels, stacks, 3-step
    returns, an embedding of 50, targets that follow at a rate of .01, Adam with lr 1e-4 and
    eps 1e-8, samples with gradient 1, a std that falls from 1 to .1 (here in half of the run).
    Departures: D, actor, targets see the critics' embedding ([Q]: a trunk each); the normal is
    truncated ([Q]: clamped, its noise clipped at .3); the output before tanh is kept small; sizes,
    batches, gamma, seed rounds, decay, D's rate: CMIL's; equal lengths: no absorbing state.

    row t        0    1    2    3    4    5       n = 3
    stacks     [x0   x1   x2]  and  [x3 x4 x5]    embed e2 and e5: a stack stands at its last row
    rewards                r2   r3   r4           r_t = D's logit of (e_t, a_t)
    target     y2 = r2 + g r3 + g^2 r4 + g^3 min_i Qbar_i(e5, a'),  a' ~ pi(.|e5)"""
    FRAMES, STEPS, PENALTY, EMBED, TAU, SMALL = 3, 3, 10.0, 50, 0.01, 0.01

    def __init__(self, c, action, device):
        super().__init__(c)
        layers = cmil.Encoder(c.conv_depth, 3 * self.FRAMES)
        encoder = nn.Sequential(
            layers, nn.Linear(layers.size, self.EMBED), nn.LayerNorm(self.EMBED), nn.Tanh())
        heads = cmil.Critics(c.critics, self.EMBED, action, c.units, c.layers)
        self.critics = nn.ModuleDict({"encoder": encoder, "heads": heads})
        self.actor = ScheduledActor(self.EMBED, action, c)
        self.disc = cmil.Discriminator(self.EMBED, action, c.disc_units, c.disc_layers)
        self.set_up(device, targets=heads)

    @staticmethod
    def check(c):
        offline = c.offline or c.reward == "none"
        if offline or c.length < 6 or c.pretrain or not c.seed_steps:
            cmil.die("--algo pdac needs --no-offline, a --reward, --length 6 or more, "
                     "--pretrain 0 and --seed-steps above 0")

    def policy(self, frames):
        return self.actor(self.critics.encoder(frames))

    def move_targets(self):
        super().move_targets(self.TAU)
        half = (self.c.steps - self.c.seed_steps) * self.c.train_ratio / 2  # updates
        self.actor.std.fill_(max(0.1, 1 - 0.9 * self.updates / half))

    def embed(self, image, action):
        """Windows of the replay -> embed (L-2, B, 50) of shifted stacks; action (L-2, B, A)."""
        image, rows = cmil.to_float(image), len(image) - self.FRAMES + 1
        stacks = torch.cat([image[i:i + rows] for i in range(self.FRAMES)], 2)  # (L-2, B, 9, ...)
        shifted = random_shift(stacks.flatten(0, 1)).unflatten(0, stacks.shape[:2])
        return self.critics.encoder(shifted), action[self.FRAMES - 1:]

    def losses(self, replay):
        c = self.c
        played = replay.draw(replay.n_demo_starts, replay.n_starts, c.batch)  # not the demos
        with self.autocast():
            embed, action = self.embed(*played)
            with torch.no_grad():
                expert = cmil.state_action_pairs(*self.embed(*replay.sample(c.batch, demo_share=1)))
            e = embed.detach()
            policy = cmil.state_action_pairs(e, action)  # (L-3, B, ...)
            disc_loss, info = cmil.discriminator_loss(self.disc, expert, policy, 0)  # [P8]
            penalty = gradient_penalty(self.disc, expert, policy)

            pi = self.actor(e)
            with torch.no_grad():
                reward = cmil.imitation_reward(self.disc, *policy, c)  # (L-3, B)
                value = self.targets(e, pi.rsample()).min(0).values  # (L-2, B)
                target = n_step_target(reward, value, c.gamma, self.STEPS)  # (L-2-n, B)
            s, a = cmil.state_action_pairs(embed, action)
            q = self.critics.heads(s[:len(target)], a[:len(target)])  # (m, L-2-n, B)
            q_loss = (q - target).square().mean((1, 2)).sum()

            pi_value = self.critics.heads(e, pi.rsample()).min(0).values  # (L-2, B)
            output = self.actor.layers(e)  # far from 0, tanh has no slope
            pi_loss = self.SMALL * output.square().sum(-1).mean() - pi_value.mean()
        losses = {"critics": q_loss, "actor": pi_loss, "disc": disc_loss + self.PENALTY * penalty}
        return losses, {**info, "reward": reward.mean(), "critic/data": q_loss,
                        "critic/value": target.mean(), "entropy": pi.entropy().mean()}

class ScheduledActor(nn.Module):
    """pi(a|x) of [Q]: a truncated normal whose std is set from outside."""
    def __init__(self, inputs, action, c):
        super().__init__()
        self.sample_grad = c.sample_grad
        self.layers = cmil.mlp(inputs, c.units, c.layers, action)
        self.register_buffer("std", torch.ones(()))  # CUDA graphs see it change

    def forward(self, x):
        loc = torch.tanh(self.layers(x).float())
        return cmil.TruncatedNormal(loc, self.std.expand_as(loc), self.sample_grad)

def n_step_target(reward, value, gamma, n):
    """y_t = sum_{k<n} g^k r_{t+k} + g^n v_{t+n}: reward (T-1, B), value (T, B) -> (T-n, B)"""
    return gamma**n * value[n:] + sum(gamma**k * reward[k:k + len(value) - n] for k in range(n))

def gradient_penalty(disc, expert, policy):
    """mean (|d logit / d (s, a)| - 1)^2 on random mixtures of expert and policy pairs [A]."""
    expert, policy = torch.cat(expert, -1), torch.cat(policy, -1)
    mix = torch.lerp(policy, expert, torch.rand_like(expert[..., :1])).requires_grad_()
    grad, = torch.autograd.grad(disc.layers(mix).float().sum(), mix, create_graph=True)
    return (grad.norm(dim=-1) - 1).square().mean()

def random_shift(x, pad=4):
    """Move each of x (N, C, 64, 64) by up to `pad` pixels both ways; edges are repeated [Q]."""
    N, size = len(x), x.shape[-1]
    offset = torch.randint(-pad, pad + 1, (2, N, 1), device=x.device)
    rows, columns = (offset + torch.arange(size, device=x.device)).clamp(0, size - 1)  # (N, 64)
    index = torch.arange(N, device=x.device)[:, None, None], rows[:, :, None], columns[:, None]
    return x.movedim(1, -1)[index].movedim(-1, 1)

cmil.METHODS.update({
    "bc": (PixelBC, dict(reward="none", offline=True)),
    "ditto": (Ditto, dict(members=1, beta=0.0, offline=True, lr_decay=0.5)),
    "pdac": (PixelDAC, dict(pretrain=0, target_every=1, lr=1e-4, adam_eps=1e-8,
                            sample_grad="released")),
})

if __name__ == "__main__":
    cmil.main()
