"""Derives POLAR_EXPRESS of lowrank/orthogonaliser.rs: python3 benches/polar_express.py. Needs nothing but Python.

Each step is the odd quintic p(x) = ax + bx³ + cx⁵ nearest to 1 on [l, u] (Amsel et al. 2025, arXiv 2505.16932, theorem on
greedy optimality). By the equioscillation theorem it is the one whose error alternates, equally large, at four points: l, the
maximum and the minimum of p between, and u. They are found by Remez exchange: solve for (a, b, c, E) at four points, move the
inner two to where p' = 0, repeat. Written from those two theorems; the cushion and the centring are the paper's.
"""

from math import sqrt

CUSHION = 0.02407327424182761


def solve(rows, right):
    """Gaussian elimination with pivoting."""
    rows = [row[:] + [y] for row, y in zip(rows, right)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(n):
            if j != i:
                factor = rows[j][i] / rows[i][i]
                rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i])]
    return [rows[i][n] / rows[i][i] for i in range(n)]


def nearest_to_one(l, u):
    if l / u > 1 - 5e-6:  # the limit l → u, where the four points cannot be told apart
        return 15 / 8 / u, -10 / 8 / u**3, 3 / 8 / u**5
    points = [l, (3 * l + u) / 4, (l + 3 * u) / 4, u]
    for _ in range(100):
        # p(x) = 1 − E, 1 + E, 1 − E, 1 + E
        a, b, c, _ = solve([[x, x**3, x**5, sign] for x, sign in zip(points, [1, -1, 1, -1])], [1.0] * 4)
        root = sqrt(9 * b * b - 20 * a * c)
        inner = sorted(sqrt(x) for x in [(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
        moved = max(abs(x - y) for x, y in zip(points[1:3], inner))
        points[1:3] = inner
        if moved < 1e-14:
            break
    return a, b, c


l, u = 1e-3, 1.0
for _ in range(8):
    a, b, c = nearest_to_one(max(l, CUSHION * u), u)
    p = lambda x: x * (a + x * x * (b + x * x * c))
    scale = 2 / (p(l) + p(u))
    a, b, c = a * scale, b * scale, c * scale
    print(f"[{a!r}, {b!r}, {c!r}]")
    l = p(l)
    u = 2 - l
