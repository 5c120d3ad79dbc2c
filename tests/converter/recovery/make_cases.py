"""Writes cases.json beside it: gradients by PyTorch's autograd in float64, for cases_test.cc.

Run once by hand (python3 make_cases.py, PyTorch 2.x); the tests read the file and need no Python.
Every loss is sum(d * output) for a fixed random d, except the head's, which is the divergence.
"""

import json
import math
import pathlib

import torch

torch.manual_seed(1)
torch.set_default_dtype(torch.float64)


def random(*shape, scale=1.0, grad=False):
    return (scale * torch.randn(*shape)).requires_grad_(grad)


def flat(t):
    return [float(f"{v:.15g}") for v in t.detach().reshape(-1).tolist()]


def norm_case():
    x, w, d = random(4, 10, grad=True), random(10), random(4, 10)
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-2) * w
    (y * d).sum().backward()
    return {"x": flat(x), "w": flat(w), "d": flat(d), "y": flat(y), "dx": flat(x.grad)}


def rotate(x, heads, dim, base, interleaved):
    n = x.shape[0]
    freq = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float32)
    angle = (torch.arange(n, dtype=torch.float32)[:, None] * freq).double()
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    x = x.reshape(n, heads, dim)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : dim // 2], x[..., dim // 2 :])
    ra, rb = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        return torch.stack((ra, rb), -1).reshape(n, heads * dim)
    return torch.cat((ra, rb), -1).reshape(n, heads * dim)


def attention_case(n, heads, kv, dim, window, interleaved):
    q, k, v = (random(n, h * dim, grad=True) for h in (heads, kv, kv))
    d = random(n, heads * dim)
    scale, base = 0.6, 100.0
    qr = rotate(q, heads, dim, base, interleaved).reshape(n, heads, dim).transpose(0, 1)
    kr = rotate(k, kv, dim, base, interleaved).reshape(n, kv, dim).transpose(0, 1)
    vh = v.reshape(n, kv, dim).transpose(0, 1)
    kr, vh = (t.repeat_interleave(heads // kv, 0) for t in (kr, vh))
    pos = torch.arange(n)
    seen = pos[None, :] <= pos[:, None]
    if window:
        seen &= pos[None, :] > pos[:, None] - window
    out = torch.nn.functional.scaled_dot_product_attention(
        qr[None], kr[None], vh[None], attn_mask=seen, scale=scale
    )[0]
    out = out.transpose(0, 1).reshape(n, heads * dim)
    (out * d).sum().backward()
    return {
        "n": n, "heads": heads, "kv": kv, "dim": dim, "window": window,
        "interleaved": interleaved, "scale": scale, "base": base,
        "q": flat(q), "k": flat(k), "v": flat(v), "d": flat(d), "out": flat(out),
        "dq": flat(q.grad), "dk": flat(k.grad), "dv": flat(v.grad),
    }


def moe_case(gelu):
    n, d_model, shared, experts, active, rank, bypass = 6, 8, 3, 12, 4, 5, 2
    phi = (lambda x: torch.nn.functional.gelu(x, approximate="tanh")) if gelu else torch.nn.functional.silu
    names = ["w_gate", "w_up", "w_down", "bypass_q", "bypass_p", "bias", "router_v", "router_u", "router_bias"]
    m = shared + experts
    shapes = [(m, d_model)] * 3 + [(bypass, d_model), (d_model, bypass), (d_model,)]
    shapes += [(rank, d_model), (experts, rank), (experts,)]
    p = {k: random(*s, scale=0.5, grad=True) for k, s in zip(names, shapes)}
    mean = torch.cat((torch.zeros(shared), random(experts, scale=0.1)))
    x, dy = random(n, d_model, grad=True), random(n, d_model)
    weight = torch.rand(n) + 0.5
    scores = x.detach() @ p["router_v"].T @ p["router_u"].T + p["router_bias"]
    on = torch.ones(n, m)
    on[:, shared:] = 0
    on.scatter_(1, shared + scores.topk(active).indices, 1.0)
    centred = phi(x @ p["w_gate"].T) * (x @ p["w_up"].T) - mean
    y = (on * centred) @ p["w_down"] + p["bias"] + x @ p["bypass_q"].T @ p["bypass_p"].T
    target = (centred.abs() * p["w_down"].norm(dim=1))[:, shared:].detach()
    auxiliary = (weight[:, None] * (scores - target) ** 2).sum() / (weight.sum() * 2.0)
    ((y * dy).sum() + 0.7 * auxiliary).backward()
    case = {
        "gelu": gelu, "n": n, "d_model": d_model, "shared": shared, "experts": experts,
        "active": active, "rank": rank, "bypass": bypass, "mean": flat(mean), "x": flat(x),
        "dy": flat(dy), "weight": flat(weight), "y": flat(y), "auxiliary": float(auxiliary.detach()),
        "dx": flat(x.grad),
        "parameters": [flat(p[k]) for k in names], "gradients": [flat(p[k].grad) for k in names],
    }
    return case


def self_routed_case(gelu, by_input, straight_through):
    n, d_model, d_ff = 6, 8, 14
    phi = (lambda x: torch.nn.functional.gelu(x, approximate="tanh")) if gelu else torch.nn.functional.silu
    shapes = [(d_ff, d_model), (d_ff, d_model), (d_model, d_ff)]
    p = [random(*s, scale=0.5, grad=True) for s in shapes]
    x, dy = random(n, d_model, grad=True), random(n, d_model)
    t_input = torch.rand(d_model)
    keep = lambda v, t: v * (v.detach().abs() >= t)
    large = keep(x, t_input)
    if straight_through:
        large = x + (large - x).detach()
    a = phi(large @ p[0].T)
    t_gate = torch.zeros(0) if by_input else a.detach().abs().median(0).values * 0.9
    routed = a if by_input else keep(a, t_gate)
    h = routed * ((large if by_input else x) @ p[1].T)
    t_hidden = h.detach().abs().median(0).values * 0.9
    y = keep(h, t_hidden) @ p[2].T
    (y * dy).sum().backward()
    return {
        "gelu": gelu, "by_input": by_input, "straight_through": straight_through,
        "n": n, "d_model": d_model, "d_ff": d_ff,
        "input_threshold": flat(t_input), "gate_threshold": flat(t_gate), "hidden_threshold": flat(t_hidden),
        "x": flat(x), "dy": flat(dy), "y": flat(y), "dx": flat(x.grad),
        "parameters": [flat(t) for t in p], "gradients": [flat(t.grad) for t in p],
    }


def head_case():
    head, teacher, student = random(50, 6), random(5, 6), random(5, 6, grad=True)
    log_p, log_q = ((h @ head.T).log_softmax(-1) for h in (teacher, student))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (0.5 * kl).backward()
    return {"head": flat(head), "teacher": flat(teacher), "student": flat(student),
            "kl": float(kl.detach()), "dh": flat(student.grad)}


cases = {
    "torch": torch.__version__,
    "norm": norm_case(),
    "attention": [attention_case(9, 4, 2, 6, 0, True), attention_case(11, 3, 1, 4, 4, False)],
    "moe": [moe_case(False), moe_case(True)],
    "head": head_case(),
    "self_routed": [
        self_routed_case(False, False, False),
        self_routed_case(True, False, True),
        self_routed_case(False, True, False),
        self_routed_case(True, True, True),
    ],
}
assert math.isfinite(cases["head"]["kl"])
path = pathlib.Path(__file__).with_name("cases.json")
path.write_text(json.dumps(cases, separators=(",", ":")) + "\n")
