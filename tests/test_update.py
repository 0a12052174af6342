"""Training replays sampling: the ratio is 1 before any update; losses, KL forms and the split into updates."""

from dataclasses import replace

import pytest
import torch
from densegrpo.engine.data import Advantages, Gaussian, Prompt, join
from densegrpo.engine.distributed import Solo
from densegrpo.engine.explore import independent_chains
from densegrpo.engine.guidance import guided
from densegrpo.engine.kernels import CPS, EULER_MARUYAMA, log_prob, unscaled_log_prob
from densegrpo.engine.learner import Learner, OptimizerSettings
from densegrpo.engine.lora import LoraSettings, add_lora
from densegrpo.engine.loss import KLS, RATIOS, Move, PolicyUpdate
from densegrpo.engine.models.mmdit import MMDiT
from densegrpo.engine.probe import TERMINAL
from densegrpo.engine.recipes import RECIPES, Recipe, make_recipe
from densegrpo.engine.rollout import rollout
from densegrpo.engine.schedule import constant_rate, flow_rate, shifted_linear
from densegrpo.engine.update import Batch, batches, learn, replay
from gaussian_flow import GaussianFlow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

PROMPTS = [Prompt("a", {}), Prompt("bbbbbbbbbb", {})]
NUM_STEPS = 5
every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


class TinyFlow:
    """A random transformer of SD3's architecture as ``FlowModel``."""

    device = torch.device("cpu")
    lora_prefix = "diffusion_model"
    latent_shape = (16, 4, 4)

    def __init__(self, dtype=torch.float32, guidance=1.0):
        torch.manual_seed(0)
        self.dtype, self.guidance = dtype, guidance
        self.network = MMDiT(1, 8, 8, max_tokens=4)
        for parameter in self.network.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.network.to(dtype)
        self.lora = add_lora(self.network, LoraSettings(rank=2, alpha=2.0), r"joint_blocks")

    def encode(self, prompts):
        """Random but fixed by the length of the prompt."""
        generators = [torch.Generator().manual_seed(len(p)) for p in [*prompts, ""]]
        rows = [torch.randn(9, 8, generator=g) for g in generators]
        return torch.stack(rows).to(self.dtype)

    def velocity(self, x, sigma, cond, rows):
        def predict(x, sigma, rows, conditional):
            code = cond[rows if conditional else torch.full_like(rows, -1)]
            return self.network(x.to(self.dtype), sigma, code[:, 1:], code[:, 0]).float()

        return guided(predict, x, sigma, rows, self.guidance, "detach")

    def schedule(self, num_steps):
        return shifted_linear(num_steps)


def gaussian(dtype=torch.float32):
    return GaussianFlow(dtype=dtype)


def guided_transformer(dtype=torch.float32):
    return TinyFlow(dtype, guidance=3.0)


every_model = pytest.mark.parametrize("make", [gaussian, TinyFlow, guided_transformer])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def away_from_zero(lora):
    """Give B values, so that policy and reference differ."""
    for i, up in enumerate(lora.up):
        up.data = torch.randn(up.shape, generator=torch.Generator().manual_seed(i)) * 0.1


def sample(recipe, model, num_prompts=2, chunk=64):
    """(cond, trajectory)."""
    away_from_zero(model.lora)
    sigmas, cond = model.schedule(NUM_STEPS), model.encode([p.text for p in PROMPTS])
    plans = [recipe.explore(model.latent_shape, sigmas, (0, 0, slot)) for slot in range(num_prompts)]
    plan = join([replace(p, prompt=torch.full_like(p.prompt, i)) for i, p in enumerate(plans)])
    return cond, rollout(model, cond, plan, sigmas, recipe.kernel, recipe.probe, chunk)[0]


def some_advantages(traj, seed=0):
    values = torch.randn(traj.plan.train.shape, generator=torch.Generator().manual_seed(seed))
    return Advantages(values * traj.plan.train, traj.plan.train.clone())


class Recording(Learner):
    """Keeps the gradient of every optimizer step."""

    def __init__(self, model, lr=0.0):
        super().__init__(model.lora, OptimizerSettings(lr=lr, weight_decay=0.0))
        self.gradients = []

    def step(self):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.lora.parameters()]))
        return super().step()


