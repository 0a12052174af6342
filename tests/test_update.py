"""Training replays sampling: the ratio is 1 before any update, and costs are as derived."""

from dataclasses import replace

import pytest
import torch
from densegrpo.engine.data import Advantages, Prompt, join
from densegrpo.engine.distributed import Solo
from densegrpo.engine.explore import Chains
from densegrpo.engine.guidance import guided
from densegrpo.engine.learner import Learner, OptimizerSettings
from densegrpo.engine.lora import LoraSettings, add_lora
from densegrpo.engine.loss import KLS, RATIOS, WEIGHTS, PolicyUpdate
from densegrpo.engine.models.mmdit import MMDiT
from densegrpo.engine.noise import StepNoise
from densegrpo.engine.recipes import RECIPES, Recipe, make_recipe
from densegrpo.engine.rollout import rollout
from densegrpo.engine.schedule import shifted_linear
from densegrpo.engine.update import Batch, batches, learn, replay
from gaussian_flow import GaussianFlow
from torch import nn

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
    plans = [recipe.plan(model.latent_shape, sigmas, (0, 0, slot)) for slot in range(num_prompts)]
    plan = join([replace(p, prompt=torch.full_like(p.prompt, i)) for i, p in enumerate(plans)])
    return cond, rollout(model, cond, plan, sigmas, recipe.noise.step, recipe.probe, chunk)[0]


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
    assert (stats["ratio"], stats["clip_fraction"]) == (1, 0)
    trained = sample(recipe, make(dtype))[1].plan.train
    assert len(torch.cat(seen)) == stats["transitions"] == trained.sum()
    per_step = recipe.update.update_per == "step"
    assert len(gradients) == stats["updates"] == num_updates * (trained.any(0).sum() if per_step else 1)
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


def plain_recipe(shared_noise=False, group_size=4, **update):
    explore = Chains(group_size=group_size, shared_noise=shared_noise)
    return Recipe(explore=explore, update=PolicyUpdate(**update))


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


def test_weights_of_steps_multiply_the_advantages_only(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "uniform", lambda std, step_size: torch.full_like(std, 0.5))
    stats, gradients = run(plain_recipe(kl_weight=0.5), gaussian())
    monkeypatch.undo()
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


@pytest.mark.parametrize("kernel", ["sde", "cps"])
def test_every_ratio_and_kl_trains_with_every_kernel(kernel):
    for ratio in RATIOS:
        for kl in KLS:
            base = plain_recipe(ratio=ratio, kl=kl, kl_weight=0.1, num_updates=2)
            recipe = replace(base, noise=StepNoise(kernel=kernel))
            stats, gradients = run(recipe, gaussian(), lr=1e-3)
            assert len(gradients) == 2
            assert all(g.isfinite().all() and g.ne(0).any() for g in gradients), (ratio, kl)
            assert all(torch.tensor(value).isfinite() for value in stats.values())


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
