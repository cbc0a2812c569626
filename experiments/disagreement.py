import sys, json; sys.path.insert(0, ".")
import numpy as np, torch, cmil, demonstrations, envs
def main(run, N=60):
    a = cmil.load_policy(run); c = a.c; H = c.horizon; torch.manual_seed(0)
    A = a.action_size
    demos = demonstrations.load_demos(c.demos, c.env, c.num_demos, min_steps=c.length-1, **cmil.env_options(c))
    rep = cmil.Replay(sum(len(d["image"]) for d in demos), len(demos[0]["image"]), A, a.device)
    for d in demos: rep.add(d["image"], d["action"], demo=True)
    rssm = a.world.rssm
    def posts(images, actions):  # (T+1, B, ...)
        images = torch.as_tensor(images); actions = torch.as_tensor(actions)
        emb = torch.stack([a.world.encoder(cmil.to_float(x)) for x in images])
        return rssm.observe(emb, actions)
    out = {}
    with torch.no_grad():
        img = np.stack([d["image"] for d in demos], 1); act = np.stack([d["action"] for d in demos], 1)
        post = posts(img, act); act = torch.as_tensor(act)
        T = len(act) - 1
        # starts 4..T-H
        rows = list(range(4, T - H, max(1, (T - H) // 12)))
        def roll(chooser):
            us = []
            state = post.map(lambda x: torch.cat([x[t] for t in rows]))
            for h in range(H):
                state, u = rssm.step_prior(state, chooser(h, state)); us.append(u.mean().item())
            return us
        out["expert"] = roll(lambda h, s: torch.cat([act[t + 1 + h] for t in rows]))
        out["policy"] = roll(lambda h, s: a.actor(s.feat).rsample())
        out["random"] = roll(lambda h, s: torch.rand(len(s.deter), A) * 2 - 1)
        corner = torch.sign(torch.rand(len(rows) * len(demos), A) - .5)
        out["corner"] = roll(lambda h, s: corner)
        # real states under random / held random actions
        vec = envs.make_vec(c.env, 1, **cmil.env_options(c))
        for name in ("random", "held"):
            ims, acs = [], []
            for s in range(4):
                im, _ = vec.reset(seed=[900 + s]); I = [im[0].copy()]; Ac = [np.zeros(A, np.float32)]
                rng = np.random.default_rng(s)
                for t in range(T):
                    if name == "random" or t % 10 == 0: x = rng.uniform(-1, 1, (1, A)).astype(np.float32)
                    vec.step_async(x); im, *_ = vec.step_wait(); I.append(im[0].copy()); Ac.append(x[0])
                ims.append(np.stack(I)); acs.append(np.stack(Ac))
            p = posts(np.stack(ims, 1), np.stack(acs, 1)); ac = torch.as_tensor(np.stack(acs, 1))
            st = p.map(lambda x: x[5:-1].flatten(0, 1))
            _, u = rssm.step_prior(st, ac[6:].flatten(0, 1))
            out["states_" + name] = u.mean().item()
            _, u = rssm.step_prior(st, a.actor(st.feat).rsample()); out["states_" + name + "_policy"] = u.mean().item()
        envs.close(vec)
        st = post.map(lambda x: x[5:-1].flatten(0, 1)); _, u = rssm.step_prior(st, act[6:].flatten(0, 1)); out["states_demo"] = u.mean().item()
    print(run, {k: [round(1e3 * x, 1) for x in v][::max(1,H//4)] if isinstance(v, list) else round(1e3 * v, 1) for k, v in out.items()}, flush=True)
for r in sys.argv[1:]: main(r)
