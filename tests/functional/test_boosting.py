"""The arithmetic against independent references: NumPy step by step, autograd, and what the theory promises."""

import math
import threading
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdistil import functional as bf
from bdistil.boosting.ledger.reductions import margin_sums
from bdistil.functional.boosting import BARRIER_FLOOR

SHAPES = [(1, 1), (7, 3), (64, 100), (2000, 10)]


def normal(*shape, dtype=torch.float64, scale=1.0):
    return torch.randn(*shape, dtype=dtype) * scale


def game_step_by_step(deviations, eta):
    """K+ and K- of B-DISTIL before each round and after the last, by the multiplicative update of the paper."""
    n, outputs = deviations[0].shape
    up = np.full((n, outputs), 1 / (2 * n))
    down = up.copy()
    yield up, down
    for d in deviations:
        up, down = up * np.exp(-eta * d), down * np.exp(eta * d)
        total = up.sum(0) + down.sum(0)
        up, down = up / total, down / total
        yield up, down


# ---- the game


@pytest.mark.parametrize("eta", [0.05, 0.5, 2.0])
def test_weights_equal_the_multiplicative_update(eta):
    rng = np.random.default_rng(0)
    deviations = [rng.normal(size=(50, 4)) for _ in range(10)]
    error = np.zeros((50, 4))
    rounds = 0
    for (up, down), d in zip(game_step_by_step(deviations, eta), [*deviations, None], strict=True):
        ours = bf.game_weights(torch.from_numpy(error), eta)
        np.testing.assert_allclose(ours[0], up, rtol=1e-6, atol=0)
        np.testing.assert_allclose(ours[1], down, rtol=1e-6, atol=0)
        error = error if d is None else error + d
        rounds += 1
    assert rounds == 11


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_weights_sum_to_one_per_output(shape, dtype, tolerance):
    up, down = bf.game_weights(normal(*shape, dtype=dtype), 0.7)
    assert up.dtype == down.dtype == dtype
    assert up.shape == down.shape == shape
    torch.testing.assert_close(up.sum(0) + down.sum(0), torch.ones(shape[1], dtype=dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [200.0, 2000.0])
def test_weights_do_not_overflow(size, dtype):
    error = torch.stack((torch.linspace(-1, 1, 11), torch.linspace(0, 1, 11), torch.linspace(-1, 0, 11)), 1).to(dtype)
    up, down = bf.game_weights(size * error, 1.0)
    for weights in (up, down):
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()
    # All the weight is on the worst samples: the lowest (up) and the highest (down); column 0 has one of each.
    torch.testing.assert_close(up[0], torch.tensor([0.5, 0.0, 1.0], dtype=dtype), rtol=0, atol=1e-4)
    torch.testing.assert_close(down[-1], torch.tensor([0.5, 1.0, 0.0], dtype=dtype), rtol=0, atol=1e-4)


def test_normaliser_of_parts_joins_to_the_whole():
    error = normal(90, 5, scale=30.0)
    parts = [bf.log_normaliser(part, 0.5) for part in error.split([1, 40, 49])]
    whole = bf.log_normaliser(error, 0.5)
    torch.testing.assert_close(
        torch.logaddexp(torch.logaddexp(parts[0], parts[1]), parts[2]), whole, rtol=1e-12, atol=0
    )
    plain = np.log((np.exp(0.5 * error.numpy()) + np.exp(-0.5 * error.numpy())).sum(0))
    np.testing.assert_allclose(whole, plain, rtol=1e-12)


def test_rows_are_the_rows_of_the_weights():
    error, rows = normal(30, 4), torch.tensor([3, 0, 29])
    ours = bf.game_rows(error[rows], bf.log_normaliser(error, 0.8), 0.8)
    torch.testing.assert_close(torch.stack(ours), torch.stack([w[rows] for w in bf.game_weights(error, 0.8)]))


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_margins_equal_their_definition(eta):
    error, deviation = normal(40, 6), normal(40, 6)
    *_, (up, down) = game_step_by_step([error.numpy()], eta)
    expected = [sum((up[i, j] - down[i, j]) * deviation[i, j].item() for i in range(40)) for j in range(6)]
    ours = bf.margins(error, deviation, eta)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)
    assert torch.equal(bf.margins(error, -deviation, eta), -ours)


def test_the_error_of_a_prefix_is_that_of_the_mean_of_its_students():
    answers, target = normal(5, 40, 6), normal(40, 6)
    for count in range(5):
        error = (answers[:count] - target).sum(0)
        found = target + bf.prefix_error(answers[count], target, error, count)
        torch.testing.assert_close(found, answers[: count + 1].mean(0))