def run(recipe, model, lr=0.0, batch_size=4, advantages=None, num_prompts=2):
    """One iteration's update: (statistics, gradients of its optimizer steps)."""
    cond, traj = sample(recipe, model, num_prompts)
    learner = Recording(model, lr)
    stats = learn(model, cond, traj, advantages or some_advantages(traj), recipe, learner, Solo(), batch_size)
    return stats, learner.gradients


@every_recipe
@every_model
@every_dtype
@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("ratio", sorted(RATIOS))
def test_the_ratio_is_exactly_one_until_the_weights_change(name, make, dtype, num_updates, ratio, monkeypatch):
    """Learning rate 0: the old density of the second optimizer step is compared as well."""
    seen, original = [], RATIOS[ratio]
    monkeypatch.setitem(RATIOS, ratio, lambda *moves: seen.append(original(*moves)) or seen[-1])
    recipe = make_recipe(name, group_size=4, num_updates=num_updates, ratio=ratio)
    stats, gradients = run(recipe, make(dtype))
    assert (torch.cat(seen) == 1).all()
    assert (stats["ratio"], stats["clip_fraction"], stats["updates"]) == (1, 0, num_updates)
    assert len(torch.cat(seen)) == stats["transitions"] == 2 * 4 * (NUM_STEPS - 1)
    assert all(g.isfinite().all() and g.ne(0).any() for g in gradients)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_a_gap_between_sampling_and_training_is_reported_but_not_in_the_ratio(num_updates):
    """As if sampling had run in other kernels: the old density is replayed in the batches that train."""
    recipe, model = make_recipe("flow_grpo", group_size=4, num_updates=num_updates), gaussian()
    cond, traj = sample(recipe, model)
    elsewhere = replace(traj, log_prob=traj.log_prob + 0.01)
    stats = learn(model, cond, elsewhere, some_advantages(traj), recipe, Recording(model), Solo(), 4)
    assert stats["ratio"] == 1
    assert stats["sampling_gap"] == pytest.approx(0.01, rel=1e-3)


@every_recipe
@every_model
@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_sampling_and_training_agree_on_the_density(name, make, kernel):
    """The same kernel, inputs and precision on both sides; other batch shapes may cost the last bits."""
    recipe = make_recipe(name, group_size=4, kernel=kernel)
    model = make()
    cond, traj = sample(recipe, model)
    for batch in batches(traj, traj.plan.train, 3):
        found = replay(model, cond, traj, recipe, batch).log_prob
        sampled = traj.log_prob[batch.chain, batch.state_step[batch.state]]
        torch.testing.assert_close(found, sampled, atol=1e-5, rtol=0)
    assert run(recipe, make())[0]["sampling_gap"] < 1e-5


def test_the_old_density_of_later_updates_is_that_of_the_sampling_policy():
    """It is computed before the first optimizer step, however large that is."""
    recipe = make_recipe("flow_grpo", group_size=4, num_updates=2)
    stats, _ = run(recipe, gaussian(), lr=0.5)
    assert stats["sampling_gap"] < 1e-5
    assert stats["ratio"] != 1


def test_a_sampling_policy_in_low_precision_is_reported_not_hidden():
    stats, _ = run(make_recipe("flow_grpo", group_size=4), gaussian(torch.bfloat16))
    assert stats["ratio"] == 1
    assert stats["sampling_gap"] < 1e-2


def plain_recipe(shared_noise=False, window=None, group_size=4, **update):
    explore = independent_chains(group_size, flow_rate(0.7), shared_noise=shared_noise, window=window)
    return Recipe(explore=explore, probe=TERMINAL, update=PolicyUpdate(**update))


