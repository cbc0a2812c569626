"""Where the time of one update goes: seconds and share of each kind of operation.

    python results/profile_update.py --preset paper [any other flag of cmil.py]

Runs on random frames, so it needs no environment: the update's cost does not depend on the data.
"""
import json
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import cmil  # noqa: E402

# Kind of operation -> what its name contains; the first that fits counts.
KINDS = {"convolutions": ("conv",), "matrix products": ("mm", "linear"),
         "optimizers": ("adam", "foreach"), "random numbers": ("normal_", "rand", "uniform_"),
         "copies and casts": ("copy", "cat", "stack", "index", "select", "clone", "fill", "zero")}


def main():
    explicit, _ = cmil.parse(sys.argv[1:])
    c = cmil.make_config({"logdir": "unused", **explicit})
    device = cmil.setup_torch(c)
    torch.manual_seed(0)
    actions = 9
    agent, replay = cmil.Agent(c, actions, device), cmil.Replay(2000, c.length, actions, device)
    for i in range(5):
        replay.add(torch.randint(256, (300, 64, 64, 3), dtype=torch.uint8),
                   torch.rand(300, actions) * 2 - 1, demo=i < 2)
    agent.update(replay)                                                    # warm-up
    start = time.perf_counter()
    agent.update(replay)
    plain = time.perf_counter() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        agent.update(replay)
    seconds = dict.fromkeys([*KINDS, "element by element and the rest"], 0.0)
    for event in profile.key_averages():
        kind = next((k for k, parts in KINDS.items() if any(p in event.key.lower() for p in parts)),
                    "element by element and the rest")
        seconds[kind] += event.self_cpu_time_total / 1e6
    total = sum(seconds.values())
    for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{kind:34s} {value:7.3f} s  {value / total:5.0%}")
    print(json.dumps({"preset": c.preset, "seconds_per_update": round(plain, 3),
                      "threads": torch.get_num_threads(), "precision": c.precision}))


if __name__ == "__main__":
    main()
