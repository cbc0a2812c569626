"""Where the time of one update goes: each kind of operation's share, and the floor below them.

    python results/profile_update.py --preset paper [any other flag of cmil.py]

floor_seconds: the multiplications and additions of the update's products and convolutions at the
rate of one large matrix product here. bytes_seconds: what all other operations read and write, one
by one as torch runs them, at the rate of one large copy; fused or cached, they cost less.
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

FREE = ("_unsafe_view", "empty", "zeros_like", "ones_like")  # no bytes, or only zeros
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
        elif not (function.is_view or any(part in str(name) for part in FREE)):
            leaves = torch.utils._pytree.tree_leaves
            outputs = [x for x in leaves(out) if torch.is_tensor(x)]
            own = {x.data_ptr() for x in outputs}            # read and written in place: once
            inputs = [x for x in leaves((args, kwargs))
                      if torch.is_tensor(x) and x.data_ptr() not in own]
            sizes = [x.nbytes for x in inputs + outputs if x.dtype != torch.long]
            # Indexing reads and writes what it picks, not all that it could.
            self.bytes += 2 * min(sizes) if "index" in str(name) and sizes else sum(sizes)
        return out


def best_rate(amount, work, device):
    """`amount` a second of work(): the best of five, each long enough to be timed on a GPU too."""
    times, each = [], 20 if device.type == "cuda" else 1
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(each):
            work()
        bench.waiter(device)()
        times.append(time.perf_counter() - start)
    return amount * each / min(times)


def peak(dtype, device):
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, dtype=dtype, device=device)
    return best_rate(2 * size ** 3, lambda: a @ a, device)


def bandwidth(device, size=2**28):
    """Bytes a second, read and written, of copying a large tensor."""
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = a.clone()
    return best_rate(2 * size, lambda: b.copy_(a), device)


def main():
    explicit, _ = cmil.parse(sys.argv[1:])
    c = cmil.make_config({"logdir": "unused", **explicit})
    agent, replay = bench.agent_on_noise(c)
    cuda = agent.device.type == "cuda"
    with Count() as count:                                                  # warm-up too
        (agent.clone_step if agent.clone_only else agent.gradient_step)(replay)
    median = bench.median_seconds(agent, replay, 3 if c.preset == "paper" else 15,
                                  warm_up=cmil.Graphed.WARM_UP + 1 if cuda else 0)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        agent.update(replay, agent.clone_only)
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
        "algo": c.algo, "preset": c.preset, "precision": c.precision,
        "threads": torch.get_num_threads(),
        "seconds_per_update": round(median, 4),
        "floor_seconds": round(flop / rate, 4), "bytes_seconds": round(count.bytes / speed, 4),
        "operations": count.calls,
        "gflop": {kind: round(n / 1e9, 2) for kind, n in count.flop.items()},
        "gflop_per_s_of_a_product": round(rate / 1e9), "gbyte": round(count.bytes / 1e9, 2),
        "gbyte_per_s_of_a_copy": round(speed / 1e9, 1)}))


if __name__ == "__main__":
    main()