@pytest.mark.parametrize("shared_noise", [False, True])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_hold_every_transition_once(shared_noise, size):
    _, traj = sample(plain_recipe(shared_noise), gaussian())
    mask = traj.plan.train & (torch.rand(traj.plan.train.shape, generator=torch.Generator().manual_seed(0)) > 0.3)
    seen = torch.zeros_like(mask, dtype=torch.long)
    for batch in batches(traj, mask, size):
        assert len(batch.state_chain) <= size
        steps = batch.state_step[batch.state]
        seen[batch.chain, steps] += 1
        start = traj.states[batch.state_chain, batch.state_step][batch.state]
        assert torch.equal(start, traj.states[batch.chain, steps])
    assert torch.equal(seen, mask.long())


def test_a_state_that_chains_share_is_evaluated_once():
    """In each of 2 groups of 4, step 0 has one state, steps 1..3 have four; with gradient, and again for the KL."""
    recipe, model = plain_recipe(shared_noise=True, kl_weight=0.1), gaussian()
    cond, traj = sample(recipe, model)
    model.evaluations = 0
    learn(model, cond, traj, some_advantages(traj), recipe, Recording(model), Solo(), 100)
    assert model.evaluations == 2 * 2 * (1 + 3 * 4)


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize(("kl_weight", "references"), [(0.0, 4), (0.1, 32)])
def test_training_costs_what_can_be_derived_by_hand(kl_weight, references, num_updates):
    """G (T - 1) = 32 with gradient; as many for the KL, or one batch to report it; later updates' old densities."""
    recipe, model = plain_recipe(kl_weight=kl_weight, num_updates=num_updates), gaussian()
    cond, traj = sample(recipe, model)
    model.evaluations = 0
    learn(model, cond, traj, some_advantages(traj), recipe, Recording(model), Solo(), 4)
    assert model.evaluations == 32 + references + 32 * (num_updates - 1) // num_updates