@pytest.mark.parametrize("size", [0.1, 3.0, 500.0])
def test_margin_sums_of_parts_add_up_to_the_margins(size):
    """Of errors of any size: those over 80 / eta overflow a plain exponential."""
    error, deviation = size * torch.randn(40, 3), torch.randn(40, 3)
    log_z = bf.log_normaliser(error.double(), 0.5)
    parts = [margin_sums(error[rows], deviation[rows], log_z, 0.5) for rows in (slice(0, 7), slice(7, 40))]
    torch.testing.assert_close(sum(parts), bf.margins(error.double(), deviation.double(), 0.5), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_round_one_the_two_sides_are_exact_opposites(dtype):
    error, deviation = torch.zeros(33, 5, dtype=dtype), normal(33, 5, dtype=dtype)
    up, down = bf.game_weights(error, 0.5)
    rise, fall = (up * deviation).sum(0), -(down * deviation).sum(0)
    assert torch.equal(rise, -fall)
    assert (rise != 0).all()
    assert torch.equal(bf.margins(error, deviation, 0.5), torch.zeros(5, dtype=dtype))


def play(rounds, seed, *, eta_sign, size=1.5, samples=16, outputs=3):
    """Plays the game on a class with a weak learner in every round; the sup-norm of F_T - g, and its bound.

    A student is g plus or minus one of eight random patterns of +size and -size, the sign chosen for each output so
    that its margin is at least 0. Of the eight the player takes the one that only just manages: it helps least.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 2 * size * math.sqrt(math.log(2 * samples) / rounds)
    eta = eta_sign * math.sqrt(math.log(2 * samples) / rounds) / size
    error = torch.zeros(samples, outputs, dtype=torch.float64)
    for _ in range(rounds):
        patterns = size * (torch.randint(0, 2, (samples, 8, outputs), generator=generator).double() * 2 - 1)
        found = bf.margins(error.repeat(1, 8), patterns.flatten(1), eta).view(8, outputs)
        students = patterns * torch.where(found >= 0, 1.0, -1.0)
        deviation = students[:, found.abs().argmin(0), torch.arange(outputs)]
        assert (bf.margins(error, deviation, eta) >= -1e-12).all()
        error = error + deviation
    return error.abs().max().item() / rounds, bound


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rounds", [16, 64, 256])
def test_sup_norm_stays_under_its_guarantee(rounds, seed):
    distance, bound = play(rounds, seed, eta_sign=1.0)
    assert distance <= bound


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rounds", [32, 64, 256])
def test_guarantee_is_lost_when_the_update_has_the_wrong_sign(rounds, seed):
    distance, bound = play(rounds, seed, eta_sign=-1.0)
    assert distance > bound


# ---- the loss of a round


def barrier_in_numpy(d, up, down, population, bound, gamma):
    def log(value):
        floor = 1e-3
        return math.log(value) if value > floor else math.log(floor) + (value - floor) / floor

    batch, outputs = d.shape
    p = population / batch * (up * d).sum(0)
    n = -population / batch * (down * d).sum(0)
    barrier = sum(log(1 + p[j] / (2 * bound)) + log(1 + n[j] / (2 * bound)) for j in range(outputs)) / outputs
    return (d**2).sum() / (batch * outputs) - barrier / gamma


@pytest.mark.parametrize(("scale", "below_floor"), [(1.0, False), (40.0, True)])
def test_loss_equals_plain_numpy(scale, below_floor):
    d, (up, down) = normal(12, 4, scale=scale), (w[:12] for w in bf.game_weights(normal(50, 4), 0.5))
    rise = 1 + 50 / 12 / 6 * (up * d).sum(0)
    assert bool((rise < BARRIER_FLOOR).any()) == below_floor
    ours = bf.log_barrier_loss(d, up, down, population=50, bound=3.0, gamma=0.1)
    assert ours.shape == ()
    expected = barrier_in_numpy(d.numpy(), up.numpy(), down.numpy(), 50, 3.0, 0.1)
    assert ours.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_loss_gradient(scale):
    up, down = (w[:6].clone().requires_grad_() for w in bf.game_weights(normal(20, 3), 0.5))
    d = normal(6, 3, scale=scale).requires_grad_()

    def loss(*tensors):
        return bf.log_barrier_loss(*tensors, population=20, bound=3.0, gamma=0.1)

    assert torch.autograd.gradcheck(loss, (d, up, down))


def one_sided_loss(deviation):
    """Loss d^2 - log(1 + d) of a single deviation, and its gradient."""
    d = torch.tensor([[deviation]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = bf.log_barrier_loss(d, one, 0 * one, population=1, bound=0.5, gamma=1.0)
    loss.backward()
    return loss.item(), d.grad.item()


@pytest.mark.parametrize("deviation", [-1.0, -1.5, -1e3, -1e6])
def test_below_the_floor_loss_is_finite_and_pulls_back(deviation):
    value, gradient = one_sided_loss(deviation)
    assert math.isfinite(value)
    assert gradient - 2 * deviation == pytest.approx(-1 / BARRIER_FLOOR)


def test_loss_is_smooth_at_the_floor():
    above, below = (one_sided_loss(BARRIER_FLOOR - 1 + step) for step in (1e-9, -1e-9))
    assert above[0] == pytest.approx(below[0], abs=1e-5)
    assert above[1] == pytest.approx(below[1], rel=1e-4)
    assert above[0] < below[0]


def test_without_barrier_loss_is_the_squared_error():
    d, (up, down) = normal(9, 4, scale=10.0), bf.game_weights(normal(9, 4), 0.5)
    ours = bf.log_barrier_loss(d, up, down, population=9, bound=2.0, gamma=math.inf)
    assert ours.item() == F.mse_loss(d, torch.zeros_like(d)).item()


def minimiser(error, *, eta, kappa, bound):
    """The free deviations (N, L) at which the loss over all samples is least."""
    up, down = bf.game_weights(error, eta)
    d = torch.zeros_like(error, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [d], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        gamma = bf.gamma_of(eta, kappa, bound)
        loss = bf.log_barrier_loss(d, up, down, population=len(error), bound=bound, gamma=gamma) * error.numel()
        loss.backward()
        return loss

    optimizer.step(closure)
    return d.detach()


@pytest.mark.parametrize("kappa", [0.5, 1.0, 1.5])
def test_a_student_aims_at_minus_kappa_times_the_error(kappa):
    error = normal(100, 3, scale=0.5)
    error -= error.mean(0)
    best = minimiser(error, eta=0.2, kappa=kappa, bound=4.0)
    assert torch.linalg.norm(best + kappa * error) <= 0.03 * torch.linalg.norm(kappa * error)


def test_an_error_shared_by_all_samples_is_corrected_less():
    # Second order of the barrier: the mean over the samples is damped by 1 + kappa / (4 b eta).
    best = minimiser(torch.full((100, 2), 0.05, dtype=torch.float64), eta=0.2, kappa=1.0, bound=4.0)
    torch.testing.assert_close(best, torch.full_like(best, -0.05 / (1 + 1 / (4 * 4.0 * 0.2))), rtol=0.01, atol=0)


def test_gamma_of():
    assert bf.gamma_of(0.5, 1.0, 4.0) == pytest.approx(0.5 / 16)
    assert bf.gamma_of(0.5, 2.0, 4.0) == pytest.approx(0.5 / 32)
    assert bf.gamma_of(0.5, 0.0, 4.0) == math.inf


def test_centre_takes_away_what_softmax_does_not_see():
    logits = normal(5, 7) + 3
    ours = bf.centre(logits)
    torch.testing.assert_close(ours.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.softmax(-1), logits.softmax(-1))


# ---- label loss and teacher loss


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kd_terms_against_numpy_and_autograd(temperature):
    student, teacher, target = (
        normal(8, 5, scale=3.0).requires_grad_(),
        normal(8, 5, scale=3.0),
        torch.randint(0, 5, (8,)),
    )
    terms = bf.kd_terms(student, teacher, target, temperature=temperature)

    def log_softmax(logits, tau):
        scaled = logits.detach().numpy() / tau
        return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))

    p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    np.testing.assert_allclose(terms.kl.detach(), temperature**2 * (np.exp(p) * (p - q)).sum(1), rtol=1e-9)
    np.testing.assert_allclose(terms.ce.detach(), -log_softmax(student, 1.0)[np.arange(8), target], rtol=1e-12)
    for loss, residual in ((terms.ce, terms.label_residual), (terms.kl, terms.teacher_residual)):
        (gradient,) = torch.autograd.grad(loss.sum(), student, retain_graph=True)
        torch.testing.assert_close(residual.detach(), gradient, rtol=1e-9, atol=1e-12)


def test_teacher_residual_keeps_its_size_at_any_temperature():
    # tau^2 KL tends to half the mean square of the centred difference, whose gradient knows no temperature.
    student, teacher = bf.centre(normal(8, 5)), bf.centre(normal(8, 5))
    terms = bf.kd_terms(student, teacher, torch.zeros(8, dtype=torch.long), temperature=1e4)
    torch.testing.assert_close(terms.teacher_residual, (student - teacher) / 5, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_round_loss_is_the_barrier_loss_of_the_game(scale):
    S, g = scale * torch.randn(40, 3, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    d, log_z = torch.randn(16, 3, dtype=torch.float64).requires_grad_(), bf.log_normaliser(S, 0.5)
    options = {"population": 40, "bound": 0.3, "gamma": 0.4}  # a small bound: arguments fall below the floor
    found = bf.round_loss(d - g, S[:16], log_z, eta=0.5, **options)
    up, down = bf.game_rows(S[:16], log_z, 0.5)
    wanted = bf.log_barrier_loss(d - g, up, down, **options)
    torch.testing.assert_close(found, wanted)
    (mine,) = torch.autograd.grad(3 * found, d)
    (theirs,) = torch.autograd.grad(3 * wanted, d)
    torch.testing.assert_close(mine, theirs)


def test_mixed_precision_does_not_touch_the_game():
    S, d = torch.randn(16, 3), torch.randn(16, 3).requires_grad_()
    options = {"eta": 0.5, "population": 16, "bound": 3.0, "gamma": 0.4}
    found = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = bf.round_loss(d, S, bf.log_normaliser(S, 0.5), **options)
        found.append((loss, torch.autograd.grad(loss, d)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_half_precision_is_computed_in_float32():
    S, d = torch.randn(16, 3), torch.randn(16, 3).bfloat16().requires_grad_()
    options = {"eta": 0.5, "population": 16, "bound": 3.0, "gamma": 0.4}
    wide = d.detach().float().requires_grad_()
    found, wanted = (bf.round_loss(x, S, bf.log_normaliser(S, 0.5), **options) for x in (d, wide))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found, d)[0], torch.autograd.grad(wanted, wide)[0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bit_errors_sum_to_one(dtype):
    """log Z of 40,000 samples is beyond the steps of these types."""
    up, down = bf.game_weights(torch.zeros(40_000, 2, dtype=dtype), 0.5)
    torch.testing.assert_close(up.sum(0) + down.sum(0), torch.ones(2))


@pytest.mark.parametrize("autocast", [True, False])
def test_kd_terms_of_16_bit_logits_are_those_of_float32(autocast):
    """A student near its teacher: in bfloat16, every other divergence would be negative."""
    student = torch.randn(50, 10).bfloat16()
    teacher = (student + 0.02 * torch.randn(50, 10)).bfloat16()
    target = torch.randint(10, (50,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = bf.kd_terms(student, teacher, target, temperature=4.0)
    expected = bf.kd_terms(student.float(), teacher.float(), target, temperature=4.0)
    assert (found.kl > -1e-6).all()
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_halves_of_a_batch_that_see_each_other_have_the_gradient_of_the_whole():
    """Two threads in place of two processes; DDP takes the mean of their gradients."""
    S, d, log_z = torch.randn(16, 3), torch.randn(16, 3), torch.rand(3)
    options = {"eta": 0.5, "population": 16, "bound": 0.3, "gamma": 0.4}

    def slope(rows, **more):
        deviation = d[rows].clone().requires_grad_()
        loss = bf.round_loss(deviation, S[rows], log_z, **options, **more)
        return torch.autograd.grad(loss, deviation)[0]

    sums, together = [], threading.Barrier(2)

    def across(values):
        sums.append(values.clone())
        together.wait(10)
        return torch.stack(sums).mean(0)

    whole = slope(slice(16))
    with ThreadPool(2) as pool:
        halves = pool.map(lambda rows: slope(rows, across=across), [slice(8), slice(8, 16)], 1)
    torch.testing.assert_close(torch.cat(halves) / 2, whole)
    alone = torch.cat([slope(slice(8)), slope(slice(8, 16))]) / 2
    assert (alone - whole).abs().max() > 1e-2


def test_kd_terms_of_several_teachers_are_those_of_each():
    student, teachers, target = normal(8, 5), normal(3, 8, 5), torch.randint(0, 5, (8,))
    terms = bf.kd_terms(student, teachers, target, temperature=2.0)
    for number, teacher in enumerate(teachers):
        alone = bf.kd_terms(student, teacher, target, temperature=2.0)
        torch.testing.assert_close(terms.kl[number], alone.kl)
        torch.testing.assert_close(terms.teacher_residual[number], alone.teacher_residual)
    torch.testing.assert_close(terms.ce, alone.ce)
