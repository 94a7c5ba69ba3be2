"""One table of logits for every test that compares with the gold: what is ordinary, and whatever has ever gone wrong.

A case is a pair of float32 logits [2, 3, V] and the arguments that go with it. They are rounded to the dtype under test
before anything is computed from them, the gold included.
"""

import functools

import torch

B, T, V = 2, 3, 1037  # two tiles of 512 and an odd tail
INF, NAN = float("inf"), float("nan")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SAME_DTYPES = [(F32, F32), (BF16, BF16), (F16, F16)]
MIXED_DTYPES = [(F32, BF16), (BF16, F32), (F16, F32), (BF16, F16)]


def randn(*shape, seed=0, scale=4.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def pair(width=V, **kwargs):
    student = randn(B, T, width, seed=1)
    return student, student + randn(B, T, width, seed=2, scale=1.0), kwargs


def from_pair(change, width=V, **kwargs):
    """The random pair, changed in place by change(student, teacher)."""
    student, teacher, kwargs = pair(width, **kwargs)
    change(student, teacher)
    return student, teacher, kwargs


def ties(width=V, scale=2, **kwargs):
    return randn(B, T, width, seed=7, scale=scale).round(), randn(B, T, width, seed=8, scale=scale).round(), kwargs


NEGATIVE_NAN = torch.tensor([-(2**31) + 0x7FC00001], dtype=torch.int32).view(F32).item()


def some_nan(s, t, value):
    s[0, 0, 700], s[0, 1, -1], t[0, 1, 0], t[1, 0, 512] = value, value, value, value


def nan_many(s, t):
    s[0, 0, 3::30] = NAN  # more than k
    s[0, 0, 3::60] = NEGATIVE_NAN
    t[0, 0] = NAN
    s[1, 2, 5:9], s[1, 2, 100] = NAN, INF


def nan_first(s, t):
    """The greatest of all candidates, and others that are to be told from it."""
    s[0, 0, 0], s[0, 1, :2], t[0, 0, :3], t[1] = NAN, NAN, NAN, NAN


def plus_inf(s, t):
    s[0, 0, 1036], s[0, 1, 40:80], t[0, 2, 0] = INF, INF, INF
    s[1, 0, 7], s[1, 0, 9], t[1, 0, 7] = INF, -INF, INF


def minus_inf_some(s, t):
    s[..., 5:900:2] = -INF
    t[0, :, ::3] = -INF


def minus_inf_all_but_few(s, t):
    """Fewer tokens than k are left, on either side and not the same."""
    s_left, t_left = s[..., 500:505].clone(), t[..., 503:514].clone()
    s.fill_(-INF), t.fill_(-INF)
    s[..., 500:505], t[..., 503:514] = s_left, t_left


def minus_inf_only(s, t):
    s[0, 0], t[0, 1], s[0, 2], t[0, 2] = -INF, -INF, -INF, -INF


def one_finite(s, t):
    s.fill_(-INF), t.fill_(-INF)
    s[0, :, 3], t[0, :, 3], s[1, :, 1036], t[1, :, 0] = 1.5, -2.0, 0.0, 0.0


def signed_zeros(s, t):
    for x, seed in ((s, 3), (t, 4)):
        r = randn(B, T, V, seed=seed)
        x.copy_(torch.where(r > 6, r.round(), torch.where(r > 0, 0.0, -0.0)))
    s[0, 0], t[0, 0] = -0.0, 0.0


def subnormal(s, t):
    steps = torch.arange(V).remainder(97).float()
    for f32, f16 in ((s, t), (t, s)):
        f32[0, 0] = steps * 2e-39 - 1e-37
        f32[0, 1] = -steps * 3e-45
        f16[0, 2] = steps * 6e-8  # subnormal in float16
    s[1], t[1] = steps * 1e-40, -steps * 1e-40


def largest(s, t):
    s.zero_(), t.zero_()
    s[..., 30], t[..., 1000], s[1, :, 31] = 3e38, 3e38, 3e38


def largest_opposite(s, t):
    s.fill_(-3e38), t.fill_(-3e38)
    s[..., 30], t[..., 1000] = 3e38, 3e38


def peaked(s, t):
    s[..., 77] = 80.0
    t[0, :, 77], t[1, :, 1030] = 90.0, 80.0


def both_underflow(s, t):
    """Each side gives the other's only token a probability below the least float."""
    s[..., 3], t[..., 900] = 250.0, 300.0


def tiled(s, t):
    """The best are one a tile, all in one tile, and all in the tail."""
    s[0, 0, 100::137], s[0, 1, 512:540], s[0, 2, 1024:] = 30.0, 31.0, 32.0
    t[0, 0, 511], t[0, 0, 512], t[0, 1, 1023], t[0, 1, 1024], t[0, 2, -1], t[0, 2, 0] = 50, 50, 50, 50, 50, 50
    s[1] = torch.arange(V).remainder(256).float()
    t[1] = -s[1]


def ramps(s, t):
    up = torch.linspace(-8, 8, V)
    s[0], t[0], s[1], t[1] = up, up.flip(0), up, up * 1.01


def wider_teacher():
    """Heads of two widths over one tokenizer: what lies beyond vocab_size does not exist."""
    student, teacher, _ = pair(1000)
    teacher = torch.cat([teacher, torch.full((B, T, 37), 1e9)], -1)
    student[..., 990:], teacher[..., 990:1000], teacher[..., 1020:] = NAN, INF, NAN
    return student, teacher, {"vocab_size": 990}


def orders(width=20000):
    """What drives a selection to its worst: ramps, plateaus, combs with a tooth in every tile, a saw."""
    ids = torch.arange(width)
    rows = [ids / 100, -ids / 100, -(ids // 700), (ids % 512 == 511), (ids % 300 == 0), ids % 1000 / 10]
    return torch.stack([row.float() for row in rows]).view(B, T, width)


def full_width(**kwargs):
    """Heads as they are, of two widths."""
    return randn(1, 2, 151936, seed=20), randn(1, 2, 152064, seed=21), {"vocab_size": 151936, **kwargs}


CASES = {
    "random": pair,
    "ties": ties,
    "all_equal": lambda: (torch.full((B, T, V), 1.25), torch.full((B, T, V), -3.5), {}),
    "ramps": lambda: from_pair(ramps),
    "equal_pair": lambda: from_pair(lambda s, t: t.copy_(s)),
    "tiled": lambda: from_pair(tiled),
    "nan_positive": lambda: from_pair(lambda s, t: some_nan(s, t, NAN)),
    "nan_negative": lambda: from_pair(lambda s, t: some_nan(s, t, NEGATIVE_NAN)),
    "nan_many": lambda: from_pair(nan_many),
    "plus_inf": lambda: from_pair(plus_inf),
    "minus_inf_some": lambda: from_pair(minus_inf_some),
    "minus_inf_all_but_few": lambda: from_pair(minus_inf_all_but_few),
    "minus_inf_disjoint": lambda: from_pair(lambda s, t: (s[..., 600:].fill_(-INF), t[..., :600].fill_(-INF))),
    "minus_inf_only": lambda: from_pair(minus_inf_only),
    "one_finite": lambda: from_pair(one_finite),
    "signed_zeros": lambda: from_pair(signed_zeros),
    "subnormal": lambda: from_pair(subnormal),
    "subnormal_bf16": lambda: from_pair(lambda s, t: (s.copy_(torch.arange(V) % 89 * 2.0**-133), t.copy_(-s))),
    "huge": lambda: (randn(B, T, V, seed=5, scale=1e30), randn(B, T, V, seed=6, scale=1e30), {}),
    "largest": lambda: from_pair(largest),
    "largest_opposite": lambda: from_pair(largest_opposite),
    "peaked": lambda: from_pair(peaked),
    "both_underflow": lambda: from_pair(both_underflow),
    "wide_range": lambda: (randn(B, T, V, seed=9, scale=1000), randn(B, T, V, seed=10, scale=1000), {}),
    "strongly_negative": lambda: from_pair(lambda s, t: (s.sub_(450), t.sub_(450))),
    "shifted_apart": lambda: from_pair(lambda s, t: (s.sub_(450), t.add_(450))),
    "temperatures": lambda: pair(student_temperature=0.6, teacher_temperature=1.7),
    "hot_and_cold": lambda: pair(student_temperature=50.0, teacher_temperature=0.02),
    "extreme_temperatures": lambda: pair(student_temperature=1e-35, teacher_temperature=1e35),
    "wider_teacher": wider_teacher,
    "vocab_size": lambda: pair(vocab_size=513),
    "k_1": lambda: pair(k=1),
    "k_1_nan": lambda: from_pair(nan_first, k=1),
    "k_10": lambda: pair(k=10),
    "k_64": lambda: pair(k=64),
    "k_255": lambda: pair(k=255),
    "k_256": lambda: pair(k=256),
    "k_256_ties": lambda: ties(k=256),
    "k_256_all_equal": lambda: (torch.zeros(B, T, V), torch.zeros(B, T, V), {"k": 256}),
    "k_is_v_16": lambda: pair(16),
    "k_is_v_256": lambda: pair(256, k=256),
    "k_is_vocab_size": lambda: pair(40, k=33, vocab_size=33),
    "orders": lambda: (orders(), orders().flip(0, 1), {}),
    "orders_k_1": lambda: (orders(), orders().flip(0, 1), {"k": 1}),
    "orders_k_256": lambda: (orders(), orders().flip(0, 1), {"k": 256}),
    "full_width": lambda: full_width(k=16),
    "full_width_k_256": lambda: full_width(k=256),
}

# One width on each side of every boundary; the wider one has ties.
WIDTHS = [1, 2]
WIDTHS += [7, 9, 15, 17, 31, 33]  # a step of the CPU's loops: 8 (portable), 16 (AVX2), 32 logits (AVX-512)
WIDTHS += [127, 129, 255, 257]  # a tile of CUDA's: 128 float32, 256 of half precision, as Triton's
WIDTHS += [511, 513]  # a tile of the CPU's
WIDTHS += [4095, 4097]  # what a block of CUDA or a program of Triton takes of a row in one step
WIDTHS += [16383, 16385]  # a unit of CUDA's, by which a row is split over blocks
WIDTHS += [32767, 32769]  # a segment of Triton's
for width in WIDTHS:
    CASES[f"width_{width}"] = (
        functools.partial(ties, width, scale=1, k=min(5, width))
        if width % 2**3 == 1
        else functools.partial(pair, width, k=min(16, width))
    )

# What differs from the others by tiles, units and segments alone.
FOR_TILES = [name for name in CASES if name.startswith(("width_", "orders", "full_width"))]
MIXED = ["random", "ties", "minus_inf_some", "wider_teacher", "subnormal", "nan_negative"]
SHORT = {F32: "f32", BF16: "bf16", F16: "f16"}


def case_id(value):
    return value if isinstance(value, str) else "/".join(SHORT[dtype] for dtype in value)


@functools.cache
def make(name, dtypes):
    """The case in these dtypes: `student_logits, teacher_logits, kwargs`; not to be written to."""
    student, teacher, kwargs = CASES[name]()
    return student.to(dtypes[0]), teacher.to(dtypes[1]), kwargs


def as_float64(tensor):
    """The array that a gold takes."""
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


# --- what operators take beside logits -------------------------------------------------------------------------------

# How far log p has moved since the tokens were sampled: within the clips, beyond each of them, beyond the clamp.
MOVES = torch.tensor([0.02, 0.05, -0.1, 0.5, -0.5, 1.0, 2.0, -2.0, 25.0, -25.0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def logprobs(logits, temperature=1.0, vocab_size=None):
    """In float64."""
    return (logits[..., :vocab_size].double() / temperature).log_softmax(-1)


def top(logits, k, vocab_size=None):
    return logits[..., :vocab_size].double().sort(descending=True, stable=True).indices[..., :k].contiguous()


def token_ids(teacher_logits, vocab_size=None, seed=0):
    """Sampled-looking ids `[...]`: every second one among the teacher's best, the others anywhere."""
    rng, row = generator(seed), teacher_logits[..., :vocab_size]
    near = top(row, 4).gather(-1, torch.randint(min(4, row.shape[-1]), (*row.shape[:-1], 1), generator=rng))[..., 0]
    even = torch.arange(near.numel()).reshape(near.shape) % 2 == 0
    return torch.where(even, near, torch.randint(row.shape[-1], near.shape, generator=rng))


def candidates(student, m, vocab_size=None, seed=0):
    """Ids `[..., m]`: half of them the most probable, the others anywhere, some twice, some padding; and advantages."""
    rng = generator(seed)
    row = student[..., :vocab_size].float().nan_to_num()
    ids = torch.randint(row.shape[-1], (*row.shape[:-1], m), generator=rng)
    best = row.topk(min(-(-m // 2), row.shape[-1])).indices
    ids[..., : best.shape[-1]] = best
    advantages = torch.randn(ids.shape, generator=rng)
    if m > 4:
        ids[..., 1], ids[..., -1], ids[..., -2] = -1, ids[..., 0], -100
        advantages[..., 2], advantages[..., -2] = 0.0, torch.nan  # of padding: ignored
    return ids, advantages


def moved(student, ids, temperature=1.0, vocab_size=None, seed=0):
    """Log-probabilities of the candidates under a policy that sampled earlier."""
    old = logprobs(student, temperature, vocab_size).gather(-1, ids.clamp(min=0)).nan_to_num(0.0, 0.0, -50.0)
    return (old - MOVES[torch.randint(len(MOVES), ids.shape, generator=generator(seed))]).float()


def sent(teacher, k, temperature=1.0, vocab_size=None, with_padding=True):
    """What a teacher's server sends: its candidates and their log-probabilities, some of them padding."""
    ids = top(teacher, k, vocab_size)
    log_q = logprobs(teacher, temperature, vocab_size).gather(-1, ids).float()
    if with_padding and k > 4:
        ids[..., -2], log_q[..., -2] = -1, torch.nan  # of padding: ignored
    return ids, log_q