def test_the_kl_is_reported_even_when_it_does_not_pull():
    stats, gradients = run(plain_recipe(kl_weight=0.0), gaussian(), batch_size=1000)
    expected, pulled = run(plain_recipe(kl_weight=1e-3), gaussian(), batch_size=1000)
    assert stats["kl"] == pytest.approx(expected["kl"])
    assert stats["kl"] > 0
    assert stats["loss"] == stats["policy_loss"]
    assert not torch.equal(gradients[0], pulled[0])


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("make", [gaussian, TinyFlow])
def test_the_gradient_does_not_depend_on_the_batch_size(make, kl_weight):
    recipe = plain_recipe(shared_noise=True, kl_weight=kl_weight)
    expected = run(recipe, make(), batch_size=1000)[1][0]
    for size in (1, 3):
        torch.testing.assert_close(run(recipe, make(), batch_size=size)[1][0], expected, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_that_of_the_advantage_weighted_density():
    """Before any update PPO's objective is the policy gradient: mean of advantage * d log pi, each chain by itself."""
    recipe, model = plain_recipe(), TinyFlow()
    cond, traj = sample(recipe, model)
    advantages, total = some_advantages(traj), 0.0
    transitions = traj.plan.train.nonzero().tolist()
    for b, t in transitions:
        batch = Batch(torch.tensor([b]), torch.tensor([t]), torch.tensor([0]), torch.tensor([b]))
        total = total - advantages.values[b, t] * replay(model, cond, traj, recipe, batch).log_prob.sum()
    expected = torch.autograd.grad(total / len(transitions), list(model.lora.parameters()))
    learner = Recording(model)
    learn(model, cond, traj, advantages, recipe, learner, Solo(), 4)
    torch.testing.assert_close(learner.gradients[0], torch.cat([g.flatten() for g in expected]), atol=1e-6, rtol=1e-4)


def test_an_update_makes_good_steps_likelier_and_bad_ones_less_likely():
    recipe, model = plain_recipe(), TinyFlow()
    cond, traj = sample(recipe, model)
    advantages = some_advantages(traj)
    learn(model, cond, traj, advantages, recipe, Learner(model.lora, OptimizerSettings(lr=1e-3)), Solo(), 100)
    change = torch.zeros_like(traj.log_prob)
    for batch in batches(traj, traj.plan.train, 100):
        steps = batch.state_step[batch.state]
        change[batch.chain, steps] = replay(model, cond, traj, recipe, batch).log_prob.detach()
    assert ((change - traj.log_prob) * advantages.values)[traj.plan.train].sum() > 0


def test_weights_of_steps_multiply_the_advantages_only():
    halved = replace(plain_recipe(kl_weight=0.5), weight=lambda traj: torch.full_like(traj.std, 0.5))
    stats, gradients = run(halved, gaussian())
    model = gaussian()
    _, traj = sample(plain_recipe(), model)
    halves = some_advantages(traj)
    halves = Advantages(halves.values / 2, halves.mask)
    expected_stats, expected = run(plain_recipe(kl_weight=0.5), gaussian(), advantages=halves)
    torch.testing.assert_close(gradients[0], expected[0])
    assert stats["loss"] == pytest.approx(expected_stats["loss"])


def test_nothing_to_learn_changes_nothing():
    model = gaussian()
    nothing = Advantages(torch.zeros(8, NUM_STEPS), torch.zeros(8, NUM_STEPS, dtype=torch.bool))
    stats, gradients = run(plain_recipe(kl_weight=1.0, num_updates=2), model, lr=0.5, advantages=nothing)
    assert (stats["updates"], stats["transitions"], gradients) == (0, 0, [])


def test_without_a_difference_to_the_untrained_model_the_kl_is_zero():
    model, recipe = gaussian(), plain_recipe(kl_weight=1.0)
    cond, traj = sample(recipe, model)
    model.lora.up[0].data.zero_()
    stats = learn(model, cond, traj, some_advantages(traj), recipe, Recording(model), Solo(), 4)
    assert stats["kl"] == 0
    model.lora.up[0].data.fill_(0.3)
    stats = learn(model, cond, traj, some_advantages(traj), recipe, Recording(model), Solo(), 4)
    assert stats["kl"] > 0
    assert stats["loss"] == pytest.approx(stats["policy_loss"] + stats["kl"])


@pytest.mark.parametrize("kl", sorted(KLS))
def test_the_kl_pulls_back_to_the_untrained_model(kl):
    model, recipe = gaussian(), plain_recipe(kl_weight=1.0, kl=kl)
    cond, traj = sample(recipe, model)
    learner = Learner(model.lora, OptimizerSettings(lr=0.01, weight_decay=0.0))
    before = abs(model.mean)
    for _ in range(5):
        learn(model, cond, traj, Advantages(torch.zeros(8, NUM_STEPS), traj.plan.train), recipe, learner, Solo(), 100)
    assert abs(model.mean) < 0.9 * before


@pytest.mark.parametrize("num_updates", [1, 2, 3, 4])
def test_updates_split_every_group_evenly_and_hold_every_transition_once(num_updates):
    _, traj = sample(plain_recipe(group_size=12), gaussian())
    parts = list(PolicyUpdate(num_updates=num_updates).updates(traj.plan.train, traj.plan))
    assert len(parts) == num_updates
    assert torch.equal(sum(part.int() for part in parts), traj.plan.train.int())
    for part in parts:
        chains = part.any(1)
        assert [int(chains[traj.plan.group == g].sum()) for g in (0, 1)] == [12 // num_updates] * 2
        assert torch.equal(part[chains], traj.plan.train[chains])


def test_a_masked_transition_is_in_no_update():
    _, traj = sample(plain_recipe(), gaussian())
    mask = traj.plan.train.clone()
    mask[3, 1] = False
    assert not any(part[3, 1] for part in PolicyUpdate(num_updates=2).updates(mask, traj.plan))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, -1.0, False), (-0.5, 1.0, True), (0.0, 1.0, True), (0.0, -1.0, True)],
)
def test_clipping_stops_only_what_has_gone_far_enough(log_ratio, advantage, moves):
    update, new = PolicyUpdate(clip_range=0.2), torch.tensor([log_ratio], requires_grad=True)
    update.policy_loss(new.exp(), torch.tensor([advantage])).sum().backward()
    assert (new.grad != 0).item() is moves
    assert update.is_clipped(new.exp(), torch.tensor([advantage])).item() is not moves


