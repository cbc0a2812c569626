"""Where the time of one update goes: each kind of operation's share, and the floor below them.

    python results/profile_update.py --preset paper [any other flag of cmil.py]

The floor: the multiplications and additions of the update's products and convolutions at the rate
of one large matrix product here, and the bytes of everything else at the rate of one large copy.
"""
import collections
import json
import pathlib
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path[:0] = map(str, pathlib.Path(__file__).parents[:2])
import bench  # noqa: E402
import cmil  # noqa: E402

# Kind of operation -> what its name contains; the first that fits counts.
KINDS = {"convolutions": ("conv",), "matrix products": ("mm", "linear"),
         "optimizers": ("adam", "foreach"), "random numbers": ("normal_", "rand", "uniform_"),
         "copies and casts": ("copy", "cat", "stack", "index", "select", "clone", "fill", "zero")}


class Count(TorchDispatchMode):
    """Counts operations; the floating-point operations of products and convolutions; and the bytes
    that all others read and write (views: none)."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes, self.flop = 0, 0, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function._overloadpacket
        self.calls += 1
        if name in flop_registry:
            kind = "convolutions" if "conv" in str(name) else "matrix products"
            self.flop[kind] += flop_registry[name](*args, **(kwargs or {}), out_val=out)
        elif not function.is_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(x.nbytes for x in tensors if torch.is_tensor(x))
        return out


def peak(dtype, device, size=2048):
    """Floating-point operations a second of a size x size matrix product: best of five."""
    a, best = torch.randn(size, size, dtype=dtype, device=device), 0
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        bench.waiter(device)()
        best = max(best, 2 * size ** 3 / (time.perf_counter() - start))
    return best


def bandwidth(device, size=2**28):
    """Bytes a second read and written by copying a large tensor: best of five."""
    a, best = torch.ones(size, dtype=torch.uint8, device=device), 0
    b = a.clone()
    for _ in range(6):
        start = time.perf_counter()
        b.copy_(a)
        bench.waiter(device)()
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def main():
    explicit, _ = cmil.parse(sys.argv[1:])
    c = cmil.make_config({"logdir": "unused", **explicit})
    agent, replay = bench.agent_on_noise(c)
    cuda = agent.device.type == "cuda"
    with Count() as count:                                                  # warm-up too
        agent.gradient_step(replay)
    median = bench.median_seconds(agent, replay, 3 if c.preset == "paper" else 15,
                                  warm_up=cmil.Graphed.WARM_UP + 1 if cuda else 0)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        agent.update(replay)
        bench.waiter(agent.device)()
    seconds = dict.fromkeys([*KINDS, "element by element and the rest"], 0.0)
    for event in profile.key_averages():
        kind = next((k for k, parts in KINDS.items() if any(p in event.key.lower() for p in parts)),
                    "element by element and the rest")
        seconds[kind] += (event.self_device_time_total if cuda
                          else event.self_cpu_time_total) / 1e6
    total = sum(seconds.values())
    for kind, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{kind:34s} {value:7.3f} s  {value / total:5.0%}")
    with agent.autocast():
        dtype = torch.get_autocast_dtype(agent.device.type) if torch.is_autocast_enabled(
            agent.device.type) else torch.float32
    rate, flop = peak(dtype, agent.device), sum(count.flop.values())
    speed = bandwidth(agent.device)
    print(json.dumps({
        "preset": c.preset, "precision": c.precision, "threads": torch.get_num_threads(),
        "seconds_per_update": round(median, 4),
        "floor_seconds": round(flop / rate + count.bytes / speed, 4),
        "of_which_bytes": round(count.bytes / speed, 4), "operations": count.calls,
        "gflop": {kind: round(n / 1e9, 2) for kind, n in count.flop.items()},
        "gflop_per_s_of_a_product": round(rate / 1e9), "gbyte": round(count.bytes / 1e9, 2),
        "gbyte_per_s_of_a_copy": round(speed / 1e9, 1)}))


if __name__ == "__main__":
    main()