@given(ratio=st.floats(0.2, 5), advantage=st.floats(-5, 5), clip_range=st.floats(1e-5, 0.9))
@settings(max_examples=100, deadline=None)
def test_the_policy_loss_is_ppos(ratio, advantage, clip_range):
    update = PolicyUpdate(clip_range=clip_range)
    clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
    found = update.policy_loss(torch.tensor([ratio]).double(), torch.tensor([advantage]).double()).item()
    assert found == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-6, abs=1e-9)


def test_a_gradient_step_goes_against_the_sign_of_the_loss():
    ratio = torch.tensor([1.0, 1.0], requires_grad=True)
    PolicyUpdate().policy_loss(ratio, torch.tensor([2.0, -3.0])).sum().backward()
    assert ratio.grad.tolist() == [-2.0, 3.0]


def moves(kernel=log_prob, seed=0, same_std=True, std=None):
    """(new, old, sample) of three transitions; their distributions differ in the mean."""
    generator = torch.Generator().manual_seed(seed)
    mean, shift, noise, velocity, other = torch.randn(5, 3, 2, 4, 4, generator=generator).double()
    std = torch.tensor([0.1, 0.7, 2.0]).double().view(3, 1, 1, 1) if std is None else std
    old, new = Gaussian(mean, std), Gaussian((mean + 0.1 * shift).requires_grad_(), std)
    sample = mean + std * noise
    return Move(velocity, new, kernel(sample, new)), Move(other, old, kernel(sample, old)), sample


def test_the_exact_kl_is_that_of_the_two_gaussians_per_element():
    new, reference, _ = moves()
    both = [Independent(Normal(m.dist.mean, m.dist.std.expand_as(m.dist.mean)), 3) for m in (new, reference)]
    expected = kl_divergence(*both) / (2 * 4 * 4)
    torch.testing.assert_close(KLS["exact"](new, reference, torch.ones(3).double()), expected)


def test_flow_grpos_kl_divides_by_the_squared_rate():
    """Their code divides by 2 rate^2 where std = rate * sqrt(step): the exact KL times the step size."""
    new, reference, _ = moves()
    step = torch.tensor([0.04, 0.1, 0.3]).double()
    rate = new.dist.std.flatten() / step.sqrt()
    expected = ((new.dist.mean - reference.dist.mean) ** 2).flatten(1).mean(1) / (2 * rate**2)
    torch.testing.assert_close(KLS["flow_grpo"](new, reference, step), expected)
    torch.testing.assert_close(KLS["flow_grpo"](new, reference, step), KLS["exact"](new, reference, step) * step)


def test_the_velocity_kl_is_the_mean_squared_difference():
    new, reference, _ = moves()
    expected = torch.stack(
        [nn.functional.mse_loss(a, b) for a, b in zip(new.velocity, reference.velocity, strict=True)]
    )
    torch.testing.assert_close(KLS["velocity"](new, reference, torch.ones(3)), expected)


@pytest.mark.parametrize("form", sorted(KLS))
@pytest.mark.parametrize("ratio", sorted(RATIOS))
@pytest.mark.parametrize("density", [log_prob, unscaled_log_prob])
def test_ode_rows_have_finite_gradients(form, ratio, density):
    """Masking after dividing by 0 would still give NaN."""
    new, old, sample = moves(density, std=torch.tensor([0.0, 0.7, 2.0]).double().view(3, 1, 1, 1))
    kl = KLS[form](new, old, torch.ones(3).double())
    (kl.sum() + RATIOS[ratio](new, old, sample).sum()).backward()
    assert new.dist.mean.grad.isfinite().all()
    assert form == "velocity" or kl[0] == 0
    assert RATIOS["plain"](new, old, sample)[0] == 1


def test_the_plain_ratio_is_a_geometric_mean_over_elements():
    new, old, sample = moves()
    densities = [Normal(m.dist.mean, m.dist.std).log_prob(sample).flatten(1).sum(1) for m in (new, old)]
    expected = ((densities[0] - densities[1]) / (2 * 4 * 4)).exp()
    torch.testing.assert_close(RATIOS["plain"](new, old, sample), expected)


@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_guards_ratio_takes_the_drift_away_and_evens_the_scale(seed):
    """exp(std * (log ratio + |mean shift|^2 / (2 std^2))) with the full Gaussian density."""
    new, old, sample = moves(seed=seed)
    std = new.dist.std.flatten()
    drift = ((new.dist.mean - old.dist.mean) ** 2).flatten(1).mean(1) / (2 * std**2)
    expected = (std * (new.log_prob - old.log_prob + drift)).exp()
    torch.testing.assert_close(RATIOS["guard"](new, old, sample), expected)


def test_guards_ratio_needs_no_density_so_it_serves_cps_too():
    full, constants_removed = moves(log_prob), moves(unscaled_log_prob)
    torch.testing.assert_close(RATIOS["guard"](*full), RATIOS["guard"](*constants_removed))
    assert not torch.allclose(RATIOS["plain"](*full), RATIOS["plain"](*constants_removed))


@pytest.mark.parametrize("kernel", [EULER_MARUYAMA, CPS], ids=["sde", "cps"])
def test_every_ratio_and_kl_trains_with_every_kernel(kernel):
    for ratio in RATIOS:
        for kl in KLS:
            base = plain_recipe(ratio=ratio, kl=kl, kl_weight=0.1, num_updates=2)
            recipe = replace(base, kernel=kernel, explore=independent_chains(4, constant_rate(0.7)))
            stats, gradients = run(recipe, gaussian(), lr=1e-3)
            assert len(gradients) == 2
            assert all(g.isfinite().all() and g.ne(0).any() for g in gradients), (ratio, kl)
            assert all(torch.tensor(value).isfinite() for value in stats.values())


def test_guided_velocity_is_the_usual_combination():
    weight = torch.tensor(2.0, requires_grad=True)
    x, sigma, rows = torch.randn(3, 1, 2, 2), torch.rand(3), torch.zeros(3, dtype=torch.long)

    def predict(x, sigma, rows, conditional):
        return weight * x if conditional else weight**2 * x

    def gradient(out):
        return torch.autograd.grad(out.sum(), weight)[0]

    full = guided(predict, x, sigma, rows, 4.5, "full")
    detach = guided(predict, x, sigma, rows, 4.5, "detach")
    unconditional = weight**2 * x
    torch.testing.assert_close(full, unconditional + 4.5 * (weight * x - unconditional))
    assert torch.equal(full, detach)
    torch.testing.assert_close(gradient(full), gradient(unconditional + 4.5 * (weight * x - unconditional)))
    joint = (weight**2 * x).detach()
    torch.testing.assert_close(gradient(detach), gradient(joint + 4.5 * (weight * x - joint)))


@pytest.mark.parametrize(("scale", "halves"), [(1.0, [True]), (3.0, [True, False])])
@pytest.mark.parametrize("cfg_grad", ["full", "detach"])
def test_without_guidance_there_is_one_plain_call(scale, halves, cfg_grad):
    calls = []

    def predict(x, sigma, rows, conditional):
        calls.append(conditional)
        return 1 * x

    x = torch.ones(2, 1, 1, 1, requires_grad=True)
    out = guided(predict, x, torch.ones(2), torch.zeros(2), scale, cfg_grad)
    assert torch.equal(out, x)
    assert calls == halves
    with torch.no_grad():
        assert not guided(predict, x, torch.ones(2), torch.zeros(2), scale, cfg_grad).requires_grad


def test_detached_guidance_trains_a_real_network_like_the_joint_path():
    """Same velocity; the gradient is that of the joint path with its unconditional half detached."""
    model = TinyFlow(guidance=3.0)
    away_from_zero(model.lora)
    cond, x, sigma = model.encode(["a"]), torch.randn(2, 16, 4, 4), torch.tensor([0.9, 0.4])
    rows, no_text = torch.zeros(2, dtype=torch.long), torch.full((2,), -1)
    parameters = list(model.lora.parameters())
    found = model.velocity(x, sigma, cond, rows)
    model.guidance = 1.0
    conditional, unconditional = (model.velocity(x, sigma, cond, r) for r in (rows, no_text))
    expected = unconditional.detach() + 3.0 * (conditional - unconditional.detach())
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(v.square().sum(), parameters) for v in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
